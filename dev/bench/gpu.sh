#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests marked gpu, then the benchmarks of training, generation and evaluation in
# bf16 at depth 4 and 12.
#
#   bash dev/bench/gpu.sh              results go to dev/results/bench/
#   OUT=/somewhere bash dev/bench/gpu.sh
#
# Hardware  one NVIDIA GPU with bf16 (compute capability 8.0 or newer) and 40 GB; with less: GPU_BATCH=8 bash dev/bench/gpu.sh
# Time      a few minutes, most of it compilation
# Expect    gpu-tests.xml, and train-, infer- and eval-d4-gpu.json, and the same for d12, as scripts.bench prints them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-dev/results/bench}
if [ -z "${NANOLAB_PYTHON:-}" ]; then bash runs/setup.sh test; fi
python=${NANOLAB_PYTHON:-.venv/bin/python}

if ! seen=$($python -c 'import torch; print("torch", torch.__version__); raise SystemExit(not torch.cuda.is_available())'); then
    echo "gpu.sh: $seen sees no CUDA device; expected one. On a machine without a GPU: bash runs/test.sh" >&2
    exit 1
fi
mkdir -p "$out"
failed=0

# pytest ends with 5 where no test is marked gpu.
$python -m pytest -m gpu --junitxml="$out/gpu-tests.xml" || { [ $? = 5 ] || failed=1; }

bench() { # what is measured, depth, its flags
    if NANOLAB_DTYPE=bfloat16 $python -m scripts.bench "$1" --json --device-type cuda --depth "$2" --max-seq-len 2048 --vocab-size 32768 \
        --repeats 5 "${@:3}" >"$out/.bench"; then
        sed '$d' "$out/.bench"
        tail -n 1 "$out/.bench" >"$out/$1-d$2-gpu.json"
    else
        failed=1
    fi
    rm -f "$out/.bench"
}

for depth in 4 12; do
    bench train $depth --device-batch-size "${GPU_BATCH:-32}" --steps 10 --warmup 10
    bench infer $depth --prompt-tokens 512 --decode-tokens 256
    bench eval $depth
done
echo "gpu.sh: results in $out"
exit $failed
