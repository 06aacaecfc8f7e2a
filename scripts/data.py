"""Build or download a corpus and say what it holds: python -m scripts.data --data pydocs

Reads every document once, so that a corpus that passes is whole; hub corpora: --data climbmix --num-shards 170.
"""

import json

from nanolab.cli import main, parse
from nanolab.data.config import DataBuildConfig


def run(cfg: DataBuildConfig) -> int:
    from nanolab.data.corpus import open_data

    data = open_data(cfg, workers=cfg.workers)
    sources = [*data.train, (data.val, None)]
    rows = [{"source": documents.name, "weight": weight, **documents.counts()} for documents, weight in sources]
    print(f"{'source':<16} {'weight':>7} {'documents':>11} {'bytes':>15} {'left out':>9} {'files':>6}  where")
    for row in rows:
        weight = "" if row["weight"] is None else f"{row['weight']:.3f}"
        place = ", ".join(row["where"][:3]) + (" ..." if len(row["where"]) > 3 else "")
        counts = f"{row['documents']:>11,} {row['bytes']:>15,} {row['left_out']:>9,} {row['files']:>6}"
        print(f"{row['source']:<16} {weight:>7} {counts}  {place}")
    print("left out: blank documents, and documents that are also in the validation text")
    for label, facts in data.describe():
        print(f"{label:<16} {facts}")
    for (documents, _), row in zip(data.train, rows):
        if row["marks"] > documents.marks:  # in parquet files, whose texts are not read before
            print(f"{documents.name}: {row['marks']:,} marks <|endoftext|> are inside texts and stay text")
    if cfg.json:
        print(json.dumps({"sources": rows, "fingerprint": data.fingerprint, "val_fingerprint": data.val_fingerprint}))
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(DataBuildConfig)))
