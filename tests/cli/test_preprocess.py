"""The preprocess command and `prepare`: one output whatever the workers, bad input named, nothing half-written."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import numpy as np
import pytest

from bge_ds import preprocess
from bge_ds.data.preprocess import input_files, prepare, validate, workers
from bge_ds.data.shards import digests, integrity, manifest_file, shard_reader

WHOLE = ["pretrain", "--input", "nowhere.jsonl", "--output", "o", "--tokenizer", "t"]
GROUPS = [
    {"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"answer {(i + j) % 40}" for j in (1, 2, 2)]} for i in range(40)
]


def write(path, rows) -> str:
    data = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def run(kind, given, output, tokenizer, *more) -> int:
    given = [given] if isinstance(given, str) else given
    return preprocess.main([kind, "--input", *given, "--output", str(output), "--tokenizer", str(tokenizer), *more])


def contents(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# -------------------------------------------------------------------------------------------------------------- rows


def test_passages_are_stored_once_and_keep_their_places(tmp_path, minilm_path):
    """40 lines name 160 passages, 40 of them distinct; a text repeated in a line keeps its place, as the draw needs."""
    data = write(tmp_path / "a.jsonl", GROUPS)
    assert run("finetune", data, tmp_path / "s", minilm_path, "--passage_max_len", "16") == 0
    opened = shard_reader.open_folder(tmp_path / "s")
    assert opened.manifest.counts["passages"] == opened.num_passages == 40
    assert opened.manifest.counts["duplicates"] == 120 and len(opened) == 40
    tokenizer = validate.load_tokenizer(minilm_path)
    for row, line in enumerate(GROUPS):
        group = opened.group(row)
        assert tokenizer.decode(group.query, skip_special_tokens=True) == line["query"]
        for name, rows in (("pos", group.pos), ("neg", group.neg)):
            assert [tokenizer.decode(opened.passage(p), skip_special_tokens=True) for p in rows] == line[name]
        assert group.neg[1] == group.neg[2] != group.neg[0]
    assert len(set(opened.hashes(np.arange(40)).tolist())) == 40


@pytest.mark.core
def test_settings_reach_the_rows_and_the_manifest(tmp_path, tiny_tokenizer_path):
    """Instructions stand before the text, a line's own prompt replaces the query's, lengths cut, scores stay."""
    tokenizer = validate.load_tokenizer(tiny_tokenizer_path)
    lines = [
        {"query": "fox", "pos": ["dog", "the lazy dog"], "neg": [], "pos_scores": [1, 0.25], "type": "sym"},
        {"query": "fox", "pos": ["vector space " * 20], "neg": ["space"], "neg_scores": [-1.5], "prompt": "dog: "},
        {"query": "fox", "pos": ["dog"], "prompt": ""},
    ]
    more = ["--query_instruction_for_retrieval", "query: ", "--passage-instruction-for-retrieval", "passage: "]
    more += ["--query_max_len", "30", "--passage_max_len", "40"]
    assert run("finetune", write(tmp_path / "a.jsonl", lines), tmp_path / "s", tiny_tokenizer_path, *more) == 0
    data = shard_reader.open_folder(tmp_path / "s")
    queries = [data.group(row).query.tolist() for row in range(3)]
    assert queries == tokenizer(["query: fox", "dog: fox", "fox"])["input_ids"]
    wanted = [f"passage: {text}" for text in ("dog", "the lazy dog", "vector space " * 20, "space")]
    ids = tokenizer(wanted, truncation=True, max_length=40)["input_ids"]
    assert [data.passage(p).tolist() for p in range(4)] == ids
    first, second, third = (data.group(row) for row in range(3))
    assert first.pos_scores.tolist() == [1, 0.25] and first.neg_scores is None and second.neg_scores.tolist() == [-1.5]
    assert third.pos.tolist() == [0]
    assert [data.notes(row) for row in range(3)] == [("sym", None), (None, "dog: "), (None, "")]
    manifest = data.manifest
    assert (manifest.query_max_len, manifest.passage_max_len) == (30, 40)
    assert manifest.query_instruction_for_retrieval == "query: "
    assert manifest.counts["cut_texts"] == 1 and manifest.counts["groups_without_negatives"] == 2
    assert manifest.tokenizer.fingerprint == validate.fingerprint(tokenizer)


@pytest.mark.core
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_output_does_not_depend_on_workers(tmp_path, tiny_tokenizer_path, monkeypatch, kind):
    """Every byte is the same for 1 and 3 workers, with many blocks and workers that forget passages."""
    monkeypatch.setattr(input_files, "BLOCK_BYTES", 300)
    monkeypatch.setattr(workers, "SEEN_LIMIT", 5)
    lines = GROUPS * 3
    if kind == "pretrain":
        lines = [{"text": f"{text} {i}"} for i in range(30) for text in helpers.SENTENCES]
    parts = [write(tmp_path / f"{name}.jsonl", part) for name, part in (("a", lines[:50]), ("b", lines[50:]))]
    for name, processes in (("one", "1"), ("three", "3")):
        more = ["--num_proc", processes, "--shard_bytes", "2000"]
        assert run(kind, parts, tmp_path / name, tiny_tokenizer_path, *more) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    manifest = manifest_file.read_manifest(tmp_path / "one")
    assert [source.rows for source in manifest.sources] == [(0, 50), (50, len(lines))]
    assert len(manifest.shards) > 2 and integrity.verify_folder(tmp_path / "one") == []


def test_inputs_of_several_forms_give_the_same_rows(tmp_path, tiny_tokenizer_path):
    """A file, a gzip file, a folder, a glob and a datasets folder are one data set in five coats."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "in"
    folder.mkdir()
    given = [write(folder / "a.jsonl", GROUPS), write(tmp_path / "b.json.gz", GROUPS)]
    given += [str(folder), str(folder / "*.jsonl")]
    datasets.Dataset.from_list(GROUPS).save_to_disk(tmp_path / "d")
    found = set()
    for i, one in enumerate([*given, str(tmp_path / "d")]):
        assert run("finetune", one, tmp_path / f"s{i}", tiny_tokenizer_path) == 0
        found.add(shard_reader.open_folder(tmp_path / f"s{i}").fingerprint)
    assert len(found) == 1


