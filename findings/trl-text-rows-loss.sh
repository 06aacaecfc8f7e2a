#!/usr/bin/env bash
# TRL 1.16: SFTTrainer on plain text reports, and trains on, a loss that is smaller than the mean over the predicted tokens.
#
# Seen with trl 1.16.0, transformers 5.24.0, torch 2.13.0 and a GPT-2 of random weights, two rows of text, one step, defaults otherwise:
# the sum over the predicted tokens is divided by the number of labels, in which the first token of every row is counted although nothing
# predicts it. The logged loss is the true mean times (tokens - rows) / tokens. The shorter the rows, the larger the difference.
# Who meets it: whoever compares the loss with another trainer's, or takes its exponential for a perplexity.
# Output seen on Python 3.11 (the losses themselves vary with the processor in their last digits):
#   tokens 12, rows 2, logged / true mean = 0.8333, (tokens - rows) / tokens = 0.8333
# Exits with 1 when the ratio is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install "torch==2.13.0"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install "trl==1.16.0" "transformers==5.24.0"
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'EOF' 2>"$work/stderr" | tee "$work/seen" || { tail -20 "$work/stderr"; exit 1; }
import torch, transformers, trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

words = "one two three four five six seven eight <end>".split()
base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<end>"))
base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<end>", pad_token="<end>", unk_token="<end>")
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
rows = ["one two three four five six seven", "eight one two"]
ids = [tokenizer(row + " <end>")["input_ids"] for row in rows]
with torch.no_grad():
    nats = [torch.nn.functional.cross_entropy(model(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum").item() for row in ids]
tokens = sum(map(len, ids))
true = sum(nats) / (tokens - len(rows))
settings = trl.SFTConfig(output_dir="out", max_steps=1, use_cpu=True, bf16=False, report_to="none", logging_steps=1, disable_tqdm=True)
trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list([{"text": row} for row in rows]), processing_class=tokenizer)
trainer.train()
logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
print(f"tokens {tokens}, rows {len(rows)}, logged / true mean = {logged / true:.4f}, (tokens - rows) / tokens = {(tokens - len(rows)) / tokens:.4f}")
EOF
grep -qx 'tokens 12, rows 2, logged / true mean = 0.8333, (tokens - rows) / tokens = 0.8333' <(grep ^tokens "$work/seen")
