"""The commands of the lab: run, check, sweep, verdict, page, try, compare, threshold. Each prints, last one JSON
document, and returns an exit code.
"""

import shlex
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanolab.cli import UserError, as_json
from nanolab.files import write_text
from nanolab.lab.config import CompareConfig, LabConfig, TryConfig
from nanolab.lab.results import check_unedited, hash_of, number_at, read_results, write_results
from nanolab.lab.study import folder_of, read_seeds, read_study, study_of, to_toml


def lab(cfg: LabConfig) -> int:
    """The command `cfg.what` on a study's file, or on runs.

    Exit code of verdict: see `exit_code`; of run: 1 where runs are missing; of check: 4 where the study's seeds do
    not suffice; of sweep: 1 where runs are missing; of threshold: 4 where the mean is not shown to be past the bar;
    otherwise 0. Raises UserError."""
    if cfg.what not in ("run", "check", "verdict", "page", "sweep", "threshold") or not cfg.study:
        raise UserError(
            f"lab {cfg.what} {cfg.study or 'without a study'}: expected run, check, sweep, verdict or page and a"
            " study's file, try and flags, compare and two revisions, or threshold and runs; try"
            " python -m scripts.lab run STUDY.toml",
            "lab-command",
            what=cfg.what,
        )
    if cfg.what == "threshold":
        return lab_threshold(cfg)
    path = Path(cfg.study)
    study = read_study(path)
    scale = study.scale(cfg.scale)
    folder = folder_of(study, path, scale)
    if cfg.what in ("verdict", "page"):
        record, rows = read_results(folder)
        check_unedited(record, rows, study.fixed(scale), study.seeds, folder)
        if rows and record != (now := study.outside(record)):
            write_results(folder, now, rows)
    elif cfg.what == "sweep":
        from nanolab.lab.sweep import sweep_study

        check_unedited(*read_results(folder), study.fixed(scale), study.seeds, folder)
        found = sweep_study(study, folder, scale, cfg.jobs, cfg.slurm)
        print(as_json(found, "the result"))
        return 1 if found["missing"] else 0
    else:
        from nanolab.lab.runner import check_study, run_study

        if cfg.what == "check":
            document = check_study(study, folder, scale)
            print(as_json(document, "the result"))
            return 0 if document["enough"] else 4
        run_study(study, folder, scale, cfg.jobs, cfg.slurm)

    document, code = say_verdict(folder)
    return code if cfg.what == "verdict" else int(cfg.what == "run" and bool(document["missing"]))


def say_verdict(folder: Path) -> tuple[dict[str, Any], int]:
    """Write the page of a folder of results and print its verdict: (the document, the verdict's exit code)."""
    from nanolab.lab.page import write_page
    from nanolab.lab.verdict import exit_code

    document, lines = write_page(folder)
    print("\n".join(["", *lines, "", f"table: {folder / 'table.md'}", f"page: {folder / 'index.html'}"]))
    print(as_json(document, "the result"))
    return document, exit_code(document)


def lab_threshold(cfg: LabConfig) -> int:
    """Whether the mean of runs, or of numbers as they are typed, is past a bar: a one-sided t-test at 5 %."""
    from nanolab.lab.stats import threshold

    words = [word.strip() for word in cfg.study.split(",")]
    values = [value_of(word, cfg.metric) for word in words]
    found = threshold(values, above=cfg.above, below=cfg.below)
    side, bar = ("above", cfg.above) if cfg.below is None else ("below", cfg.below)
    print(f"values          {', '.join(f'{value:g}' for value in values)}")
    print(
        f"mean            {found.mean:.6g} [{found.low:.6g}, {found.high:.6g}] (90 %), sd {found.sd:.3g}, n = {found.n}"
    )
    print(
        f"{side} {bar:<10g}{'yes' if found.reached else 'not shown'}: t = {found.t:.2f}, p = {found.p:.2g} (one-sided)"
    )
    print(as_json({"runs": words, side: bar, **asdict(found)}, "the result"))
    return 0 if found.reached else 4


def value_of(word: str, metric: str) -> float:
    """A number as it is typed, or the metric of a finished run. Raises UserError."""
    from nanolab.records.models import read_json, runs_dir

    with suppress(ValueError):
        return float(word)
    path = runs_dir() / word / "result.json"
    result = read_json(path) if word and path.exists() else None
    value = number_at(result, metric) if result is not None else None
    if value is None:
        seen = "has no finished run of that name" if result is None else f"has no {metric} in its result"
        raise UserError(
            f"{word!r}: {runs_dir() if result is None else path} {seen}; expected numbers or names of finished runs,"
            " joined by commas; try lab threshold .2584,.2568,.2573 --above .2565",
            "threshold-value",
            word=word,
            metric=metric,
        )
    return value


def lab_try(cfg: TryConfig, both: list[str]) -> int:
    """Write the study of one idea into the base directory, and run it; the same words find the same study.

    both: flags of the idea and of what it is compared with."""
    from nanolab.runtime import base_dir

    values = {"arms": {"baseline": cfg.against, "idea": cfg.idea}, "baseline": "baseline", "matters": cfg.matters}
    values |= {"question": f"{cfg.idea or 'the defaults'} against {cfg.against or 'the defaults'}"}
    values |= {"flags": shlex.join(both), "results": "."}
    path = base_dir() / "lab" / f"try-{hash_of(values)[:8]}" / "study.toml"
    write_text(path, to_toml(study_of(values | {"seeds": read_seeds(cfg.seeds)}, "lab try")))
    print(f"study           {path}")
    return lab(LabConfig("run", str(path), jobs=cfg.jobs))


def lab_compare(cfg: CompareConfig, flags: list[str]) -> int:
    """Two revisions of the code, each with these flags of scripts.base_train. Exit code of the verdict on the second.
    Raises UserError."""
    from nanolab.lab.compare import compare

    return say_verdict(compare(cfg, flags))[1]
