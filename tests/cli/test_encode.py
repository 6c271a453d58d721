"""The encode command: agreement with sentence-transformers, any number of ranks, kills, refusals, and every bad input named."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from bge_ds import encode, preprocess
from bge_ds.encoding import output, run
from bge_ds.encoding.vectors import open_vectors

TEXTS = [" ".join(helpers.SENTENCES[i % 6].split()[: 1 + i % 5]) + f" {i}" for i in range(30)]
BLOCK = 8  # texts: four blocks, the last of them not full


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "BLOCK", BLOCK)
    monkeypatch.setenv("BGE_DS_CACHE", str(tmp_path / "cache"))


def write_lines(path: Path, texts=TEXTS, **more) -> Path:
    lines = [json.dumps({"_id": f"d{i}", "text": text} | more) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def flags(model: Path, source, folder: Path, *more: object) -> list[str]:
    sources = source if isinstance(source, list) else [source]
    words = ["--model_name_or_path", model, "--input", *sources, "--output", folder, "--use_cpu", *more]
    return [str(word) for word in words]


def encoded(model: Path, source, folder: Path, *more: object):
    assert encode.main(flags(model, source, folder, *more)) == 0
    return open_vectors(folder)


def refused(capsys, model: Path, source, folder: Path, *more: object) -> str:
    capsys.readouterr()
    assert encode.main(flags(model, source, folder, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def content(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


# ------------------------------------------------------------------------------------------------------------ vectors


def test_vectors_equal_those_of_sentence_transformers(tmp_path, minilm_path):
    """Pooling, normalisation, prompt, title and truncation give what sentence-transformers gives, in the order of the input,
    with texts of all lengths in one block and a last block that is not full."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["a short one", "words of a long text " * 60, "中文 and English", "x", *TEXTS[:7]]
    source = write_lines(tmp_path / "c.jsonl", texts, title="On texts")
    vectors = encoded(minilm_path, source, tmp_path / "out", "--max_len", 200, "--passage_instruction_for_retrieval", "P: ")
    model = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu")
    model.max_seq_length = 200
    expected = model.encode([f"P: On texts {text}" for text in texts])
    np.testing.assert_allclose(vectors[:], expected, rtol=0, atol=1e-5)
    assert vectors.ids.to_pylist() == [f"d{i}" for i in range(len(texts))]
    assert vectors.manifest.settings.pooling == "mean" and len(vectors.manifest.blocks) == 2


def test_a_side_has_its_own_length_and_prompt(tmp_path, tiny_bert_path):
    """Queries are cut at 64 tokens by default, passages at 256 or the model's positions (130); other flags are refused."""
    source = write_lines(tmp_path / "c.jsonl", ["word " * 300])
    query = encoded(tiny_bert_path, source, tmp_path / "q", "--side", "query", "--query_instruction_for_retrieval", "find: ")
    passage = encoded(tiny_bert_path, source, tmp_path / "p")
    assert (query.manifest.counts["tokens"], passage.manifest.counts["tokens"]) == (64, 130)
    assert query.manifest.settings.prompt == "find: "


def test_types_and_dim_on_disk(tmp_path, tiny_bert_path):
    """float16, bfloat16 and int8 hold what float32 holds up to their rounding, cut vectors are of unit length again."""
    source = write_lines(tmp_path / "c.jsonl")
    full = encoded(tiny_bert_path, source, tmp_path / "float32")[:]
    cut = full[:, :12] / np.sqrt((full[:, :12].astype(np.float64) ** 2).sum(1, keepdims=True))
    for dtype, tolerance, stored in (
        ("float32", 1e-7, np.float32), ("float16", 2.0**-11, np.float16), ("bfloat16", 2.0**-8, np.uint16),
        ("int8", 0.5 / 127 + 1e-6, np.int8),
    ):  # fmt: skip
        folder = tmp_path / f"cut-{dtype}"
        vectors = encoded(tiny_bert_path, source, folder, "--dim", 12, "--dtype", dtype)
        assert vectors.shape == (30, 12)
        np.testing.assert_allclose(vectors[:], cut, rtol=0, atol=tolerance)
        assert np.load(folder / "vectors-000001.npy", mmap_mode="r").dtype == stored
    scale = np.load(tmp_path / "cut-int8/scales-000000.npy")
    np.testing.assert_allclose(scale, np.abs(cut[:BLOCK]).max(1) / 127, rtol=1e-5)
    np.testing.assert_array_equal(
        np.load(tmp_path / "cut-float16/vectors-000000.npy"), open_vectors(tmp_path / "cut-float32")[:8].astype(np.float16)
    )


