"""Write a model as a folder for transformers: python -m scripts.export_hf --model NAME[@STEP|best] --out DIR [--push
USER/NAME].

AutoModelForCausalLM loads it: a gpt2-shaped model as GPT2LMHeadModel, every other with its own code
(trust_remote_code=True). The folder is read back before it gets its name, and its logits compared with the model's."""

from pathlib import Path

from nanolab.cli import UserError, main, parse
from nanolab.interop.config import ExportConfig


def run(cfg: ExportConfig) -> int:
    from nanolab.evals.model_card import model_card
    from nanolab.interop.export import TOLERANCE, check_place, export
    from nanolab.interop.push import check_push, push
    from nanolab.records.models import find_model

    if not cfg.out:
        raise UserError("--out is missing; expected the folder to write; try --out exported")
    out = Path(cfg.out).expanduser()
    check_place(out, cfg.overwrite)
    if cfg.push:
        check_push(cfg.push)
    done = export(find_model(cfg.model), out, model_card, cfg.dtype, cfg.overwrite)
    own = "NanolabForCausalLM, with its code: load it with trust_remote_code=True"
    print(f"exported        {done.folder}: {'GPT2LMHeadModel' if done.native else own}; {done.bytes / 1e6:,.1f} MB")
    checked = "not: transformers is not installed; bash runs/setup.sh hf and export again with --overwrite"
    if done.difference is not None:
        checked = f"transformers reads it: logits differ by {done.difference:.2g} at most (allowed {TOLERANCE:g})"
        checked += ", token ids are equal"
    print(f"checked         {checked}")
    if cfg.push:
        print(f"uploaded        {push(out, cfg.push)}")
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(ExportConfig)))