def test_real_data(tmp_path, shared_data, minilm_path):
    """1,500 Chinese groups: each distinct text is one passage, hashes do not collide, and the output verifies."""
    source = str(shared_data / "drcd_zh" / "train.jsonl.gz")
    assert run("finetune", source, tmp_path / "s", minilm_path) == 0
    with gzip.open(source) as file:
        texts = {text for line in file for text in (lambda r: r["pos"] + r["neg"])(json.loads(line))}
    data = shard_reader.open_folder(tmp_path / "s")
    assert (len(data), data.num_passages) == (1500, len(texts))
    assert len(set(data.hashes(np.arange(data.num_passages)).tolist())) == len(texts)
    assert preprocess.main(["verify", str(tmp_path / "s")]) == 0


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.jsonl", [GROUPS[0], b"{oops\n"], r"a\.jsonl:2: not JSON"),
        ("a.jsonl", [GROUPS[0], b"\n", {"query": "q", "pos": []}], r"a\.jsonl:3: \"pos\" is empty"),
        ("a.jsonl", [GROUPS[0], {"query": "q", "pos": ["\u200b"]}], r"a\.jsonl:2: \"pos\"\[0\] is an empty text to"),
        ("a.jsonl", [GROUPS[0], GROUPS[1] | {"prompt": "a b c " * 30}], r"a\.jsonl:2: \"prompt\": query_max_len 32"),
        ("a.jsonl.gz", [GROUPS[0], b'{"query": "\xff"}\n'], r"a\.jsonl\.gz:2: not UTF-8"),
        ("a.jsonl", [], r"a\.jsonl: the file is empty"),
        ("a.jsonl", [b"\n \r\n"], r"a\.jsonl: the file is empty"),
        ("a.txt", GROUPS, r"unknown kind of file: .*a\.txt"),
        ("a.jsonl", [{"query": "q", "pos": ["p"]}], r"a\.jsonl:1: nothing to compare against"),
        ("a.jsonl", [{"query": q, "pos": ["p"]} for q in "qr"], r"a\.jsonl:1: nothing to compare against"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, minilm_path, capsys, name, rows, message):
    """The error names file and line, the exit status is 2, and no folder, whole or partial, is left behind."""
    given = write(tmp_path / name, rows)
    assert run("finetune", given, tmp_path / "s", minilm_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_first_bad_line_is_reported_whatever_the_workers(tmp_path, tiny_tokenizer_path, monkeypatch, capsys):
    """Blocks end in any order; the message must be that of the first bad line of the input."""
    monkeypatch.setattr(input_files, "BLOCK_BYTES", 200)
    rows = [*GROUPS[:30], b"{first\n", *GROUPS[:5], b"{second\n"]
    given = write(tmp_path / "a.jsonl", rows)
    assert run("finetune", given, tmp_path / "s", tiny_tokenizer_path, "--num_proc", "3") == 2
    assert "a.jsonl:31: not JSON" in capsys.readouterr().err


def test_skipping_counts_and_lists_the_lines(tmp_path, tiny_tokenizer_path, capsys):
    """Skipped lines are counted, shown and listed, and leave no passage behind; the good ones are as without them."""
    # A later good line has the passage "answer 20" as well: the bad line must not make it count as sent.
    bad = [b"{oops\n", {"query": "q", "pos": ["only in a bad line", "answer 20", "\u200b"]}] + [b"[]\n"] * 30
    given = [write(tmp_path / "a.jsonl", [*GROUPS[:3], *bad, *GROUPS[3:]]), write(tmp_path / "e.jsonl", [])]
    assert run("finetune", given, tmp_path / "s", tiny_tokenizer_path, "--on_error", "skip") == 0
    shown = capsys.readouterr().out
    assert "a.jsonl:4: not JSON" in shown and "skipped 33 lines in all" in shown
    assert sum(line.startswith("skipped ") for line in shown.splitlines()) == 21
    listed = [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert len(listed) == 33 and listed[1]["line"] == 5 and '"pos"[2] is an empty text' in listed[1]["reason"]
    assert listed[-1] == {"file": given[1], "line": 0, "reason": "the file is empty"}
    data = shard_reader.open_folder(tmp_path / "s")
    assert (len(data), data.num_passages, data.manifest.counts["skipped"]) == (40, 40, 33)


def test_overwriting_is_asked_for(tmp_path, tiny_tokenizer_path, capsys):
    """A second run into the same folder is refused unless --overwrite is given, which replaces the whole."""
    given = write(tmp_path / "a.jsonl", GROUPS)
    assert run("finetune", given, tmp_path / "s", tiny_tokenizer_path) == 0
    assert run("finetune", given, tmp_path / "s", tiny_tokenizer_path) == 2
    assert "is not empty" in capsys.readouterr().err
    write(tmp_path / "a.jsonl", GROUPS[:7])
    assert run("finetune", given, tmp_path / "s", tiny_tokenizer_path, "--overwrite") == 0
    assert len(shard_reader.open_folder(tmp_path / "s")) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "s"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: command"),
        (["inspect"], "the following arguments are required: folder"),
        (["inspect", "nowhere"], "nowhere is not a folder of shards"),
        (["verify", "nowhere"], "nowhere is not a folder of shards"),
        (["pretrain", "--input", "a"], "required: --output, --tokenizer"),
        ([*WHOLE, "--query_max_len", "3"], "unrecognized arguments: --query_max_len 3"),
        ([*WHOLE, "--num_proc", "-1"], "--num_proc -1: give 0 or more"),
        (WHOLE, "no file nowhere.jsonl"),
    ],
)
def test_wrong_commands_are_one_line(argv, message, capsys):
    """A wrong flag ends with status 2 and a line that names it, without a traceback."""
    assert preprocess.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_inspect_and_verify_show_what_is_inside(tmp_path, tiny_tokenizer_path, capsys):
    """Inspecting decodes samples, words apart; verifying names the damaged shard and ends with status 2."""
    given = write(tmp_path / "a.jsonl", [{"text": text} for text in helpers.SENTENCES])
    assert run("pretrain", given, tmp_path / "s", tiny_tokenizer_path, "--max_seq_length", "64") == 0
    assert preprocess.main(["inspect", str(tmp_path / "s"), "--sample", "2"]) == 0
    shown = capsys.readouterr().out
    assert "pretrain shards, schema version 2" in shown and "max_seq_length  64" in shown and "6 texts" in shown
    assert "--- row 5" in shown and "[CLS] the quick" in shown.replace("+##", "") and shown.count("--- row") == 2
    assert preprocess.main(["verify", str(tmp_path / "s")]) == 0
    shard = tmp_path / "s" / "texts-00000-000000.arrow"
    shard.write_bytes(shard.read_bytes()[::-1])
    assert preprocess.main(["verify", str(tmp_path / "s")]) == 2
    assert "texts-00000-000000.arrow: corrupted shard" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers by /proc, which Linux has")
def test_a_killed_run_leaves_no_folder_and_no_worker(tmp_path, tiny_tokenizer_path):
    """SIGKILL in the middle: the output's name does not exist, and the workers end with their parent."""
    given = tmp_path / "a.jsonl"
    line = json.dumps({"text": " ".join(helpers.SENTENCES) * 20}).encode() + b"\n"
    given.write_bytes(line * 20000)
    command = [sys.executable, "-m", "bge_ds.preprocess", "pretrain", "--input", given, "--output", tmp_path / "s"]
    command += ["--tokenizer", tiny_tokenizer_path, "--num_proc", "2", "--shard_bytes", "1000"]
    process = subprocess.Popen(command, cwd=helpers.REPO, env=helpers.environment(), stderr=subprocess.DEVNULL)
    until, listing = time.monotonic() + 60, Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children: list[str] = []
    while len(children) < 2 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
        children = listing.read_text().split() if any(tmp_path.glob(".s.partial-*/*.arrow")) else []
    assert len(children) == 2, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "s").exists()
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children), "workers outlive their parent"


