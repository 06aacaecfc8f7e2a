#!/usr/bin/env bash
# Everything that needs a GPU, in one go: does FlashAttention 3 load, the tests marked gpu, real steps beside synthetic ones, the
# same steps twice, and the benchmarks of training, generation and evaluation in bf16 at depth 4 and 12.
#
#   bash dev/bench/gpu.sh              results go to dev/results/bench/gpu/, a JSON file for each piece as it ends
#   OUT=/somewhere bash dev/bench/gpu.sh
#   bash dev/bench/gpu.sh --rehearse   the same commands on a CPU in toy sizes, some minutes; set OUT for these results
#
# Hardware  one NVIDIA GPU with bf16 (compute capability 8.0 or newer) and 40 GB; with less: GPU_BATCH=8 bash dev/bench/gpu.sh
# Time      at most ten minutes (--seconds N), most of it compilation. What did not fit is done by the next call
# Expect    kernel, recorded-steps, feeding, twice, other-tests, speed .json; exit code 3 while some are left (dev/bench/gpu.py)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "${NANOLAB_PYTHON:-}" ]; then bash runs/setup.sh test; fi
python=${NANOLAB_PYTHON:-.venv/bin/python}

case " $* " in *" --rehearse "*) ;; *)
    if ! seen=$($python -c 'import torch; print("torch", torch.__version__); raise SystemExit(not torch.cuda.is_available())'); then
        echo "gpu.sh: $seen sees no CUDA device; expected one. On a machine without a GPU: bash runs/test.sh" >&2
        exit 1
    fi
    ;;
esac
exec $python dev/bench/gpu.py --out "${OUT:-dev/results/bench/gpu}" "$@"