# ------------------------------------------------------------------------------------------------------------- inputs


def compressed(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data))
    return path


def test_every_kind_of_file_gives_the_same_vectors(tmp_path, tiny_bert_path):
    """Blocks that begin in the middle of a stream, a table or a file, or go from one file to the next, hold the same texts."""
    lines = write_lines(tmp_path / "c.jsonl")
    wanted = content(encoded(tiny_bert_path, lines, tmp_path / "lines").folder, but=("manifest.json",))
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    raw, parts = lines.read_bytes(), []
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=5)
    for n, (first, last) in enumerate([(0, 5), (5, 20), (20, 30)]):
        part = b"\n\n".join(raw.splitlines()[first:last])  # blank lines, and no end of the last
        parts.append(compressed(tmp_path / f"{n}.jsonl.gz", part) if n % 2 else tmp_path / f"{n}.jsonl")
        if not n % 2:
            parts[-1].write_bytes(b"\xef\xbb\xbf" + part)
    sources = [
        compressed(tmp_path / "c.jsonl.gz", raw),
        compressed(tmp_path / "c.jsonl.zst", raw),
        tmp_path / "c.parquet",
        parts,
    ]
    for n, source in enumerate(sources):
        folder = encoded(tiny_bert_path, source, tmp_path / f"out-{n}").folder
        assert content(folder, but=("manifest.json",)) == wanted, source
    renamed = [{"docno": int(row["_id"][1:]), "contents": row["text"]} for row in rows]
    pa.parquet.write_table(pa.Table.from_pylist(renamed), tmp_path / "renamed.parquet")
    columns = ("--columns", "text=contents", "_id=docno")
    vectors = encoded(tiny_bert_path, tmp_path / "renamed.parquet", tmp_path / "renamed", *columns)
    np.testing.assert_array_equal(vectors[:], open_vectors(tmp_path / "lines")[:])
    assert vectors.ids.to_pylist() == [str(i) for i in range(30)]


def test_shards_give_what_their_texts_give(tmp_path, tiny_bert_path):
    """Texts that were tokenized once get the vectors of the texts themselves: of pretrain shards the texts, of finetune
    shards each distinct passage once or the queries, cut further than they are stored, prompts included."""
    passages = list(dict.fromkeys(TEXTS))
    groups = [{"query": TEXTS[i], "pos": [TEXTS[i]], "neg": TEXTS[:i]} for i in reversed(range(30))]
    order = list(dict.fromkeys(text for group in groups for text in group["pos"] + group["neg"]))
    assert sorted(order) == sorted(passages)
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    made = ("--tokenizer", str(tiny_bert_path), "--num_proc", "1")
    prompt = ("--passage_instruction_for_retrieval", "p: ")
    source = str(write_lines(tmp_path / "texts.jsonl"))
    assert preprocess.main(["pretrain", "--input", source, "--output", str(tmp_path / "pre"), *made]) == 0
    words = ["finetune", "--input", str(tmp_path / "groups.jsonl"), "--output", str(tmp_path / "fine"), *made, *prompt]
    assert preprocess.main(words) == 0
    queries = [group["query"] for group in groups]
    for name, shards, texts, how in (
        ("pretrain", "pre", TEXTS, ("--max_len", 6)),
        ("passages", "fine", order, ("--max_len", 9, *prompt)),
        ("queries", "fine", queries, ("--side", "query", "--max_len", 7)),
    ):
        expected = encoded(tiny_bert_path, write_lines(tmp_path / "t.jsonl", texts), tmp_path / f"{name}-texts", *how)
        found = encoded(tiny_bert_path, tmp_path / shards, tmp_path / f"{name}-shards", *how)
        assert found.manifest.counts == expected.manifest.counts
        assert found.ids is None
        for block in range(4):
            file = f"vectors-{block:06d}.npy"
            assert (found.folder / file).read_bytes() == (expected.folder / file).read_bytes(), (name, block)


