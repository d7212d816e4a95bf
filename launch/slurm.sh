#!/usr/bin/env bash
# Submits one run to a SLURM cluster, with one task for each GPU:
#
#   bash launch/slurm.sh [--dry-run] [flags for bef_jax.main]
#
# The job is this script itself; --dry-run only prints the command. The same command again goes on
# with a run that was stopped. SLURM sends SIGTERM GRACE seconds before the time is up, and before
# it takes the nodes. Then the run saves on all of them, exits, and is queued again.
#
#   NODES   1 by default      GPUS   of each node, 8 by default     TIME  24:00:00 by default
#   VENV    the environment   GRACE  120 by default                 SBATCH_*  read by sbatch itself
#   DEVICE  what the nodes have, as for launch/local.sh; cuda by default
#
# Without VENV, it uses the environment of launch/local.sh, and sets it up first if needed.
set -euo pipefail

: "${NODES:=1}" "${GPUS:=8}" "${DEVICE:=cuda}" "${TIME:=24:00:00}" "${GRACE:=120}"

# In the job SLURM runs a copy of this file, so the submission passes the folder on as BEF_ROOT.
if [[ ${BEF_ROOT:-} && ${SLURM_JOB_ID:-} ]]; then
  cd "$BEF_ROOT"
  trap : TERM # this shell survives the signal; its children get their own
  summary=$(srun --kill-on-bad-exit=1 "${VENV:-${BEF_VENV:-$BEF_ROOT/.venv}}/bin/python" -P -m bef_jax.main \
    "$@" | tee /dev/stderr | tail -n 1)
  # A stopped run exits with 0, as a finished one does, but it was not evaluated.
  if [[ $summary == *'"valid": null'* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit
fi

BEF_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export BEF_ROOT
dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
# Name the device, because this node may have no GPU that the set-up could find.
if [[ ! ${VENV:-} ]]; then
  bash "$BEF_ROOT/launch/local.sh" ${dry_run:+--dry-run} "--device=$DEVICE" setup
fi
# Do not use --gpus-per-task: JAX picks a task's GPU by number, so it must see all GPUs of the node.
submission=(sbatch --job-name=bef_jax "--nodes=$NODES" "--ntasks-per-node=$GPUS"
  "--gpus-per-node=$GPUS" "--time=$TIME" --requeue --open-mode=append "--signal=TERM@$GRACE"
  --export=ALL "$BEF_ROOT/launch/slurm.sh" "$@")
if [[ $dry_run ]]; then
  printf '%q ' "${submission[@]}"
  echo
else
  "${submission[@]}"
fi
