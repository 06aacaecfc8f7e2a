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
    from nanolab.files import write_text
    from nanolab.lab.overlap import find_overlap, overlap_table
    from nanolab.runtime import base_dir

    document, rows = find_overlap(cfg)
    output = Path(cfg.out).expanduser() if cfg.out else base_dir() / "contamination" / Path(cfg.eval_set).resolve().stem
    write_text(output / "contaminated.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(output / "contamination.json", as_json(document, "contamination.json", indent=1) + "\n")
    print(*overlap_table(document), f"written: {output}", sep="\n")
    if cfg.json:
        print(as_json(document, "the result"))
    return 1 if document["broken"] else 0


if __name__ == "__main__":
    main(lambda: run(parse(ContaminationConfig)))
