"""Commands: parse, build, call. Process defaults live here because they must precede `import torch`.

OpenMP threads that spin while they wait are fast on an idle machine and ruinous on a busy one; threads that sleep at
once are slow on both. 2,000 spins, some microseconds, cost little on either: dev/LOG.md has the measurement.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
