"""Write the card of a model: python -m scripts.report [--model NAME] [--price-per-hour P]. Every number comes from the
records of its runs. With --site DIR: a static site of all studies, models and runs; --watch makes it again and again.

A base model's page says how good it is beside compressors; a chat model's what each stage brought, what it says and
what it cost. The numbers of the page are kept in card.json in the run directory."""

from pathlib import Path

from nanolab.cli import main, parse
from nanolab.evals.config import ReportConfig
from nanolab.terminal import harmless


def run(cfg: ReportConfig) -> int:
    if cfg.site:
        from nanolab.lab.site import write_site

        write_site(cfg)
        return 0
    from nanolab.lab.report import write_report

    print(harmless(write_report(cfg)))  # it has samples of the model's
    print(f"report: {Path(cfg.output).resolve()}")
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(ReportConfig)))
