#!/usr/bin/env bash
# From a fresh clone to a model that answers, on a laptop.
#
#   bash runs/quickstart.sh                        about 5 minutes after installation
#   NANOLAB_SCALE=toy bash runs/quickstart.sh      the same commands, about a minute; the model is no good
#
# Hardware  2 CPU cores, 3 GB of memory, 3 GB of disk; Python 3.10 or newer; a package registry for the installation
# Expect    bits per byte on held-out documentation clearly below gzip -9, bz2 -9 and xz -9e on the same text: 1.49 beside
#           2.73, 2.01 and 2.08 after 4 min 37 s, installation included, on 2 cores of an AMD EPYC that computes bf16
#           (commit 0f635b5, one run; a slower or busier machine trains on fewer tokens in the same 180 s)
#
# A second run reuses what is there. Everything is written under NANOLAB_BASE_DIR (default ~/.cache/nanolab).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${NANOLAB_SCALE:-default} in
default)
    name=quickstart time="about 5 minutes"
    vocabulary=(--vocab-size 4096 --max-chars 8000000)
    model=(--depth 4 --aspect-ratio 32 --head-dim 64 --max-seq-len 256)
    training=(--device-batch-size 8 --total-batch-size 2048 --lr-scale 1 --warmup-steps 20 --max-seconds 180 --eval-every 500 --eval-tokens 65536 --log-every 50)
    ;;
toy)
    name=quickstart-toy time="about a minute"
    vocabulary=(--vocab-size 512 --max-chars 500000)
    model=(--depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 64)
    training=(--device-batch-size 8 --total-batch-size 512 --num-iterations 30 --eval-every 15 --eval-tokens 8192 --log-every 10)
    ;;
*)
    echo "quickstart.sh: NANOLAB_SCALE is ${NANOLAB_SCALE}; expected toy or default" >&2
    exit 2
    ;;
esac
base=${NANOLAB_BASE_DIR:-$HOME/.cache/nanolab}
tokenizer=$base/tokenizers/$name # of its own: another vocabulary in tokenizer/ stays what it is
stage() { printf '\n== %s\n' "$*"; }

echo "nanolab quickstart: corpus, tokenizer, pretraining, evaluation, a reply. $time after installation."
echo "Files go to $base"

stage "1/6 set-up"
bash runs/setup.sh
python=${NANOLAB_PYTHON:-.venv/bin/python}

stage "2/6 corpus: the documentation in this Python installation"
$python -m scripts.data --data pydocs

stage "3/6 tokenizer"
if [ -f "$tokenizer/tokenizer.json" ]; then
    echo "there already: $tokenizer"
else
    $python -m scripts.tok_train --data pydocs --tokenizer "$tokenizer" "${vocabulary[@]}"
fi

stage "4/6 pretraining"
$python -m scripts.base_train --run $name --resume --data pydocs --tokenizer "$tokenizer" \
    "${model[@]}" "${training[@]}" --sample-every -1 --save-every 500

stage "5/6 evaluation"
$python -m scripts.base_eval --model $name --split-tokens 524288

stage "6/6 a reply, and the report"
echo "> This function returns"
$python -m scripts.chat_cli --model $name -p "This function returns" --max-tokens 48
$python -m scripts.report --model $name
echo
echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
