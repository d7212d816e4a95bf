#!/usr/bin/env bash
# Trains on real patches, and checks slides that are composed of them from end to end:
#
#   bash results/composed_slide.sh PATCHES [FOLDER [RUN]]
#
# PATCHES has train.npz and valid.npz of 96 px at 0.972 um/px, with ids; the slides are composed of
# valid's. FOLDER (default: a temporary one, which is removed) gets the slides and all that is made
# of them. RUN is a run on PATCHES; without it, Lite0 is trained for one epoch, which takes minutes
# on two CPU cores and needs the extra [weights]. Slides need the extra [slides]. Run it from the
# repository's root.
#
# It prints a line of JSON for each step: the windows at a stride of 96 beside their patches, the
# slides at a stride of 32, FROC with each form of the truth, and the patches that the source slides
# draws. What is already in FOLDER is used again.
set -euo pipefail

patches=${1:?name the folder of train.npz and valid.npz} folder=${2:-} run=${3:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
fi
bef() { python -m bef_jax.main "$@" | tail -1; }

if [[ -z $run ]]; then
  run=$folder/run
  bef --config=configs/lite0.py --workdir="$run" --config.epochs=1 --config.model.total_stride=32 \
    --config.data.source=npz --config.data.dir="$patches" --config.data.mpp=0.972
fi
if [[ ! -e $folder/cells.csv ]]; then
  python results/composed_slide.py compose "$folder" --patches="$patches/valid.npz"
fi
best=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['best_step'])" \
  "$run/train_summary.json")
for stride in 96 32; do
  bef --mode=predict --workdir="$folder/stride_$stride" --config.predict.stride=$stride \
    --checkpoint="$run/checkpoints/$best" --input="$folder/slides" --config.data.mpp=0.972
done
python results/composed_slide.py compare "$folder" --slides="$folder/stride_96" \
  --scores="$run/scores_valid.csv"
for form in mask xml geojson; do
  bef --mode=froc --workdir="$folder/stride_32" --truth="$folder/truth_$form"
done
bef --mode=prepare --config=configs/lite0.py --workdir="$folder/prepare" \
  --config.data.source=slides --config.data.dir="$folder/slides" \
  --config.data.annotations="$folder/truth_xml" --config.data.slide_patches=6000 \
  --config.data.split_ratio='(0.5, 0.5, 0.0)' --config.data.store="$folder/store"
python results/composed_slide.py labels "$folder" --store="$folder/store"