def test_shards_that_do_not_fit_are_refused(tmp_path, capsys, tiny_bert_path, minilm_path):
    """Another tokenizer, another prompt, a length beyond what was stored, or files beside shards: refused before encoding."""
    source, folder = write_lines(tmp_path / "texts.jsonl"), tmp_path / "shards"
    made = ("--tokenizer", str(tiny_bert_path), "--num_proc", "1", "--max_seq_length", "20")
    assert preprocess.main(["pretrain", "--input", str(source), "--output", str(folder), *made]) == 0
    for model, inputs, more, expected in (
        (minilm_path, folder, (), "another tokenizer"),
        (tiny_bert_path, folder, ("--passage_instruction_for_retrieval", "p: "), "holds the passage prompt ''"),
        (tiny_bert_path, folder, ("--max_len", 21), "--max_len 21 is longer than the 20 tokens"),
        (tiny_bert_path, [folder, source], (), "encode them one after the other"),
        (tiny_bert_path, folder, ("--allow_empty",), "--allow_empty has no effect on shards"),
    ):
        assert expected in refused(capsys, model, inputs, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"_id": "x", "text": ', "c.jsonl:10: not JSON"),
        (b"[1]", "c.jsonl:10: not a JSON object"),
        (b'{"_id": "x", "body": "t"}', 'c.jsonl:10: "text" is missing'),
        (b'{"_id": "x", "text": 3}', 'c.jsonl:10: "text" must be a string, not a number'),
        (b'{"_id": "x", "text": "t", "title": 3}', 'c.jsonl:10: "title" must be a string'),
        (b'{"_id": [], "text": "t"}', 'c.jsonl:10: "_id" must be a string or a whole number'),
        (b'{"text": "t"}', "c.jsonl:10: a line without an _id after others with one"),
        (b'{"_id": "x", "text": " "}', 'c.jsonl:10: "text" is an empty text: give it one, or --allow_empty'),
        (b'{"_id": "x", "text": "\xff"}', "c.jsonl:10: not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, capsys, line, expected):
    """The first bad line ends the command with its file and number before a model is loaded, and nothing is written."""
    lines = write_lines(tmp_path / "c.jsonl").read_bytes().splitlines()
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([*lines[:8], b"", line, *lines[8:]]))
    model = tmp_path / "model"
    helpers.make_tokenizer("wordpiece", model)
    helpers.tiny_config("bert").save_pretrained(model)  # no weights
    assert expected in refused(capsys, model, tmp_path / "c.jsonl", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "cache", "model"]


def test_other_mistakes_are_named(tmp_path, capsys, tiny_bert_path):
    """A path, a length, a dimension or a flag that cannot serve is one line; so is an output that holds something else."""
    source = write_lines(tmp_path / "c.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    for inputs, more, expected in (
        (tmp_path / "absent.jsonl", (), "no file"),
        ([source, tmp_path / "empty.jsonl"], (), "empty.jsonl: it holds no text"),
        (source, ("--max_len", 131), "--max_len 131 is more than the 130 positions"),
        (source, ("--dim", 33), "--dim 33 is more than the 32 features"),
        (source, ("--columns", "body=text"), "--columns body=text: give FIELD=COLUMN, FIELD one of _id, title, text"),
        (source, ("--query_instruction_for_retrieval", "q"), "has no effect with --side passage"),
    ):
        assert expected in refused(capsys, tiny_bert_path, inputs, tmp_path / "out", *more)
    assert "--output" in refused(capsys, tiny_bert_path, source, source)
    assert "notes.txt, which is no part of vectors" in refused(
        capsys, tiny_bert_path, source, tmp_path / "foreign", "--overwrite"
    )
    assert "--model_name_or_path" in refused(capsys, tmp_path / "no model", source, tmp_path / "out")
    assert "--model_name_or_path" in refused(capsys, tmp_path / "foreign", source, tmp_path / "out")  # a folder of notes
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.lock"))


def test_empty_texts_where_they_are_wanted(tmp_path, capsys, tiny_bert_path):
    """With --allow_empty a text of nothing has the vector of the special tokens, and the warning counts it."""
    source = write_lines(tmp_path / "c.jsonl", ["a", "", "b"])
    vectors = encoded(tiny_bert_path, source, tmp_path / "out", "--allow_empty")
    assert vectors.manifest.counts == {"texts": 3, "tokens": 8, "empty": 1}
    assert "1 of 3 texts are empty" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- ranks, kills, and what is kept


def start(folder: Path, moment: object, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which may kill itself."""
    with open(folder / "printed", "w+") as printed:
        process = helpers.start_program(
            "encode_command", [str(BLOCK), str(moment), *words],
            helpers.environment(PYTHONPATH=helpers.PYTHONPATH, BGE_DS_CACHE=str(folder / "cache"), **variables),
            printed, printed,
        )  # fmt: skip
        status = process.wait(120)
        printed.seek(0)
        return subprocess.CompletedProcess(words, status, printed.read())


def test_two_ranks_write_the_bytes_of_one(tmp_path, tiny_bert_path):
    """A block is packed by itself, so that neither its bytes nor the manifest depend on who encodes it."""
    source = write_lines(tmp_path / "c.jsonl")
    for ranks in (1, 2, 3):
        words = flags(tiny_bert_path, source, tmp_path / f"{ranks}", "--dtype", "int8")
        printed = helpers.run_ranks("encode_command", ranks, BLOCK, -1, *words)
        assert printed.count("wrote ") >= 1
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert sorted(content(tmp_path / "1")) == sorted(
        [
            "manifest.json",
            *(
                f"{kind}-{k:06d}.{end}"
                for kind, end in (("vectors", "npy"), ("scales", "npy"), ("ids", "arrow"))
                for k in range(4)
            ),
        ]
    )
    assert not list(tmp_path.glob(".*.lock"))


def test_killed_at_every_write(tmp_path, tiny_bert_path):
    """Killed in the middle of any file, record or manifest, or before the last cleaning: the second start ends in the bytes of
    an undisturbed run, and does not touch the blocks that were finished."""
    words = flags(tiny_bert_path, write_lines(tmp_path / "c.jsonl"), tmp_path / "out")
    undisturbed = start(tmp_path, -1, *words)
    assert undisturbed.returncode == 0, undisturbed.stdout
    writes = int(undisturbed.stdout.split()[-1])
    assert writes == 14  # the job, then vectors, ids and a record of each block, then the manifest
    wanted = content(tmp_path / "out")
    for moment in [*range(writes), "clean"]:
        shutil.rmtree(tmp_path / "out")
        assert start(tmp_path, moment, *words).returncode == -signal.SIGKILL
        kept = {path: path.stat() for path in finished_files(tmp_path / "out")}
        assert len(kept) == 2 * (4 if moment == "clean" else max(0, moment - 1) // 3)
        again = start(tmp_path, -1, *words)
        assert again.returncode == 0, again.stdout
        assert content(tmp_path / "out") == wanted, moment
        for path, before in kept.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), (moment, path)


def finished_files(folder: Path) -> list[Path]:
    """The files that records or the manifest name."""
    if (folder / "manifest.json").exists():
        blocks = json.loads((folder / "manifest.json").read_text())["blocks"]
    else:
        blocks = [json.loads(path.read_text()) for path in folder.glob("blocks/*.json")]
    return [folder / entry["file"] for block in blocks for entry in block["files"]]


def test_damage_is_found_and_mended(tmp_path, capsys, tiny_bert_path):
    """A flipped byte, a file cut short or a missing one, in a finished folder or an unfinished one: its block alone is encoded
    again, and the result is as before. The reader names the file."""
    source, folder = write_lines(tmp_path / "c.jsonl"), tmp_path / "out"
    encoded(tiny_bert_path, source, folder)
    wanted = content(folder)
    for damage in ("flip", "cut", "missing"):
        path = folder / "vectors-000002.npy"
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.unlink()
        if damage != "missing":
            path.write_bytes(data if damage == "flip" else data[:-1])
        if damage == "flip":
            assert [str(path) in problem for problem in open_vectors(folder).verify()] == [True]
        else:
            with pytest.raises(ValueError, match="vectors-000002"):
                open_vectors(folder)
        before = (folder / "vectors-000001.npy").stat().st_mtime_ns
        capsys.readouterr()
        encoded(tiny_bert_path, source, folder)
        assert "vectors-000002.npy" in capsys.readouterr().err
        assert content(folder) == wanted and (folder / "vectors-000001.npy").stat().st_mtime_ns == before
    words = flags(tiny_bert_path, source, folder)
    shutil.rmtree(folder)
    assert start(tmp_path, 8, *words).returncode == -signal.SIGKILL  # two blocks are finished
    path = folder / "ids-000001.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    again = start(tmp_path, -1, *words)
    assert again.returncode == 0 and "ids-000001.arrow" in again.stdout and "1 of 4 blocks are finished" in again.stdout
    assert content(folder) == wanted


def test_no_rank_vouches_for_anothers_damaged_block(tmp_path, tiny_bert_path):
    """All blocks of a killed run are recorded, and one that rank 1 owns is damaged: rank 0, which is done at once, must not
    write a manifest for it. Whoever comes last does."""
    words = flags(tiny_bert_path, write_lines(tmp_path / "c.jsonl"), tmp_path / "out")
    assert start(tmp_path, 13, *words).returncode == -signal.SIGKILL  # in the middle of the manifest
    wanted = (tmp_path / "out/vectors-000001.npy").read_bytes()
    (tmp_path / "out/vectors-000001.npy").write_bytes(wanted[:-1] + b"\1")
    first = start(tmp_path, -1, *words, RANK="0", WORLD_SIZE="2")
    assert first.returncode == 0 and "vectors-000001.npy has the hash" in first.stdout and "wrote" not in first.stdout
    assert not (tmp_path / "out/manifest.json").exists()
    last = start(tmp_path, -1, *words, RANK="1", WORLD_SIZE="2")
    assert last.returncode == 0 and "wrote" in last.stdout
    assert (tmp_path / "out/vectors-000001.npy").read_bytes() == wanted and open_vectors(tmp_path / "out").verify() == []


def test_another_job_is_refused_by_what_differs(tmp_path, capsys, tiny_bert_path):
    """Vectors of other settings, texts or weights are never mixed: the refusal names each difference, --overwrite replaces
    them, and a text file that was merely touched or packed goes on."""
    source, folder = write_lines(tmp_path / "c.jsonl"), tmp_path / "out"
    model = shutil.copytree(tiny_bert_path, tmp_path / "model")
    encoded(model, source, folder)
    wanted = content(folder)
    error = refused(capsys, model, source, folder, "--dtype", "float16", "--max_len", 20, "--normalize_embeddings", "False")
    for words in ("dtype: 'float32' there, 'float16' here", "max_len: 130 there, 20 here", "normalize: True there, False here"):
        assert words in error
    changed = write_lines(tmp_path / "changed.jsonl", [*TEXTS[:-1], "another"])
    assert "the texts: 30 there, 30 here, and not the same" in refused(capsys, model, changed, folder)
    helpers.make_model("bert", model, hidden_act="relu")
    assert "the files of the model" in refused(capsys, model, source, folder)
    assert content(folder) == wanted
    shutil.rmtree(model)
    shutil.copytree(tiny_bert_path, model)
    os.utime(source, ns=(1, 1))
    encoded(model, compressed(tmp_path / "c.jsonl.gz", source.read_bytes()), folder)
    assert content(folder) == wanted

    bad = write_lines(tmp_path / "bad.jsonl", [*TEXTS, ""])
    assert "bad.jsonl:31" in refused(capsys, model, bad, folder, "--overwrite")
    assert content(folder) == wanted  # not removed before the new input is known to be good
    vectors = encoded(model, changed, folder, "--overwrite", "--dtype", "float16")
    assert vectors.dtype == "float16" and vectors.verify() == []
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"texts": 30', '"texts": 29'))
    assert "it was edited or damaged" in refused(capsys, model, source, folder)
    again = encoded(model, source, folder, "--overwrite")
    assert again.manifest.fingerprint == json.loads(wanted["manifest.json"])["fingerprint"]
    assert {**content(folder), "manifest.json": b""} == {**wanted, "manifest.json": b""}  # which has the time of the input


def test_a_job_that_was_taken_over_stops(tmp_path, monkeypatch, capsys, tiny_bert_path):
    """A run whose output another run has replaced meanwhile must not add its blocks to the other's."""
    source, folder = write_lines(tmp_path / "c.jsonl"), tmp_path / "out"
    write_block = output.write_block

    def taken(*args):
        monkeypatch.setattr(output, "write_block", write_block)
        assert start(tmp_path, -1, *flags(tiny_bert_path, source, folder, "--dim", "8", "--overwrite")).returncode == 0
        write_block(*args)

    monkeypatch.setattr(output, "write_block", taken)
    assert encode.main(flags(tiny_bert_path, source, folder)) == 2
    assert "another run has replaced or finished what is there" in capsys.readouterr().err
    assert open_vectors(folder).shape == (30, 8) and open_vectors(folder).verify() == []


def test_a_full_disk_is_a_clear_error(tmp_path, capsys, tiny_bert_path):
    """Seen beforehand, the need is named; met in the middle, the file is, and the run goes on once there is room."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    source, disk = write_lines(tmp_path / "c.jsonl", TEXTS * 40), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        assert "the vectors take 153,600 bytes, and " in refused(capsys, tiny_bert_path, source, disk / "out")
        (disk / "filler").write_bytes(bytes(50_000))
        words = flags(tiny_bert_path, source, disk / "out", "--dim", "8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
            assert encode.main(words) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert not list(disk.glob("out/vectors*.partial")) and (disk / "out/job.json").exists()
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert encode.main(words) == 0
        assert "blocks are finished" in capsys.readouterr().err and open_vectors(disk / "out").verify() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_reader_is_numpys_and_help_needs_no_torch(tmp_path, tiny_bert_path):
    """What was written opens in a process that has neither torch nor this package's models, and --help answers at once."""
    folder = encoded(tiny_bert_path, write_lines(tmp_path / "c.jsonl"), tmp_path / "out").folder
    code = (
        "import sys; from bge_ds.encoding.vectors import open_vectors; from bge_ds import encode; encode.parser();"
        f"v = open_vectors({str(folder)!r}); print(v[3].shape, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=helpers.environment(PYTHONPATH=helpers.PYTHONPATH)
    )
    assert done.stdout.split("\n")[0] == "(32,) False False", done.stderr
    assert np.load(io.BytesIO((folder / "vectors-000000.npy").read_bytes())).shape == (BLOCK, 32)
