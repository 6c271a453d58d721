"""Texts to vectors on disk: blocks of texts, shared by the ranks.

Shapes: N texts of a block, D features.

Block k has the texts [k * BLOCK, (k + 1) * BLOCK) of the input, and rank k modulo the number of ranks encodes it. A block is
packed by itself, so that its bytes do not depend on the ranks, and memory holds two: while one is encoded, a thread reads and
tokenizes the next. Ranks exchange nothing but files (`output.py`), so none waits for another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import orjson
import torch
import transformers
import xxhash

from bge_ds.data.preprocess import validate
from bge_ds.data.preprocess.prepare import cache_folder
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards import digests, integrity
from bge_ds.encoding import number_formats, output
from bge_ds.encoding.inputs import ShardInput, TextInput, open_input
from bge_ds.encoding.manifest import DType, Job, Manifest, Settings
from bge_ds.encoding.progress import Progress
from bge_ds.evaluation import DEFAULT_LENGTHS
from bge_ds.evaluation.embedder import Embedder, EmbeddingSettings, Side, settings_folder
from bge_ds.modeling import encoder

Made = TypeVar("Made")
BLOCK = 16384  # texts
TOKENIZED = 512  # texts handed to the tokenizer at a time, whose encodings take 30 times the room of their ids
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".txt", ".model")  # files that may decide a vector


@dataclass(frozen=True)
class Options:
    """What is encoded, with which model, into what; the flags of `bge_ds.encode`, see `--help`."""

    model_name_or_path: str
    input: list[str]
    output: Path
    side: Side = "passage"
    max_len: int | None = None
    dim: int | None = None
    dtype: DType = "float32"
    batch_size: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    columns: list[str] = field(default_factory=list)
    allow_empty: bool = False
    overwrite: bool = False
    cache_dir: str | None = None
    use_cpu: bool = False
    bf16: bool = False

    def prompts(self) -> dict[str, str | None]:
        return {"query_prompt": self.query_prompt, "passage_prompt": self.passage_prompt}


class Block(NamedTuple):
    """Token ids of a block's texts, and their `_id` where they have one."""

    number: int
    tokens: RaggedArrays
    ids: list[str] | None


