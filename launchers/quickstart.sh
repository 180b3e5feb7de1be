#!/usr/bin/env bash
# Sets up a fresh machine and runs the main job on its CPU: real English text -> C4 shards -> tokenizer -> packed corpus
# -> the same model with and without pauses -> curves -> the pause model as a Hugging Face folder, prompted both ways.
# The same command resumes where it stopped. SIGTERM or Ctrl-C stops it with a checkpoint.
#
#   bash launchers/quickstart.sh [FOLDER] [KEY=VALUE ...]     default folder: runs/quickstart
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    *=* | "") folder=runs/quickstart ;;
    *) folder=$1; shift ;;
esac
EXTRAS=quickstart source launchers/setup.sh

ranks=${RANKS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
# A free port: another run may use the default one.
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
stage() { printf '\n== %s\n' "$*"; }
# The folder's name may hold any character: quoted for a glob, for a YAML list, and for commands to copy.
shards="${folder//\[/[[]}/shards/c4-train.*.json.gz"
quote="'"
prefix="['${folder//$quote/$quote$quote}/english']"
shown=$(printf %q "$folder")

stage "English text in C4's own layout"
run python launchers/english_shards.py --output "$folder/shards" --shards 4

stage "tokenizer: SentencePiece BPE, 4096 pieces"
[ -e "$folder/tokenizer.model" ] ||
    run pause-megatron train-tokenizer --input "$shards" --vocab-size 4096 \
        --output "$folder/tokenizer.model"

stage "corpus: .bin, .idx and manifest, <pause> reserved"
# After the folder was moved, the corpus names shards at other paths: it is used as it is.
[ -e "$folder/english.manifest.json" ] ||
    run pause-megatron prepare --input "$shards" --tokenizer "$folder/tokenizer.model" --output "$folder/english"

for variant in std pause; do
    stage "pretraining: $variant, $ranks ranks"
    run deepspeed --quiet --num_gpus "$ranks" --master_port "$(free_port)" --module pause_megatron pretrain \
        --recipe "tiny-$variant" "data.prefix=$prefix" "run.dir=$folder/$variant" "$@"
done

stage "export: the pause model as a Hugging Face folder, compared with the native one"
# A model folder older than the newest checkpoint belongs to an earlier run.
if [ ! "$folder/model/config.json" -nt "$folder/pause/checkpoints/latest/manifest.json" ]; then
    rm -rf "$folder/model"
    run pause-megatron export-hf "$folder/pause" "$folder/model"
fi
run pause-megatron plot "$folder/std" "$folder/pause" --output "$folder/curves.png"

for pauses in 0 10; do
    stage "generate: one prompt, followed by $pauses pauses"
    run pause-megatron generate --model "$folder/model" --prompt "My fellow citizens," --pauses "$pauses" \
        --max-new-tokens 40 --temperature 0.7 --top-p 0.9
done

stage "done"
cat <<EOF
What to expect: a model of 1.4 M parameters that has read 1 M tokens writes words of speeches that make no sense. It does
not use its pauses: its held-out loss without them is the same (without_pauses above, in nats a token). Goyal et al.
(ICLR 2024) report gains with 130 M and 1 B parameters, 200 B tokens, and finetuning with pauses as well.

  $folder/curves.png                    losses of the two runs
  $folder/model/                        the pause model: transformers and vLLM load it
  pause-megatron generate --model $shown/model --pauses 10 --prompt "..."
  tensorboard --logdir $shown          losses, rates, windows with their pauses
  $folder/pause/metrics.jsonl           one line a step
  $folder/pause/checkpoints/latest/     the newest checkpoint: fp32 state as safetensors, with digests
EOF
[ -n "${NO_SETUP:-}" ] || echo "The programs are in $venv/bin"
