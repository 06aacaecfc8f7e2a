"""Find evaluation items in the training text: python -m scripts.contamination --eval-set FILE_OR_BUNDLE [--data NAME |
--data-dir PATH].

An item counts if it shares a run of --ngram words with a document. Writes contamination.json (the table's numbers and
examples) and contaminated.jsonl (set, line and splits of each such item, so that a score without them can be computed).
"""

import json
from pathlib import Path

from nanolab.cli import UserError, as_json, main, parse
from nanolab.evals.config import ContaminationConfig


def run(cfg: ContaminationConfig) -> int:
    if not cfg.eval_set:
        raise UserError(
            "no evaluation set is given; expected a .jsonl file or the folder of a bundle; type --eval-set PATH"
        )
    from nanolab.data.corpus import open_data
    from nanolab.evals.contamination import Search, read_sets
    from nanolab.files import write_text
    from nanolab.runtime import base_dir

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
    output = Path(cfg.out).expanduser() if cfg.out else base_dir() / "contamination" / Path(cfg.eval_set).resolve().stem
    write_text(output / "contaminated.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(output / "contamination.json", as_json(document, "contamination.json", indent=1) + "\n")
    print(*table(document), f"written: {output}", sep="\n")
    if cfg.json:
        print(as_json(document, "the result"))
    return 1 if broken else 0


def table(document: dict) -> list[str]:
    """One line per set, then what was found in those where something was, then what could not be read."""
    sets = document["sets"]
    width = max(len(entry["set"]) for entry in sets)
    splits = list(sets[0]["overlap"])
    lines = [
        (
            f"items that share {document['ngram']} words in a row with a document of {document['data']}; shares are of"
            " the items that have as many, with 95 % intervals"
        ),
        f"{'set':<{width}} {'items':>7} {'enough':>7} "
        + " ".join(f"{name:>8}" for name in splits)
        + f"  {'share':>21}  longest",
    ]
    for entry in sets:
        either = entry["overlap"][splits[-1]]
        shown = (
            "-"
            if either["share"] is None
            else "{:.2f} % [{:.2f}, {:.2f}]".format(*(100 * x for x in (either["share"], *either["interval"])))
        )
        counts = " ".join(f"{entry['overlap'][name]['items']:>8,}" for name in splits)
        lines.append(
            f"{entry['set']:<{width}} {entry['items']:>7,} {entry['long_enough']:>7,} {counts}  {shown:>21} "
            f" {entry['longest'] or '-':>7}"
        )
    for entry in sets:
        for row in entry["examples"][:2]:
            lines += [
                "",
                f"{entry['set']}, line {row['line']}: {row['words']} words in {row['split']}, {row['where']}",
                f"  {row['text']}",
            ]
    return lines + [f"not read: {name}: {why}" for name, why in document["broken"].items()]


if __name__ == "__main__":
    main(lambda: run(parse(ContaminationConfig)))
