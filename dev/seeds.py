"""Several seeds' cards -> one table: python dev/seeds.py CARD.json CARD.json ... [--goal "METRIC>=0.98"] ...

Cards are what scripts.report leaves in a run directory. Per metric and stage: the mean over the seeds with the range
[min, max]; below it the mean of what the stage changed with its 95 % interval over the seeds (Student's t; a point
where all agree). A goal is about the last stage, in the units of card.json (shares, not per cent); "METRIC called<=0"
is about the share of replies that called a tool, and "bits per byte<COMPRESSOR" compares with a compressor on the same
text. The exit code is 1 where a goal is missed."""

import argparse
import json
import math
import operator
import re
import statistics
import sys
from pathlib import Path

from scipy import stats

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def shown(value: float, unit: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if unit == "share" else f"{value:{sign}.4f}"


def interval(values: list[float]) -> tuple[float, float]:
    """95 %, of the mean of 2 or more values."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def cell(rows: list[dict], label: str) -> str:
    """One metric at one stage, over the cards that have it."""
    unit, at = rows[0]["unit"], [row["stages"][label] for row in rows if label in row["stages"]]
    if not at:
        return "-"
    values, effects = [a["value"] for a in at], [a["effect"]["difference"] for a in at if "effect" in a]
    text = f"{shown(statistics.fmean(values), unit)} [{shown(min(values), unit)}, {shown(max(values), unit)}]"
    if len(values) < len(rows):
        text += f" of {len(values)}"
    if len(effects) > 1:
        low, high = interval(effects)
        text += (
            f"<br>{shown(statistics.fmean(effects), unit, '+')} ({shown(low, unit, '+')} to {shown(high, unit, '+')})"
        )
    return text


def table(cards: list[dict]) -> list[str]:
    labels = list(dict.fromkeys(stage["label"] for card in cards for stage in card["stages"]))
    by_metric: dict[tuple, list[dict]] = {}
    for row in (row for card in cards for row in card["metrics"]):
        n = row["n"] if row["unit"] == "share" else None  # other metrics' n is bytes of text
        by_metric.setdefault((row["metric"], row["unit"], n), []).append(row)
    head = [f"{len(cards)} seeds: {', '.join(str(card['seed']) for card in cards)}", *labels]
    rows = [
        [f"{metric}{f' (%, n = {n})' if unit == 'share' else ''}", *(cell(rows, label) for label in labels)]
        for (metric, unit, n), rows in by_metric.items()
    ]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def reached(goal: str, card: dict) -> bool:
    """Whether one card's last stage reaches "METRIC>=0.98"; one that was not measured does not."""
    match = re.fullmatch(r"(.+?)( called)?\s*(>=|<=|>|<)\s*(.+)", goal)
    if not match:
        sys.exit(f"goal {goal!r} is not METRIC>=VALUE, with >=, <=, > or <")
    metric, called, sign, value = match.groups()
    at = [row["stages"].get(card["stages"][-1]["label"]) for row in card["metrics"] if row["metric"] == metric]
    if not at:
        sys.exit(
            f"goal {goal!r}: {card['model']} has no metric {metric!r}; there are:"
            f" {', '.join(row['metric'] for row in card['metrics'])}"
        )
    bound = card["compressors"][value] if value in card["compressors"] else float(value)
    return all(a is not None and COMPARE[sign](a["called" if called else "value"], bound) for a in at)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="+", type=Path)
    parser.add_argument("--goal", action="append", default=[])
    args = parser.parse_args()
    cards = [json.loads(path.read_text()) for path in args.cards]
    verdicts = {goal: [reached(goal, card) for card in cards] for goal in args.goal}
    print(
        *table(cards),
        "",
        "Mean over seeds [least, largest]; below it the change from the stage before (95 % interval over seeds).",
        "",
        sep="\n",
    )
    for goal, won in verdicts.items():
        print(
            f"- {goal}: "
            + ", ".join(f"seed {card['seed']} {'reached' if ok else 'missed'}" for card, ok in zip(cards, won))
        )
    return 0 if all(map(all, verdicts.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
