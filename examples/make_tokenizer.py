"""Trains a lower-case WordPiece vocabulary and saves it with a small BERT's config, ready to pre-train from scratch.

    python examples/make_tokenizer.py --input quickstart/data/pretrain.jsonl --output quickstart/small_bert

The folder serves as `--tokenizer_name` and as `--config_name`: a config holds no weights, so the model starts random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertTokenizerFast

VOCAB_SIZE = 4096
MODEL_LENGTH = 512


def texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def make_tokenizer(paths: list[Path], folder: Path, vocabulary_size: int = VOCAB_SIZE) -> BertTokenizerFast:
    """Trains on the `text` of JSON lines and writes the tokenizer's files to `folder`."""
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts(paths), vocab_size=vocabulary_size, min_frequency=2, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    vocabulary = {line: number for number, line in enumerate((folder / "vocab.txt").read_text("utf-8").splitlines())}
    tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=MODEL_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a WordPiece vocabulary for a small BERT.")
    parser.add_argument("--input", type=Path, nargs="+", required=True, help='JSON lines with a "text"')
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer and the config")
    parser.add_argument("--vocabulary", type=int, default=VOCAB_SIZE, help=f"word pieces ({VOCAB_SIZE})")
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.input, args.output, args.vocabulary)
    config = BertConfig.from_json_file(Path(__file__).parent / "small_bert.json")
    config.vocab_size = len(tokenizer)
    config.save_pretrained(args.output)
    print(f"{len(tokenizer)} word pieces in {args.output}")


if __name__ == "__main__":
    main()
