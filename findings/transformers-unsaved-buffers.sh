#!/usr/bin/env bash
# transformers 5.24: from_pretrained gives a buffer that is not saved (persistent=False) uninitialised memory instead of what __init__ put there,
# unless the class's _init_weights fills it again. Nothing is reported.
#
# Seen with transformers 5.24.0 and torch 2.13.0 on a custom PreTrainedModel whose __init__ registers arange as such a buffer and whose _init_weights
# does nothing: the model is built with the right values and loaded with others, the weights are right, and output_loading_info lists nothing.
# Loading builds the model on the meta device, where the values of such a buffer are lost. Who meets it: whoever keeps tables (slopes, angles,
# masks) in buffers that are not saved and computes them in __init__, as plain torch modules do.
# Output seen:
#   built: True, loaded: False, weights loaded: True, reported: []
# Exits with 1 when another line comes out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install "torch==2.13.0"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install "transformers==5.24.0"
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'EOF' 2>"$work/stderr" | tee "$work/seen" || { tail -20 "$work/stderr"; exit 1; }
import tempfile, torch, transformers
from torch import nn

class Config(transformers.PretrainedConfig):
    model_type = "scaled"

class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(2, 2)
        self.register_buffer("scale", torch.arange(1.0, 10001.0), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        pass

with tempfile.TemporaryDirectory() as folder:
    made = Model(Config())
    made.save_pretrained(folder)
    read, told = Model.from_pretrained(folder, output_loading_info=True)
print(f"built: {torch.equal(made.scale, torch.arange(1.0, 10001.0))}, loaded: {torch.equal(read.scale, torch.arange(1.0, 10001.0))}, "
      f"weights loaded: {torch.equal(made.linear.weight, read.linear.weight)}, reported: {sorted(k for k, v in told.items() if v)}")
EOF
grep -qx 'built: True, loaded: False, weights loaded: True, reported: \[\]' <(grep ^built "$work/seen")
