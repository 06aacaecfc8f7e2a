"""Write the card of a model: python -m scripts.report [--model NAME] [--price-per-hour P]. Every number comes from the
records of its runs.

A base model's page says how good it is beside compressors; a chat model's what each stage brought, what it says and
what it cost. The numbers of the page are kept in card.json in the run directory."""

from pathlib import Path

from nanolab.cli import UserError, as_json, check_bounds, main, parse
from nanolab.evals.config import ReportConfig
from nanolab.terminal import harmless


def run(cfg: ReportConfig) -> int:
    from nanolab.evals.card import card, chain
    from nanolab.files import write_text
    from nanolab.lab.report import report
    from nanolab.records.models import find_model

    check_bounds(type(cfg), vars(cfg))
    found = find_model(cfg.model)
    stages = chain(found)
    numbers = card(stages, cfg.price_per_hour)
    text = "\n".join(report(found, stages, numbers))
    for path, content in (
        (found.run_dir / "card.json", as_json(numbers, "card.json", indent=1) + "\n"),
        (found.run_dir / "report.md", text),
        (Path(cfg.output), text),
    ):
        try:
            write_text(path, content)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; expected a place for the report; try --output FILE"
            ) from None
    print(harmless(text))  # it has samples of the model's
    print(f"report: {Path(cfg.output).resolve()}")
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(ReportConfig)))
