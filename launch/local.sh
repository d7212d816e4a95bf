#!/usr/bin/env bash
# Sets up an environment, once, and starts training or the tests in it:
#
#   bash launch/local.sh [--dry-run] train [flags for bef_jax.main]   --config= defaults to the quickstart
#   bash launch/local.sh [--dry-run] test [flags for pytest]
#
# --dry-run prints the commands, those of the set-up where it is due, and runs none.
# The environment goes to .venv, or to $BEF_VENV. Set-up speaks on stderr only: the summary that
# training prints is all of stdout.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${BEF_VENV:-$root/.venv}
venv=${venv%/}

# Memory of arrays on CPU. Huge pages: a step clears gigabytes that are new to it, which with small
# pages takes longer than the arithmetic. Few heaps, which keep what is below 1 GiB from one step to
# the next, so that less is new; above, keeping it would take three times the memory. Not one heap:
# what the compiler leaves behind lies between the arrays, and a run that compiled would take half
# as long again.
heaps=$(($(getconf _NPROCESSORS_ONLN) + 1))
memory=hugetlb=1:arena_max=$heaps:mmap_threshold=$((1 << 30)):trim_threshold=$((1 << 30))
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.${memory//:/:glibc.malloc.}}

say() {
  echo "launch/local.sh: $*" >&2
}

print() {
  printf '%q ' "$@"
  echo
}

# Both run a command, or print it. The set-up's speaks on stderr; what is started takes this
# script's place, so that signals reach Python itself, which saves and stops.
prepare() {
  if [[ $dry_run ]]; then print "$@"; else "$@" >&2; fi
}

start() {
  if [[ $dry_run ]]; then print env GLIBC_TUNABLES="$GLIBC_TUNABLES" "$@"; else exec "$@"; fi
}

write() {
  if [[ ! $dry_run ]]; then printf '%s' "$1" >"$2"; fi
}

# Prints the first Python that serves. 3.11 comes first, since constraints.txt was tested with it.
# Each is run, as a name on PATH may be a shim with nothing behind it.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  say "no Python >= 3.11 with its venv module on PATH: install one and run this again"
  return 1
}

# What the environment must have been made from: the stamp is a copy of it.
recipe() {
  echo "$root $1"
  cat "$root/pyproject.toml" "$root/constraints.txt"
}

is_ready() {
  [[ "$(cat "$venv/stamp$1" 2>/dev/null)" == "$(recipe "$1")" ]] && "$venv/bin/python" -c '' 2>&-
}

# $venv.setup has content while a set-up is under way: found so, the last one was cut short, and
# what it left is not to be trusted.
install() {
  local python clear=
  python=$(find_python)
  [[ -s "$venv.setup" ]] && clear=yes
  [[ $dry_run ]] || say "setting up $venv with $python: minutes, the first time only"
  write "under way" "$venv.setup"
  prepare "$python" -m venv ${clear:+--clear} "$venv"
  prepare "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root$1"
  write "$(recipe "$1")" "$venv/stamp$1"
  write "" "$venv.setup"
}

# Two that start at once must not install at once; where there is no flock, that is not guarded.
set_up() {
  if [[ $dry_run ]]; then
    is_ready "$1" || install "$1"
    return
  fi
  mkdir -p "$(dirname "$venv")"
  (
    if command -v flock >/dev/null; then flock 9; fi
    is_ready "$1" || install "$1"
  ) 9>>"$venv.setup"
}

train() {
  local flag config="--config=$root/configs/quickstart.py"
  for flag in "$@"; do
    case $flag in -config | --config | -config=* | --config=*) config= ;; esac
  done
  # -P: the package is this one, also where the current folder holds another copy of it.
  start "$venv/bin/python" -P -m bef_jax.main ${config:+"$config"} "$@"
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
case ${1:-} in
  train)
    set_up ""
    train "${@:2}"
    ;;
  test)
    set_up "[dev]"
    prepare cd "$root"
    start "$venv/bin/python" -m pytest "${@:2}"
    ;;
  *)
    say "usage: bash launch/local.sh [--dry-run] train [flags for main] | test [flags for pytest]"
    exit 2
    ;;
esac
