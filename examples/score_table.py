"""Puts score files of `bge_ds.evaluate` (or `bag_of_words.py`) under one another.

python examples/score_table.py "before=scores/random.json" "after=scores/finetuned.json"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bge_ds.evaluate import table


def main() -> None:
    parser = argparse.ArgumentParser(description="One table of several score files.")
    parser.add_argument("rows", nargs="+", metavar="NAME=FILE.json", help="files that do not exist are left out")
    args = parser.parse_args()
    rows, sizes = [], set()
    for row in args.rows:
        name, _, path = row.partition("=")
        if Path(path).is_file():
            results = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
            for dataset, values in results.items():
                rows.append((f"{name} on {dataset}" if len(results) > 1 else name, values))
                sizes.add((values.get("queries"), values.get("passages")))
    if not rows:
        parser.error("none of the files exists")
    print(table(rows, head="model"))
    known = [size for size in sizes if None not in size]
    if len(known) == 1:
        print(f"{known[0][0]} held-out queries, {known[0][1]} passages; no training text holds any of them")


if __name__ == "__main__":
    main()