def test_words_of_a_segmenter_reach_the_shards(tmp_path, tiny_tokenizer_path, capsys):
    """The manifest names the segmenter, a cache has its own for each, and shards of other words are refused."""
    pytest.importorskip("jieba")
    given = write(tmp_path / "a.jsonl", [{"text": "北京是中华人民共和国的首都"}])
    words = {}
    for name in ("none", "jieba"):
        assert run("pretrain", given, tmp_path / name, tiny_tokenizer_path, "--word_segmenter", name) == 0
        data = shard_reader.open_folder(tmp_path / name)
        assert data.manifest.word_segmenter == name
        words[name] = data.words(0)
    assert words["none"].tolist() == list(range(15)) and words["jieba"][-1] < 14
    tokenizer, explicit = validate.load_tokenizer(tiny_tokenizer_path), frozenset({"word_segmenter"})
    caches = {
        prepare.prepare("pretrain", given, tokenizer, word_segmenter=name, cache_dir=str(tmp_path / "c")) for name in words
    }
    assert len(caches) == 2
    assert prepare.prepare("pretrain", str(tmp_path / "jieba"), tokenizer) == tmp_path / "jieba"
    with pytest.raises(ValueError, match="word_segmenter 'none' differs from the 'jieba' in"):
        prepare.prepare("pretrain", str(tmp_path / "jieba"), tokenizer, word_segmenter="none", explicit=explicit)
    assert preprocess.main(["inspect", str(tmp_path / "jieba"), "--sample", "0"]) == 0
    assert "word_segmenter  'jieba'" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ prepare


