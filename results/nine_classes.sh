#!/usr/bin/env bash
# Trains on nine kinds of drawn tissue at 224 px, and prints the macro AUC of the test patients:
#
#   bash results/nine_classes.sh [FOLDER]
#
# It takes some minutes on two CPU cores, from the repository's root, with the extra [weights].
# FOLDER (default: a temporary one, which is removed) gets the pictures and the run; what is already
# there is used again. The windows of 128 px take a third of the time of whole patches, which
# evaluation sees. A logistic regression on each patch's mean colour has a macro AUC of 0.92, and 0.96
# with its standard deviation, so a network has to be above that.
set -euo pipefail

folder=${1:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
fi
if [[ ! -d $folder/patches ]]; then
  # The products of drawing are small: with a thread for each core they take six times the CPU time.
  OPENBLAS_NUM_THREADS=1 python -c "
import sys
from tests.tissue_kinds import write_folder
write_folder(sys.argv[1], patches_per_class=120, groups=20, suffix='.jpg')" "$folder/patches"
fi
python -m bef_jax.main --config=configs/lite0.py --workdir="$folder/run" \
  --config.data.source=image_folder --config.data.dir="$folder/patches" \
  --config.data.group='(?P<group>P\d+)_' --config.data.split_ratio='(0.6, 0.2, 0.2)' \
  --config.data.patch_size=224 --config.data.mpp=0.5 --config.model.num_classes=9 \
  --config.rcc.enabled --config.rcc.center=0 --config.rcc.min_size=128 --config.rcc.max_size=128 \
  --config.model.total_stride=32 --config.batch_size=32 --config.steps=40 \
  --config.eval.every_epochs=9 --config.eval.batch_size=32 >/dev/null
python -c "
import json, sys
test = json.load(open(sys.argv[1]))['test']
print(f\"{test['n']} test patches: macro AUC {test['auc']:.4f}, accuracy {test['accuracy']:.4f}\")
" "$folder/run/train_summary.json"
