"""What several tests build: tiny tokenizers and models, packed random texts, spawned ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import forked
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from bge_ds.modeling.vocabulary import PRETRAIN_FAMILIES

REPO = Path(__file__).resolve().parent.parent
PYTHONPATH = f"{REPO}:{REPO / 'tests'}"  # of processes that import bge_ds and the modules of tests
SENTENCES = [
    "the quick brown fox jumps over the lazy dog and unbelievable thunderstorms",
    "retrieval models embed questions and passages into one vector space",
    "gradients of a single process with the whole batch, exactly the same",
    "北京是中华人民共和国的首都 台北的天氣很好",
    "memory mapped arrow shards are opened instantly whatever their size",
    "antidisestablishmentarianism is an internationalization of words",
]


def make_tokenizer(kind: str, folder: Path, types: bool = False) -> Path:
    """A tiny tokenizer of one of three kinds: wordpiece (BERT), bytes (RoBERTa), unigram (SentencePiece, XLM-R).

    types: it gives token types, as BERT's own does.
    """
    texts = SENTENCES * 4
    if kind == "wordpiece":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        # Written down, not trained: the trainer breaks ties by chance, and tests must not depend on it.
        letters = sorted(set("".join(SENTENCES)) - {" "})
        words = sorted({word for text in SENTENCES for word in text.replace(",", "").split()})[::2]
        vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters), "##ing", "##er", "##ion", *words][:200]
        tok = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
        tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        trainer = None
        first, last = "[CLS]", "[SEP]"
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>",
                 "bos_token": "<s>", "eos_token": "</s>"}  # fmt: skip
        first, last = "<s>", "</s>"
        if kind == "bytes":
            tok = Tokenizer(models.BPE())
            tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=360, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
            )
        else:
            tok = Tokenizer(models.Unigram())
            tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>")
    if trainer is not None:
        tok.train_from_iterator(texts, trainer)
    pieces = [(t, tok.token_to_id(t)) for t in (first, last)]
    pair = f"{first} $A {last} $B:1 {last}:1" if kind == "wordpiece" else f"{first} $A {last} {last} $B {last}"
    tok.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", pair=pair, special_tokens=pieces)
    if types:
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tok, **names).save_pretrained(folder)
    return folder


def tiny_config(family: str, *, vocab_size: int = 200, dropout: float = 0.0, **changes):
    """A two-layer model's config: bert, roberta (whose positions start after the padding id, 1), or any other model type.

    Where a type has a sliding window, one layer has one of a few tokens; Mistral has it in both.
    """
    shape = dict(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        # Large weights: texts of a freshly made model would otherwise all have nearly the same vector.
        max_position_embeddings=130, initializer_range=0.15, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    if family == "bert":
        return BertConfig(**{**shape, **changes})
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if family == "roberta":
        return RobertaConfig(**{**shape, **ids, "type_vocab_size": 1, **changes})
    # The same under the names of the other types; a type keeps a name that it does not know as a mere note.
    names = ("attention_dropout", "embedding_dropout", "mlp_dropout", "dropout", "embd_pdrop", "resid_pdrop")
    shape |= {"cls_token_id": 0, "sep_token_id": 2, "mask_token_id": 4, **ids, **dict.fromkeys(names, dropout)}
    return AutoConfig.for_model(family, **{**shape, **_OWN_SETTINGS.get(family, {}), **changes})


_SLIDING = {"num_key_value_heads": 2, "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
_OWN_SETTINGS = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "llama": {"num_key_value_heads": 2, "pad_token_id": None},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "modernbert": {"local_attention": 12, "global_attn_every_n_layers": 2},
    "qwen2": _SLIDING,
    "qwen3": {**_SLIDING, "head_dim": 8},
}


def make_model(family: str, folder: Path, **changes) -> Path:
    import torch

    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if family in PRETRAIN_FAMILIES else AutoModel
    model = auto.from_config(tiny_config(family, **changes))
    # Random norms and biases: a parameter left at 0 or 1 would hide a gradient that never arrives.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_training_folder(base: Path) -> Path:
    """A tiny BERT with dropout (`model`), nine groups of which each has the others' texts as negatives, and those texts."""
    make_model("bert", base / "model", dropout=0.1)
    make_tokenizer("wordpiece", base / "model")
    texts = [" ".join(SENTENCES[i % 6].split()[: 2 + i]) for i in range(9)]
    groups = [{"query": texts[i][:20], "pos": [texts[i]], "neg": texts[:i] + texts[i + 1 :]} for i in range(9)]
    (base / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return base


def command_flags(folder: Path) -> dict[str, dict]:
    """What each training command is given of its own, on the files of `make_training_folder`."""
    groups = {"train_data": str(folder / "groups.jsonl"), "train_group_size": 3, "query_max_len": 16, "passage_max_len": 40}
    texts = {"train_data": str(folder / "texts.jsonl"), "max_seq_length": 40}
    return {"finetune": groups | {"negatives_cross_device": True, "temperature": 0.05}, "pretrain": texts}


def random_texts(lengths: list[int], vocab_size: int = 200, seed: int = 0, first: int = 2, last: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(5, vocab_size, n).astype(np.int64) for n in lengths]
    for text in texts:
        text[0], text[-1] = first, last
    return texts


def assert_same_batch(found, wanted) -> None:
    """Every field of a batch alike, tensors to type and shape."""
    import torch

    assert type(found) is type(wanted)
    for field in dataclasses.fields(wanted):
        mine, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if dataclasses.is_dataclass(theirs):
            assert_same_batch(mine, theirs)
        elif isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **changes}


