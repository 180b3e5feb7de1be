#!/usr/bin/env bash
# Sets up a fresh machine and runs the main job on its CPU: real English text -> C4 shards -> tokenizer -> packed corpus
# -> the same model with and without pauses -> TensorBoard and a picture. Run it again and it goes on where it stopped.
#
#   bash launchers/quickstart.sh [FOLDER] [KEY=VALUE ...]     default folder: runs/quickstart
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    *=* | "") folder=runs/quickstart ;;
    *) folder=$1; shift ;;
esac
EXTRAS=quickstart source launchers/setup.sh

ranks=${RANKS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
say() { printf '\n== %s\n' "$*"; }

say "English text in C4's own layout"
python launchers/english_shards.py --output "$folder/shards" --shards 4

say "tokenizer: SentencePiece BPE, 4096 pieces"
[ -e "$folder/tokenizer.model" ] ||
    pause-megatron train-tokenizer --input "$folder/shards/c4-train.*.json.gz" --vocab-size 4096 \
        --output "$folder/tokenizer.model"

say "corpus: .bin, .idx and manifest, <pause> reserved"
pause-megatron prepare --input "$folder/shards/c4-train.*.json.gz" --tokenizer "$folder/tokenizer.model" \
    --output "$folder/english"

for variant in std pause; do
    say "pretraining: $variant, $ranks ranks"
    deepspeed --num_gpus "$ranks" --module pause_megatron pretrain --recipe "tiny-$variant" \
        "data.prefix=$folder/english" "run.dir=$folder/$variant" "$@"
done

say "done"
pause-megatron plot "$folder/std" "$folder/pause" --output "$folder/curves.png"
cat <<EOF
Look at
  $folder/curves.png                      the two runs side by side
  tensorboard --logdir $folder            losses, rates, windows with their pauses (.venv/bin/tensorboard)
  $folder/pause/metrics.jsonl             one line a step
  $folder/pause/checkpoints/latest/       the newest checkpoint: fp32 state as safetensors, with digests
EOF
