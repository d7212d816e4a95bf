#!/usr/bin/env bash
# Sets up an environment once, and starts training or the tests in it:
#
#   bash launch/local.sh [--dry-run] train [flags for bef_jax.main]   --config= defaults to the quickstart
#   bash launch/local.sh [--dry-run] test [flags for pytest]
#   bash launch/local.sh [--dry-run] setup                            only the environment
#
# --dry-run prints the commands, with those of the set-up if it is needed, and runs none.
# --device=DEVICE, before the mode, decides which JAX is installed: cpu, cuda12, cuda13, tpu, or cuda,
# which is cuda12. Without it, this machine's device nodes decide. With cpu, the started program
# uses no other device.
# Without flags, the tests run on all cores. The environment goes to .venv, or to $BEF_VENV. It is
# made with the first Python that fits, or with $BEF_PYTHON. The set-up prints on stderr only,
# because stdout is only for the summary of the training.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${BEF_VENV:-$root/.venv}
venv=${venv%/}

say() {
  echo "launch/local.sh: $*" >&2
}

print() {
  printf '%q ' "$@"
  echo
}

# Both functions run a command, or print it. A command of the set-up prints on stderr. The started
# program replaces this script, so that signals reach Python itself, which saves and stops.
prepare() {
  if [[ $dry_run ]]; then print "$@"; else "$@" >&2; fi
}

start() {
  [[ $device_flag != cpu ]] || set -- env JAX_PLATFORMS=cpu "$@"
  if [[ $dry_run ]]; then print "$@"; else exec "$@"; fi
}

write() {
  if [[ ! $dry_run ]]; then printf '%s' "$1" >"$2"; fi
}

# A name on PATH may be a shim with nothing behind it, so run each one.
is_usable_python() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
    >/dev/null 2>&1
}

# Prints the first Python that fits; if $BEF_PYTHON is set, it tries only that one. 3.11 is first,
# because the results in results/ were measured with it. 3.14 comes after the tested versions.
find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3.14 python3 python)
  [[ -z ${BEF_PYTHON:-} ]] || candidates=("$BEF_PYTHON")
  for candidate in "${candidates[@]}"; do
    if is_usable_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  say "no Python 3.11 to 3.14 with its venv module among: ${candidates[*]}; install one, or name" \
    "one in BEF_PYTHON"
  return 1
}

# Prints cuda, tpu or cpu; it looks in the same places as bef_jax/runtime/devices.py.
find_device() {
  local found
  found=$(ls -d /dev/nvidia0 /dev/nvidiactl /proc/driver/nvidia /dev/dxg /dev/accel0 \
    /dev/vfio/[0-9]* 2>/dev/null) || true
  case $found in
    *nvidia* | *dxg*) echo cuda ;;
    *accel*) echo tpu ;;
    # VFIO passes on the devices of any maker, and 0x1ae0 is Google.
    *vfio*) if cat /sys/bus/pci/devices/*/vendor | grep -qx 0x1ae0; then echo tpu; else echo cpu; fi ;;
    *) echo cpu ;;
  esac
}

# Prints the extras to install: "[dev]" and a GPU make "[dev,cuda]".
extras() {
  local device=${device_flag:-$(find_device)} inner=${1//[\[\]]/}
  case $device in
    cpu) echo "$1" ;;
    cuda | cuda12 | cuda13 | tpu) echo "[${inner:+$inner,}$device]" ;;
    *)
      say "--device=$device is unknown: choose cpu, cuda, cuda12, cuda13 or tpu"
      return 2
      ;;
  esac
}

# Prints what the environment must be made from; the stamp is a copy of it.
recipe() {
  echo "$root $1"
  cat "$root/pyproject.toml" "$root/constraints.txt"
}

is_ready() {
  [[ "$(cat "$venv/stamp$1" 2>/dev/null)" == "$(recipe "$1")" ]] && "$venv/bin/python" -c '' 2>&-
}

# $venv.setup has content while a set-up runs. Content at the start means that the last one was cut
# short, so its environment cannot be trusted.
install() {
  local python clear=
  python=$(find_python)
  [[ -s "$venv.setup" ]] && clear=yes
  [[ $dry_run ]] || say "setting up $venv with $python${1:+ and $1}: takes minutes, but only once"
  write "under way" "$venv.setup"
  prepare "$python" -m venv ${clear:+--clear} "$venv"
  prepare "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root$1"
  write "$(recipe "$1")" "$venv/stamp$1"
  write "" "$venv.setup"
  [[ $dry_run ]] || say "done; to use it yourself: source $venv/bin/activate"
}

# Two scripts that start at once must not install at once; without flock, nothing prevents it.
set_up() {
  local extras
  extras=$(extras "$1")
  if [[ $dry_run ]]; then
    is_ready "$extras" || install "$extras"
    return
  fi
  mkdir -p "$(dirname "$venv")"
  (
    if command -v flock >/dev/null; then flock 9; fi
    is_ready "$extras" || install "$extras"
  ) 9>>"$venv.setup"
}

train() {
  local flag config="--config=$root/configs/quickstart.py"
  for flag in "$@"; do
    case $flag in -config | --config | -config=* | --config=*) config= ;; esac
  done
  # -P makes Python use this package, even if the current folder holds another copy of it.
  start "$venv/bin/python" -P -m bef_jax.main ${config:+"$config"} "$@"
}

dry_run=
device_flag=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --device=*) device_flag=${1#*=} ;;
    *) break ;;
  esac
  shift
done
case ${1:-} in
  train)
    set_up ""
    train "${@:2}"
    ;;
  setup) set_up "" ;;
  test)
    set_up "[dev]"
    prepare cd "$root"
    # A test mostly compiles, which uses one core. Each of many processes takes a GB.
    (($# > 1)) || set -- test -n logical --maxprocesses=8 --dist worksteal
    start "$venv/bin/python" -m pytest "${@:2}"
    ;;
  *)
    say "usage: bash launch/local.sh [--dry-run] [--device=cpu|cuda|cuda12|cuda13|tpu]" \
      "train [flags for main] | test [flags for pytest] | setup"
    exit 2
    ;;
esac