def program(name: str, *args: object) -> list[str]:
    """The command that runs a program of `tests/programs`."""
    return [sys.executable, str(REPO / "tests/programs"), name, *map(str, args)]


def start_program(
    name: str, args: list[str], env: dict[str, str], stdout: IO, stderr: IO, fresh: bool = False
) -> forked.Process | subprocess.Popen:
    """A process that runs a program in the repository; where that can be, its imports are done, unless `fresh`."""
    if not fresh and (server := forked.server()) is not None:
        return forked.Process(server, name, args, env, stdout.fileno(), stderr.fileno(), REPO)
    return subprocess.Popen(program(name, *args), cwd=REPO, env=env, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL)


def run_program(name: str, args: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """A program of `tests/programs`, which may kill itself, run to its end. `folder` gets its cache and what it prints."""
    with open(folder / "printed", "w+") as printed:
        env = environment(PYTHONPATH=PYTHONPATH, BGE_DS_CACHE=str(folder / "cache"), **variables)
        status = start_program(name, args, env, printed, printed).wait(120)
        printed.seek(0)
        return subprocess.CompletedProcess(args, status, printed.read())


def refused(capsys, main: Callable[[list[str]], int], words: list[str]) -> str:
    """What a command says that refuses its command line: one line."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def run_ranks(name: str, ranks: int, *args: object, timeout: int = 240, fresh: bool = False) -> str:
    """Run a program of `tests/programs` as `ranks` processes of one group; their standard outputs, one after the other.

    fresh: they share no memory and no allocator with what forks processes, for tests that measure memory.
    Ranks that are still at it after `timeout` seconds are killed, and what they have said is shown.
    """
    port = free_port()
    with contextlib.ExitStack() as files:
        outputs = [[files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in range(ranks)]
        processes = [
            start_program(
                name, [str(arg) for arg in args],
                environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PYTHONPATH=PYTHONPATH),
                *outputs[r], fresh,
            )
            for r in range(ranks)
        ]  # fmt: skip
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
            late = [r for r, process in enumerate(processes) if process.poll() is None]
        finally:
            for process in processes:
                process.kill()
        results = []
        for pair in outputs:
            for file in pair:
                file.seek(0)
            results.append([file.read() for file in pair])
    for r, (process, (out, err)) in enumerate(zip(processes, results, strict=True)):
        how = f"ran on after {timeout} s" if r in late else f"exited with {process.returncode}"
        assert r not in late and process.returncode == 0, f"rank {r} {how}\n{out[-2000:]}\n{err[-6000:]}"
    return "".join(out for out, _ in results)
