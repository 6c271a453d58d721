"""A process whose tokenizer starts no thread and restores TOKENIZERS_PARALLELISM.

Arguments: folder of the tokenizer, the variable's value if it has one.
"""

import os

from bge_ds.data.preprocess import validate


def main(folder: str, given: str | None = None) -> None:
    encoder = validate.BatchTokenizer(validate.core(validate.load_tokenizer(folder)))
    before = os.listdir("/proc/self/task")
    encoder.encode(["the quick brown fox"] * 2000, 64)
    encoder.encode(["the quick brown fox"] * 2000, 64, "query: ", words=True)
    assert os.listdir("/proc/self/task") == before
    assert os.environ.get("TOKENIZERS_PARALLELISM") == given