def encode(options: Options, texts: TextInput | ShardInput | None = None) -> Manifest | None:
    """Encodes this rank's share; the manifest where all blocks are there by then, None where other ranks are at it still.

    texts: in place of `options.input`. Rank and number of ranks are the launcher's RANK and WORLD_SIZE. Raises ValueError for
    whatever the user can fix, before the model is loaded where possible.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    say = _say if rank == 0 else _silent
    other = "passage" if options.side == "query" else "query"
    if options.prompts()[f"{other}_prompt"] is not None:
        raise ValueError(f"--{other}_instruction_for_retrieval has no effect with --side {options.side}: drop it")
    output.check_output(options.output)
    texts = texts or open_input(options.input, options.columns, options.allow_empty, options.side)
    settings = settings_of(options, texts)
    known = cache_folder(options.cache_dir)
    # Damage is named by whichever rank sees it first.
    job = output.take_up(options.output, settings, texts, BLOCK, known=known, overwrite=options.overwrite, say=_say)
    if isinstance(job, Manifest):
        say(f"{options.output} is whole and undamaged: nothing to do")
        return job
    if job.input.empty:
        say(f"warning: {job.input.empty:,} of {job.input.texts:,} texts are empty")
    own = range(rank, job.num_blocks, world)
    missing = output.unfinished(options.output, own)
    if len(missing) < len(own):
        say(f"going on: {len(own) - len(missing)} of {len(own)} blocks are finished")
    if missing:
        name = f"rank 0 of {world}: " if world > 1 else ""
        total, left = (sum(len(job.rows(block)) for block in blocks) for blocks in (own, missing))
        embedder = load_embedder(options, settings)
        say(f"{options.model_name_or_path} {embedder.describe()}")
        progress = Progress(total, total - left, name, shows=rank == 0)
        encode_blocks(options.output, job, texts, missing, embedder, progress)
        progress.close()
    if (made := output.finish(options.output, job)) is None:
        say("this rank's blocks are finished; the last rank writes the manifest")
    return made


def settings_of(options: Options, texts: TextInput | ShardInput | None = None) -> Settings:
    """All that decides the vectors, from the flags, the model's files and the shards. Raises ValueError where they disagree."""
    name, side = options.model_name_or_path, options.side
    folder = settings_folder(name, options.cache_dir)
    found = EmbeddingSettings.read(folder, pooling=options.pooling, normalize=options.normalize, **options.prompts())
    try:
        config = encoder.load_config(name, cache_dir=options.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from None
    prompt = found.query_prompt if side == "query" else found.passage_prompt
    default = min(DEFAULT_LENGTHS[f"{side}_max_len"], encoder.longest_text(config))
    if isinstance(texts, ShardInput):
        texts.check(validate.core(validate.load_tokenizer(name, options.cache_dir)), prompt)
        max_len = texts.max_len(options.max_len, default)
        for shards in texts.folders:
            integrity.check_hashes(Path(shards), cache_folder(options.cache_dir))
    else:
        max_len = options.max_len or default
    encoder.check_lengths(config, max_len=max_len)
    features = config.hidden_size
    if options.dim is not None and options.dim > features:
        raise ValueError(f"--dim {options.dim} is more than the {features} features of {name}; give {features} or fewer")
    return Settings(
        model=name, model_hash=hash_of(folder, name, options.cache_dir), side=side, prompt=prompt, max_len=max_len,
        pooling=found.pooling, normalize=found.normalize, bf16=options.bf16, dim=options.dim or features, dtype=options.dtype,
    )  # fmt: skip


def hash_of(folder: Path, name: str, cache_dir: str | None) -> str:
    """What tells a model from another, or from itself before it was trained on: a hash of its files; the hub's commit."""
    if not Path(name).is_dir():
        return folder.name
    paths = sorted(path for path in folder.iterdir() if path.suffix in _OF_A_MODEL and path.is_file())
    hashes = digests.of_files(paths, cache_folder(cache_dir))
    return xxhash.xxh3_128_hexdigest(orjson.dumps([[path.name for path in paths], hashes]))


def load_embedder(options: Options, settings: Settings) -> Embedder:
    """The model, on this rank's GPU where there are GPUs."""
    prepare_device(options.use_cpu)
    return Embedder.load(
        options.model_name_or_path, cache_dir=options.cache_dir, pooling=options.pooling, normalize=options.normalize,
        batch_size=options.batch_size, bf16=options.bf16, use_cpu=options.use_cpu, **options.prompts(),
        **{f"{options.side}_max_len": settings.max_len},
    )  # fmt: skip


def prepare_device(use_cpu: bool) -> torch.device:
    """Before a model is loaded: this rank's own GPU, or the CPU; and no bar of transformers' beside the progress."""
    transformers.logging.disable_progress_bar()
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cuda")


def encode_blocks(
    folder: Path, job: Job, texts: TextInput | ShardInput, numbers: list[int], embedder: Embedder, progress: Progress
) -> None:
    """Writes these blocks."""
    settings = job.settings
    for block in read_ahead(lambda number: _read(job, texts, number, embedder), numbers):
        tokens = int(block.tokens.lengths.sum())
        progress.tokenized(len(block.tokens.lengths), tokens)
        vectors_ND = embedder.encode_ids(block.tokens.split(), settings.side, progress.encoded).numpy()
        vectors_ND = number_formats.cut(vectors_ND, settings.dim, settings.normalize)
        output.write_block(folder, job, block.number, vectors_ND, block.ids, tokens)


def read_ahead(read: Callable[[int], Made], numbers: list[int]) -> Iterator[Made]:
    """What `read` makes of each number, in order; a thread reads the next while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for number in numbers:
            ahead = pool.submit(read, number)
            if waiting is not None:
                yield waiting.result()
            waiting = ahead
        if waiting is not None:
            yield waiting.result()


def _read(job: Job, texts: TextInput | ShardInput, number: int, embedder: Embedder) -> Block:
    rows, settings = job.rows(number), job.settings
    if isinstance(texts, ShardInput):
        return Block(number, texts.ids(rows, settings.max_len), None)
    found, ids, parts = texts.texts(job.input.starts[number], len(rows)), [], []
    while some := list(islice(found, TOKENIZED)):
        ids += [identity for identity, _ in some]
        tokens = embedder.tokenize([text for _, text in some], settings.side)
        parts.append(RaggedArrays.of_lists(tokens, np.int32))
    if len(ids) < len(rows):
        raise ValueError(f"{job.input.sources[-1].path} has become shorter since it was checked: run the same command again")
    return Block(number, RaggedArrays.join(parts), ids if job.input.has_ids else None)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    """For ranks that have nothing to say."""
