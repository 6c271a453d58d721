"""What ranking by words alone (BM25) scores on a BEIR folder, beside which a model's figures mean something.

python examples/bag_of_words.py --data quickstart/data/test
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from bge_ds.data.beir import RetrievalSet, read_folder
from bge_ds.evaluate import table, write_json
from bge_ds.evaluation.retrieval import KEPT, measure

K1, B = 0.9, 0.4  # the values that BEIR's own baseline uses
WORD = re.compile(r"[^\W_]+")


def words(text: str) -> Counter[str]:
    """Lower-case words; a plural's s is dropped, the one bit of grammar that costs nothing."""
    found = WORD.findall(text.lower())
    return Counter(w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in found)


def rank(data: RetrievalSet) -> dict[str, dict[str, float]]:
    """query id -> passage id -> BM25 score, the best `KEPT` of each query."""
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    lengths = np.zeros(len(data.passage_ids))
    for row, text in enumerate(data.passages()):
        counts = words(text)
        lengths[row] = counts.total()
        for word, count in counts.items():
            postings[word].append((row, count))
    penalty = K1 * (1 - B + B * lengths / lengths.mean())
    run = {}
    for query, text in data.queries.items():
        scores = np.zeros(len(lengths))
        for word in words(text):
            if word in postings:
                rows, counts = np.array(postings[word]).T
                weight = np.log(1 + (len(lengths) - len(rows) + 0.5) / (len(rows) + 0.5))
                scores[rows] += weight * counts * (K1 + 1) / (counts + penalty[rows])
        best = np.argsort(-scores, kind="stable")[:KEPT]
        run[query] = {data.passage_ids[row]: float(scores[row]) for row in best if scores[row] > 0}
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores of a bag-of-words (BM25) ranking.")
    parser.add_argument("--data", type=Path, required=True, help="a folder in BEIR's form")
    parser.add_argument("--output", type=Path, help="JSON file to write, in the form of bge_ds.evaluate")
    args = parser.parse_args()
    data = read_folder(args.data)
    results = {data.name: measure(data, rank(data))}
    print(table(list(results.items())))
    if args.output:
        write_json(args.output, {"model": "bag of words (BM25)", "settings": {"k1": K1, "b": B}, "results": results})


if __name__ == "__main__":
    main()
