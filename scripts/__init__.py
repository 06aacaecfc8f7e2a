"""Commands: parse, build, call. Process defaults live here because they must precede `import torch`.

OpenMP threads that spin while they wait are fast on an idle machine and ruinous on a busy one, so the commands
wait passively unless the environment says otherwise.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
