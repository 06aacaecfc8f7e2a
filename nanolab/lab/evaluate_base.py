"""Evaluate a base model: the modes one after another, each result on disk as it comes; or the checkpoints of runs."""

from contextlib import closing
from pathlib import Path

from nanolab import runtime
from nanolab.cli import UserError, as_json, check_bounds, nearest
from nanolab.evals.checkpoints import follow, picture
from nanolab.evals.config import BaseEvalConfig
from nanolab.evals.core import csv_lines
from nanolab.evals.curve import drawing
from nanolab.evals.likelihood import check_finite
from nanolab.evals.modes import MODES
from nanolab.evals.probes.common import Given, measure_probes, token_limit
from nanolab.evals.record import merge_base
from nanolab.evals.samples import PROMPTS, Continuation, continue_prompts, one_line, unconditioned
from nanolab.files import write_text
from nanolab.lab.evaluate_text import bpb_table, measure_text, open_text, split_tokens, text_bpb
from nanolab.lab.subject import Subject, of_folder, of_run, pretraining
from nanolab.lab.suite import Suite
from nanolab.records.models import find_model, read_json
from nanolab.runtime import Runtime, print0


def evaluate_base(cfg: BaseEvalConfig) -> int:
    """Evaluate what `cfg` says, print and record it; returns 1 where something could not be had, else 0.

    Raises UserError for flags, models and files that do not fit.
    """
    modes = [mode.strip() for mode in cfg.modes.split(",") if mode.strip()]
    for mode in modes:
        if mode not in MODES:
            raise UserError(
                f"mode {mode!r} is unknown; expected one or more of"
                f" {', '.join(MODES)}{nearest(mode, list(MODES), prefix='--modes ')}"
            )
    if cfg.hf and (cfg.model or cfg.all_checkpoints):
        raise UserError(
            f"--hf {cfg.hf} with {'--all-checkpoints' if cfg.all_checkpoints else f'--model {cfg.model}'}; expected one"
            " of them; leave one out"
        )
    if cfg.hf and (probes := [mode for mode in modes if MODES[mode].probe]):
        raise UserError(
            f"--hf {cfg.hf} with the probe {probes[0]}; expected a run of nanolab, whose layers probes look into; name"
            " one with --model (scripts.import_hf makes a run of a GPT-2)",
            "probe-of-a-run",
            probe=probes[0],
        )
    check_bounds(type(cfg), vars(cfg))
    evaluate = evaluate_checkpoints if cfg.all_checkpoints else evaluate_model
    with closing(runtime.start(cfg.device_type, seed=cfg.seed)) as rt:
        return evaluate(cfg, modes, Suite(cfg, modes, rt), rt)


def evaluate_model(cfg: BaseEvalConfig, modes: list[str], suite: Suite, rt: Runtime) -> int:
    subject = of_folder(cfg, rt) if cfg.hf else of_run(cfg, find_model(cfg.model), rt)
    check_finite(subject.model, subject.tokenizer, rt.device, subject.about["model"])
    result = dict(subject.about)

    def keep(found: dict) -> None:
        """What is found is on disk from here on, whatever ends the evaluation."""
        result.update(found)
        if rt.is_main:
            save_base(subject.folder, result)

    if "bpb" in modes:
        keep(measure_text(cfg, subject, rt))
        print0(*bpb_table(result), sep="\n")
    if "sample" in modes and rt.is_main:
        keep(draw_samples(cfg, subject, rt))
    probes = [mode for mode in modes if MODES[mode].probe]
    for name in probes:  # before `reader`, which prepares the model for inference
        keep({name: measure_probe(cfg, name, subject, rt)})
    reader = subject.reader() if suite.modes else None
    for mode in suite.modes:
        try:
            keep(
                {
                    mode: suite(
                        mode, reader, subject.tokenizer, subject.about["dtype"], lambda found: keep({mode: found})
                    )
                }
            )
        except UserError as error:
            keep({mode: {"failed": {mode: str(error)}}})
            print0(f"failed: {mode}: {error}")
    print0(
        f"written: {subject.folder / 'eval_base.json'}",
        *([f"written: {subject.folder / 'eval_base.csv'}"] if "core" in suite.modes else []),
        sep="\n",
    )
    if cfg.json:
        print0(as_json(result, "the result"))
    rt.barrier()
    return 1 if any(result[mode].get("failed") for mode in [*probes, *suite.modes]) else 0


def measure_probe(cfg: BaseEvalConfig, name: str, subject: Subject, rt: Runtime) -> dict:
    """What a probe finds of the model on its validation text, and its settings."""
    data = open_text(cfg, subject.pretraining)[1]
    of_tasks = None, cfg.eval_bundle, cfg.max_per_task
    given = Given(subject.model, subject.tokenizer, rt, data.val, cfg.probe_tokens, cfg.device_batch_size, *of_tasks)
    found = measure_probes([name], given)[name]
    return found | {"settings": probe_settings(cfg, name, data.val_fingerprint, rt), "device": rt.device_name}


