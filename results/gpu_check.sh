#!/usr/bin/env bash
# Checks and times the package on a GPU; run it from the repository's root:
#
#   OUT=DIR bash results/gpu_check.sh [SECONDS [FLAGS of gpu_check.py]]
#
# It writes at most eight small files to DIR; log.txt has what it printed. Within 15 minutes there
# is time for two calls. The first one gives the ratio to timm. The second one finds what the first
# one compiled, if it runs on the same machine:
#
#   OUT=first bash results/gpu_check.sh 440
#   OUT=second bash results/gpu_check.sh 240 \
#     --stages=numeric,micro,b3_calls16,b0,timm_b0,b0_nograph,b3_b1024,timm_b3_b1024
#
# A machine without a network may lack packages. The folder WHEELS (default: .whl) can hold their
# wheels, which are installed into a temporary folder. Without it, all packages must be there.
# PYTHON is the interpreter (default: python3). The project itself need not be installed.
set -euo pipefail

: "${OUT:?name a folder for the results, such as OUT=gpu_check}"
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} seconds=${1:-440}
site=${TMPDIR:-/tmp}/gpu_check/site
mkdir -p "$OUT"
if [[ -d $wheels ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
# An installation maps configs/ to bef_jax.configs. In a mere checkout, a link does.
if ! "$python" -c 'import bef_jax.configs' 2>/dev/null; then
  ln -s ../configs bef_jax/configs
  trap 'rm bef_jax/configs' EXIT
fi
# It ends by itself in time; `timeout` is for a GPU that answers no more.
timeout --kill-after=5 $((seconds + 15)) \
  "$python" results/gpu_check.py run --out="$OUT" --seconds="$seconds" "${@:2}" 2>&1 |
  tee -a "$OUT/log.txt"
