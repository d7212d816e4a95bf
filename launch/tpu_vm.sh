#!/usr/bin/env bash
# Makes one run on a Cloud TPU slice, from creating the slice to fetching the results:
#
#   bash launch/tpu_vm.sh [--dry-run] create | run [flags for bef_jax.main] | fetch | delete
#
# Each step may be repeated. `run` starts the same command on all hosts of the slice, and goes on
# with a run that was stopped. --dry-run prints every command and runs none.
#
#   NAME     of the slice                                  ZONE     such as us-west4-a
#   TYPE     v5litepod-8 (default), v5litepod-256, ...     RUNTIME  the slice's software version
#   WORKDIR  where the hosts write, and what fetch copies; with several hosts it must be on a file
#            system that all have mounted at the same place
#   SPOT     yes for a slice that may be taken away
set -euo pipefail

: "${NAME:=bef-jax}" "${TYPE:=v5litepod-8}" "${RUNTIME:=v2-alpha-tpuv5-lite}" "${SPOT:=}"
: "${ZONE:?set ZONE to the zone of the slice, such as us-west4-a}"
: "${WORKDIR:=runs/$NAME}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm)
here=("$NAME" "--zone=$ZONE")

call() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all() {
  call "${tpu[@]}" ssh "${here[@]}" --worker=all "--command=$1"
}

exists() {
  [[ ! $dry_run ]] && "${tpu[@]}" describe "${here[@]}" >/dev/null 2>&1
}

create() {
  exists || call "${tpu[@]}" create "${here[@]}" "--accelerator-type=$TYPE" "--version=$RUNTIME" \
    ${SPOT:+--spot}
  on_all 'mkdir -p bef_jax'
  call "${tpu[@]}" scp --recurse \
    "$root"/{bef_jax,configs,pyproject.toml,constraints.txt,README.md,LICENSE} "$NAME:bef_jax/" \
    "--zone=$ZONE" --worker=all
  # The slices come with Python 3.10, which is too old.
  on_all 'sudo apt-get install -qq python3.11-venv && python3.11 -m venv bef_jax/.venv'
  on_all 'cd bef_jax && .venv/bin/pip install -q -c constraints.txt -e ".[tpu]"'
}

# The coordinator is auto, because a TPU VM lists the other hosts in its metadata, not in variables.
run() {
  local flags
  printf -v flags ' %q' --workdir="$WORKDIR" --config.distributed.coordinator=auto "$@"
  on_all "cd bef_jax && .venv/bin/python -m bef_jax.main$flags"
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
case ${1:-} in
  create) create ;;
  run) run "${@:2}" ;;
  fetch)
    call mkdir -p "$root/runs"
    [[ $WORKDIR == /* ]] && from=$WORKDIR || from=bef_jax/$WORKDIR
    call "${tpu[@]}" scp --recurse "$NAME:$from" "$root/runs/" "--zone=$ZONE" --worker=0
    ;;
  delete) if [[ $dry_run ]] || exists; then call "${tpu[@]}" delete "${here[@]}" --quiet; fi ;;
  *)
    echo "usage: bash launch/tpu_vm.sh [--dry-run] create | run [flags] | fetch | delete" >&2
    exit 2
    ;;
esac
