"""Overlap of evaluation sets with the training text: the search, its record and its table."""

from typing import Any

from nanolab.data.corpus import open_data
from nanolab.evals.config import ContaminationConfig
from nanolab.evals.contamination import Search, read_sets
from nanolab.tables import text_table


def find_overlap(cfg: ContaminationConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what `overlap_table` shows, JSON-ready; a row for each item that was found)."""
    sets, broken = read_sets(cfg.eval_set)
    search = Search(sets, cfg.ngram)
    data = open_data(cfg)
    found = {
        f"train {documents.name}" if len(data.train) > 1 else "train": documents for documents, _ in data.train
    } | {"val": data.val}
    report = search.report({name: (documents, search.scan(documents, name)) for name, documents in found.items()})
    rows = [row for entry in report for row in entry.pop("contaminated")]
    document = {
        "eval_set": str(cfg.eval_set),
        "ngram": cfg.ngram,
        "data": cfg.data_dir or cfg.data,
        "fingerprint": data.fingerprint,
        "val_fingerprint": data.val_fingerprint,
        "sets": report,
        "broken": broken,
    }
    return document, rows


def overlap_table(document: dict) -> list[str]:
    """One line per set, then what was found in those where something was, then what could not be read."""
    sets = document["sets"]
    splits = list(sets[0]["overlap"])
    lines = [
        (
            f"items that share {document['ngram']} words in a row with a document of {document['data']}; shares are of"
            " the items that have as many, with 95 % intervals"
        )
    ]
    rows = []
    for entry in sets:
        either, share = entry["overlap"][splits[-1]], "-"
        if either["share"] is not None:
            share = "{:.2f} % [{:.2f}, {:.2f}]".format(*(100 * x for x in (either["share"], *either["interval"])))
        counts = [f"{entry['overlap'][name]['items']:,}" for name in splits]
        rows += [
            [
                entry["set"],
                f"{entry['items']:,}",
                f"{entry['long_enough']:,}",
                *counts,
                share,
                f"{entry['longest'] or '-'}",
            ]
        ]
    lines += text_table(
        {"set": "left", **dict.fromkeys(("items", "enough", *splits, "share", "longest"), "right")}, rows
    )
    for entry in sets:
        for row in entry["examples"][:2]:
            lines += [
                "",
                f"{entry['set']}, line {row['line']}: {row['words']} words in {row['split']}, {row['where']}",
                f"  {row['text']}",
            ]
    return lines + [f"not read: {name}: {why}" for name, why in document["broken"].items()]