@pytest.fixture
def tokenizer(tiny_tokenizer_path):
    return validate.load_tokenizer(tiny_tokenizer_path)


def test_json_lines_are_preprocessed_once(tmp_path, tokenizer):
    """The second run finds the cache; changed bytes, lengths or instructions each make a cache of their own."""
    given, said = write(tmp_path / "a.jsonl", GROUPS), []
    how = {"cache_dir": str(tmp_path / "cache"), "say": said.append}
    first = prepare.prepare("finetune", given, tokenizer, **how)
    assert prepare.prepare("finetune", given, tokenizer, query_max_len=32, **how) == first
    assert re.match(r"warning: \d+ % of the tokens are unknown to ", said.pop(0))
    assert said == [f"preprocessed 40 groups into {first}", f"using the cache {first}"]
    assert len(shard_reader.open_folder(first)) == 40
    others = [
        prepare.prepare("finetune", given, tokenizer, query_max_len=31, **how),
        prepare.prepare("finetune", given, tokenizer, query_instruction="q: ", **how),
        prepare.prepare("finetune", given, tokenizer, on_error="skip", **how),
    ]
    before = os.stat(given)
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"question 7", b"question 8"))
    os.utime(given, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time, other bytes
    others.append(prepare.prepare("finetune", given, tokenizer, **how))
    assert len({first, *others}) == 5


def test_a_file_is_hashed_once(tmp_path, tokenizer, monkeypatch):
    """The processes of a host must not each read all of a large input to name its cache; a changed file is read again."""
    given, read = write(tmp_path / "a.jsonl", GROUPS), []
    original = digests.hash_file
    monkeypatch.setattr(digests, "hash_file", lambda path: (read.append(path.name), original(path))[1])
    how = {"cache_dir": str(tmp_path / "cache"), "say": lambda line: None}
    first = prepare.prepare("finetune", given, tokenizer, **how)
    assert prepare.prepare("finetune", given, tokenizer, **how) == first
    files = ["a.jsonl", "passages-00000-000000.arrow", "groups-00000-000000.arrow"]
    assert read == files
    assert prepare.prepare("finetune", given, tokenizer, **how) == first and read == files
    write(tmp_path / "a.jsonl", GROUPS[:-1])
    assert prepare.prepare("finetune", given, tokenizer, **how) != first and read == [*files, "a.jsonl"]
    (tmp_path / "cache" / "bge_ds" / digests.NAME).write_bytes(b"{")  # a hand or a full disk
    prepare.prepare("finetune", given, tokenizer, **how)
    assert read == [*files, "a.jsonl", *files]


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_no_run_begins_on_a_flipped_byte(tmp_path, tokenizer):
    """A folder given to a trainer is held against its hashes before anything of it is read; the shard is named."""
    assert run("finetune", write(tmp_path / "a.jsonl", GROUPS), tmp_path / "s", tokenizer.name_or_path) == 0
    made, how = str(tmp_path / "s"), {"cache_dir": str(tmp_path / "cache")}
    assert prepare.prepare("finetune", made, tokenizer, **how) == tmp_path / "s"
    flip(tmp_path / "s" / "groups-00000-000000.arrow")
    with pytest.raises(ValueError, match=r"groups-00000-000000\.arrow: corrupted shard, hash \w+, the manifest says"):
        prepare.prepare("finetune", made, tokenizer, **how)
    assert prepare.prepare("finetune", made, tokenizer, verify_data=False, **how) == tmp_path / "s"


def test_a_damaged_cache_is_made_anew(tmp_path, tokenizer):
    """A cache that a full disk or a hand cut short, or where a byte flipped, is rebuilt, not trained on and not an error."""
    given, said = write(tmp_path / "a.jsonl", GROUPS), []
    how = {"cache_dir": str(tmp_path / "cache"), "say": said.append}
    folder = prepare.prepare("finetune", given, tokenizer, **how)
    (folder / "groups-00000-000000.arrow").write_bytes(b"")
    assert prepare.prepare("finetune", given, tokenizer, **how) == folder
    assert "preprocessed" in said[-1] and integrity.verify_folder(folder) == []
    flip(folder / "passages-00000-000000.arrow")
    assert prepare.prepare("finetune", given, tokenizer, **how) == folder
    assert "preprocessed" in said[-1] and integrity.verify_folder(folder) == []


def test_processes_of_a_host_build_once(tmp_path, tokenizer, monkeypatch):
    """Four callers at the same time: one builds, the others wait for it and use what it made."""
    given, built, said = write(tmp_path / "a.jsonl", GROUPS), [], []
    original = prepare.build

    def slow(*args, **kwargs):
        built.append(args)
        time.sleep(0.5)
        return original(*args, **kwargs)

    monkeypatch.setattr(prepare, "build", slow)
    found: list[object] = []

    def call():
        found.append(prepare.prepare("finetune", given, tokenizer, cache_dir=str(tmp_path / "c"), say=said.append))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(built) == 1 and len(found) == 4 and len(set(found)) == 1
    assert sum("waiting for another process" in line for line in said) == 3


def test_several_entries_are_one_cache_or_one_each(tmp_path, tokenizer, tiny_tokenizer_path):
    """JSON lines alone go into one cache, as ever; beside a folder of shards, or where weights need it, each into its own."""
    given = [write(tmp_path / f"{name}.jsonl", [{"text": name}, {"text": "more"}]) for name in "abc"]
    shared = prepare.prepare_all("pretrain", given, tokenizer, cache_dir=tmp_path / "cache")
    assert shared == [prepare.prepare("pretrain", given, tokenizer, cache_dir=tmp_path / "cache")]
    apart = prepare.prepare_all("pretrain", given, tokenizer, True, cache_dir=tmp_path / "cache")
    assert len(set(apart)) == 3 and all(len(shard_reader.open_folder(folder)) == 2 for folder in apart)
    assert run("pretrain", given[1], tmp_path / "s", tiny_tokenizer_path, "--max_seq_length", "512") == 0
    beside = prepare.prepare_all("pretrain", [given[0], str(tmp_path / "s")], tokenizer, cache_dir=tmp_path / "cache")
    assert beside == [apart[0], tmp_path / "s"]


def test_an_error_while_building_leaves_no_cache(tmp_path, tokenizer):
    """A bad line must be reported again by the next run, not be hidden by a cache that holds half the data."""
    given = write(tmp_path / "a.jsonl", [*GROUPS, b"{oops\n"])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl:41: not JSON"):
            prepare.prepare("finetune", given, tokenizer, cache_dir=str(tmp_path / "c"))
    assert [path for path in (tmp_path / "c" / "bge_ds").iterdir() if path.is_dir()] == []


@pytest.fixture
def made(tmp_path, tiny_tokenizer_path):
    more = ["--query_max_len", "16", "--passage_max_len", "32", "--query_instruction_for_retrieval", "query: "]
    assert run("finetune", write(tmp_path / "a.jsonl", GROUPS), tmp_path / "s", tiny_tokenizer_path, *more) == 0
    return tmp_path / "s"


def test_shards_that_fit_are_used_as_they_are(made, tokenizer):
    """Shorter lengths are the loader's to cut, and flags that the user did not give are not held against shards."""
    assert prepare.prepare("finetune", str(made), tokenizer, query_max_len=32, passage_max_len=128) == made
    asked = frozenset({"query_max_len", "passage_max_len", "query_instruction_for_retrieval"})
    found = prepare.prepare(
        "finetune", made, tokenizer, query_max_len=8, passage_max_len=32, query_instruction="query: ", explicit=asked
    )
    assert found == made


@pytest.mark.parametrize(
    ("kind", "flag", "given", "message"),
    [
        ("pretrain", "", {}, "holds finetune shards, pretrain ones are needed"),
        ("finetune", "query_max_len", {"query_max_len": 17}, r"17 is longer than the 16 that .* --query_max_len 17"),
        (
            "finetune",
            "query_instruction_for_retrieval",
            {"query_instruction": "q "},
            "query_instruction_for_retrieval 'q ' differs from the 'query: '",
        ),
        (
            "finetune",
            "passage_instruction_for_retrieval",
            {"passage_instruction": "p"},
            "passage_instruction_for_retrieval 'p' differs from the ''",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused_with_the_command_that_mends_it(made, tokenizer, kind, flag, given, message):
    """Training on rows cut shorter, or prefixed otherwise, than the flags say would be silent and wrong."""
    with pytest.raises(ValueError, match=message) as caught:
        prepare.prepare(kind, str(made), tokenizer, explicit=frozenset({flag}), **given)
    assert f"python -m bge_ds.preprocess {kind} --input" in str(caught.value)


def test_shards_of_another_tokenizer_are_refused(made, minilm_path):
    """Ids of another vocabulary are valid numbers and wrong words: only the fingerprint tells."""
    with pytest.raises(ValueError, match=r"was made with another tokenizer: .* this run's is"):
        prepare.prepare("finetune", str(made), validate.load_tokenizer(minilm_path))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_bad_lines_keep_their_order_whoever_finds_them(tmp_path, minilm_path, on_error, capsys):
    """The reader sees a broken line before the tokenizer sees an earlier empty one: still the first of them is named."""
    good = b'{"text": "a text"}'
    lines = [good, good, b'{"text": "[SEP]"}', good, b"{oops", good, b'{"text": "[PAD] [SEP]"}', good]
    given = tmp_path / "a.jsonl"
    given.write_bytes(b"\n".join(lines))
    argv = ["pretrain", "--input", str(given), "--output", str(tmp_path / "s"), "--tokenizer", str(minilm_path)]
    assert preprocess.main([*argv, "--on_error", on_error]) == (2 if on_error == "raise" else 0)
    said = capsys.readouterr()
    if on_error == "raise":
        assert f'{given}:3: "text" is an empty text to this tokenizer' in said.err and "oops" not in said.err
        return
    assert [line.split(":")[1] for line in said.out.splitlines() if line.startswith("skipped /")] == ["3", "5", "7"]
    assert manifest_file.read_manifest(tmp_path / "s").counts["texts"] == 5


def test_the_command_needs_no_torch(tmp_path, minilm_path):
    """Importing torch takes seconds and memory of each worker; the shards are those of a process that has it."""
    (tmp_path / "a.jsonl").write_text('{"text": "the quick fox"}\n')
    argv = ["pretrain", "--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(minilm_path), "--output"]
    script = "import sys; from bge_ds import preprocess; assert preprocess.main(sys.argv[1:], alone=True) == 0; "
    script += "assert not {'torch', 'pandas'} & set(sys.modules); import torch; assert torch.ones(1).sum() == 1"
    done = subprocess.run(
        [sys.executable, "-c", script, *argv, str(tmp_path / "s")], env=helpers.environment(), cwd=helpers.REPO,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr
    assert preprocess.main([*argv, str(tmp_path / "t")]) == 0
    found, wanted = (manifest_file.read_manifest(tmp_path / name).fingerprint for name in "st")
    assert found == wanted
