"""Makes the folder that benchmarks/gpu.sh takes as --data, of groups in JSON lines and a model's tokenizer.

    python benchmarks/gpu_sample.py FOLDER --groups groups.jsonl.gz --model TOKENIZER

It has the lengths of 4,096 groups in tokens (speed depends on them and not on the words, so most parts take random ids), and
1,600 groups in full with the tokenizer, for the part that runs the commands themselves.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import transformers

GROUP, KEPT, TEXTS = 8, 4096, 1600  # passages a query; groups whose lengths are kept, and groups in full


def lines_of(path: Path) -> Iterator[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, itertools.islice(file, KEPT))


def write_sample(folder: Path, groups: Path, model: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def lengths(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    found = []
    for line in lines_of(groups):
        passages = [line["pos"][0], *itertools.islice(itertools.cycle(line["neg"] or line["pos"]), GROUP - 1)]
        found.append((lengths([line["query"]])[0], lengths(passages)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lengths.json").write_text(json.dumps({"groups": found}), encoding="utf-8")
    with gzip.open(folder / "groups.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in itertools.islice(lines_of(groups), TEXTS))
    tokenizer.save_pretrained(folder / "tokenizer")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(found)} groups, {size / 2**20:.1f} MiB in {folder}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--groups", type=Path, required=True, help="JSON lines of groups, may be .gz")
    parser.add_argument("--model", required=True, help="a folder with a tokenizer")
    args = parser.parse_args(argv)
    write_sample(args.folder, args.groups, args.model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