def probe_settings(cfg: BaseEvalConfig, name: str, text: str, rt: Runtime) -> dict:
    """All that shapes what a probe finds, beside the weights."""
    asked = {"eval_bundle": cfg.eval_bundle, "max_per_task": cfg.max_per_task} if name == "gold" else {}
    return {"text": text, "tokens": token_limit(cfg.probe_tokens, rt), "dtype": rt.dtype_name} | asked


def draw_samples(cfg: BaseEvalConfig, subject: Subject, rt) -> dict:
    """What the model writes, printed; of a model from elsewhere only greedy continuations."""
    model, tokenizer = subject.model, subject.tokenizer
    if cfg.hf:
        greedy = [
            Continuation(prompt, tokenizer.decode(model.greedy([tokenizer.bos, *tokenizer.encode(prompt)], 16)))
            for prompt in PROMPTS
        ]
    else:
        greedy = continue_prompts(model, tokenizer, rt)
    drawn = [] if cfg.hf else unconditioned(model, tokenizer, rt, seed=cfg.seed)
    print0("greedy continuations", *map(one_line, greedy), sep="\n")
    if drawn:
        print0("from nothing, temperature 1", *(f"  {text!r}" for text in drawn), sep="\n")
    return {"samples": [sample._asdict() for sample in greedy], "unconditioned": drawn}


def save_base(folder: Path, result: dict) -> None:
    """eval_base.json, with what earlier evaluations found beside it; and CORE as CSV, which is of the same weights."""
    path, table = folder / "eval_base.json", folder / "eval_base.csv"
    folder.mkdir(parents=True, exist_ok=True)
    whole = merge_base(read_json(path) if path.exists() else {}, result)
    write_text(path, as_json(whole, "eval_base.json", indent=1) + "\n")
    if "core" in whole and "tasks" in whole["core"]:
        write_text(table, "\n".join(csv_lines(whole["core"])) + "\n")
    else:
        table.unlink(missing_ok=True)


def evaluate_checkpoints(cfg: BaseEvalConfig, modes: list[str], suite: Suite, rt: Runtime) -> int:
    """Every checkpoint of one or several runs, and a curve for each mode that has a score."""

    def settings(mode: str, found) -> dict:
        if MODES[mode].questions:
            return suite.settings(mode, rt.dtype_name)
        text = open_text(cfg, pretraining(found))[1].val_fingerprint
        if MODES[mode].probe:
            return probe_settings(cfg, mode, text, rt)
        return {"text": text, "tokens": split_tokens(cfg, rt), "dtype": rt.dtype_name}

    def measure(mode: str, subject: Subject) -> dict:
        if MODES[mode].questions:
            return suite(mode, subject.reader(), subject.tokenizer, rt.dtype_name)
        if MODES[mode].probe:
            return measure_probe(cfg, mode, subject, rt)
        return text_bpb(cfg, subject, [(open_text(cfg, subject.pretraining)[1].val, split_tokens(cfg, rt))], rt)

    # probes first: the reader of questions prepares the model for inference
    wanted = sorted((mode for mode in modes if MODES[mode].ylabel), key=lambda mode: not MODES[mode].probe)
    if not wanted:
        raise UserError(
            f"--modes {cfg.modes} with --all-checkpoints, but no score among them; expected one or more of"
            f" {', '.join(name for name, mode in MODES.items() if mode.ylabel)}; try --modes core"
        )
    drawing()  # found out before the evaluation, not behind it
    if "@" in cfg.model:
        raise UserError(
            f"--model {cfg.model} with --all-checkpoints, but a step in it; expected names of runs; leave @STEP or"
            " --all-checkpoints out"
        )
    runs = [find_model(name.strip()) for name in cfg.model.split(",")]
    if len({found.name for found in runs}) < len(runs):
        raise UserError(f"--model {cfg.model} names a run twice; expected each once; leave one out")
    points, failed = follow(runs, wanted, lambda found: of_run(cfg, found, rt), settings, measure, rt)
    folder = Path(cfg.out).expanduser() if cfg.out else runs[0].run_dir
    if rt.is_main:
        for mode, found in points.items():
            if picture(mode, found, folder):
                print0(f"written: {folder / f'curve_{mode}.svg'} and .csv")
        print0(*(f"failed: {why}" for why in failed), sep="\n" if failed else "", end="\n" if failed else "")
        if cfg.json:
            print0(
                as_json(
                    {
                        "curves": {mode: [point._asdict() for point in found] for mode, found in points.items()},
                        "failed": failed,
                    },
                    "the result",
                )
            )
    rt.barrier()
    return 1 if failed else 0
