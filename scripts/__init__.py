"""Commands: parse, build, call. Process defaults live here because they must precede `import torch`.

OpenMP threads that spin while they wait are fast on an idle machine and ruinous on a busy one; threads that sleep at
once are slow on both. 2,000 spins, some microseconds, cost little on either. A decoded token needs the threads every
few dozen microseconds, for milliseconds: commands that generate let them spin longer. dev/LOG.md has the measurements.
"""

import os

GIVEN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()  # what is set already wins
GENERATING = 300_000


def spin(turns: int) -> None:
    """How often a waiting thread looks again before it sleeps; before torch is imported."""
    if not GIVEN:
        os.environ["GOMP_SPINCOUNT"] = str(turns)


spin(2_000)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
