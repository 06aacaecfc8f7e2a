"""TRL's SFTTrainer on an exported folder, with its defaults: its loss is ours, of the rows and tokens that we train on,
and it learns.
"""

import pytest
import torch

from nanolab.data.chat import render
from nanolab.data.tokenizer import Tokenizer
from nanolab.interop import export
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.presets import GPT2

pytestmark = [pytest.mark.slow, pytest.mark.fault("S13")]
TEXT = "the crow saw the cheese and took it. The fox said: three times four is 12, isn't it?\n\tA\u00e9\U0001f600 " * 3
DEFAULT = GPTConfig(sequence_len=64, vocab_size=285, n_layer=2, n_head=2, n_embd=32)
SQUARE = GPTConfig(
    **{name: value for name, value in GPT2.items() if name in GPTConfig.__dataclass_fields__}
    | dict(sequence_len=64, vocab_size=285, n_layer=2, n_head=2, n_embd=16)
)
CHATS = [
    [{"role": "user", "content": "three times four?"}, {"role": "assistant", "content": "the fox said it"}],
    [
        {"role": "system", "content": "the crow"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "took it."},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "12"},
    ],
]


@pytest.fixture(params=[DEFAULT, SQUARE], ids=["own code", "gpt2"])
def made(request, tmp_path):
    """(a function kind -> folder, the model, its tokenizer)."""
    tokenizer, model, g = Tokenizer.train([TEXT], 285), GPT(request.param).eval(), torch.Generator().manual_seed(0)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))

    def folder(kind):
        export.write_export(tmp_path, model, tokenizer, kind)
        return tmp_path

    return folder, model, tokenizer


def nats(model, rows):
    """Mean over the rows' tokens of mask 1."""
    with torch.no_grad():
        found = [
            model(
                torch.tensor([ids[:-1]]),
                torch.tensor([[i if m else -1 for i, m in zip(ids, mask)][1:]]),
                reduction="none",
            )[0]
            for ids, mask in rows
        ]
    return (sum(x.sum() for x in found) / sum(sum(mask[1:]) for _, mask in rows)).item()


def trained(folder, rows, out, **settings):
    """(the step's loss, how far the weights moved)."""
    import datasets
    import transformers
    import trl

    args = trl.SFTConfig(
        output_dir=str(out),
        max_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    if (folder / export.CODE).exists():
        args.model_init_kwargs = {"trust_remote_code": True}
    trainer = trl.SFTTrainer(model=str(folder), args=args, train_dataset=datasets.Dataset.from_list(rows))
    assert trainer.args.gradient_checkpointing
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = sum((p.detach() - before[name]).abs().sum().item() for name, p in trainer.model.named_parameters())
    trainer.save_model(str(out / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(out / "saved", trust_remote_code=True)
    for name, p in again.named_parameters():
        assert torch.equal(p, trainer.model.get_parameter(name)), name
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), moved


def test_conversations(made, tmp_path):
    """assistant_only_loss counts what chat_sft counts."""
    folder, model, tokenizer = made
    want = nats(model, [render(tokenizer, chat) for chat in CHATS])
    loss, moved = trained(
        folder("sft"), [{"messages": chat} for chat in CHATS], tmp_path / "out", assistant_only_loss=True, packing=False
    )
    assert loss == pytest.approx(want, abs=2e-4) and moved > 0


def test_prompts_and_completions(made, tmp_path):
    folder, model, tokenizer = made
    rows = []
    for chat in CHATS:
        ids, start = render(tokenizer, chat).ids, len(render(tokenizer, chat[:-1]).ids) + 1  # with assistant_start
        rows.append((ids, [0] * start + [1] * (len(ids) - start)))
    loss, moved = trained(
        folder("sft"), [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS], tmp_path / "out"
    )
    assert loss == pytest.approx(nats(model, rows), abs=2e-4) and moved > 0


def test_texts_on_a_base_model(made, tmp_path):
    """TRL ends each text with the token that ends it in generation."""
    folder, model, tokenizer = made
    texts = ["the crow saw the cheese", "The fox said: three"]
    rows = [(ids := [*tokenizer.encode(text), tokenizer.bos], [1] * len(ids)) for text in texts]
    loss, moved = trained(folder("base"), [{"text": text} for text in texts], tmp_path / "out")
    labels = sum(len(ids) for ids, _ in rows)
    # transformers' own classes divide by all labels, also those of first tokens, which nothing predicts
    share = 1 if export.brings_code(model) else (labels - len(rows)) / labels
    assert loss == pytest.approx(nats(model, rows) * share, abs=2e-4) and moved > 0
