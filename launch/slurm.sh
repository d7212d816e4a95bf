#!/usr/bin/env bash
# One run on a SLURM cluster, one task for each GPU:
#
#   bash launch/slurm.sh [--dry-run] [flags for bef_jax.main]
#
# Submits itself; --dry-run prints the command and does nothing else. The same again goes on with
# a run that was stopped. SLURM sends SIGTERM GRACE seconds before the time is up, and before it
# takes the nodes: the run saves on all of them, exits, and is queued again.
#
#   NODES   1 by default      GPUS   of each node, 8 by default     TIME  24:00:00 by default
#   VENV    the environment   GRACE  120 by default                 SBATCH_*  as sbatch understands
#   DEVICE  what the nodes have, as launch/local.sh takes it: cuda by default
#
# Without VENV the environment is launch/local.sh's, which is set up first where that is due.
set -euo pipefail

: "${NODES:=1}" "${GPUS:=8}" "${DEVICE:=cuda}" "${TIME:=24:00:00}" "${GRACE:=120}"

# In the job SLURM runs a copy of this file, so the folder comes from where it was submitted.
if [[ ${BEF_ROOT:-} && ${SLURM_JOB_ID:-} ]]; then
  cd "$BEF_ROOT"
  trap : TERM # this shell outlives the signal; what it starts gets its own
  summary=$(srun --kill-on-bad-exit=1 "${VENV:-${BEF_VENV:-$BEF_ROOT/.venv}}/bin/python" -P -m bef_jax.main \
    "$@" | tee /dev/stderr | tail -n 1)
  # A stopped run exits with 0 like one that is done, but was not evaluated.
  if [[ $summary == *'"valid": null'* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit
fi

BEF_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export BEF_ROOT
call=()
dry_run=
if [[ ${1:-} == --dry-run ]]; then
  call=(printf '%q ')
  dry_run=yes
  shift
fi
# The device is named, since this node may have no GPU by which the set-up would know.
if [[ ! ${VENV:-} ]]; then
  bash "$BEF_ROOT/launch/local.sh" ${dry_run:+--dry-run} "--device=$DEVICE" setup
fi
# No --gpus-per-task: JAX picks each task's GPU by its number, so a task must see all of a node's.
# The array is asked for first, since bash before 4.4 takes an empty one for one that is not set.
${call[@]+"${call[@]}"} sbatch --job-name=bef_jax "--nodes=$NODES" "--ntasks-per-node=$GPUS" \
  "--gpus-per-node=$GPUS" "--time=$TIME" --requeue --open-mode=append "--signal=TERM@$GRACE" \
  --export=ALL "$BEF_ROOT/launch/slurm.sh" "$@"
if ((${#call[@]})); then echo; fi
