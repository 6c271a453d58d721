"""The benchmark drivers of training: what makes their comparisons fair, and their rows. No peer is run here."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from helpers import REPO, SENTENCES
from transformers import AutoTokenizer


@pytest.fixture
def driver(monkeypatch):
    """The modules as the script sees them, with its own folder first on the path."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import contrastive
    import rows
    import sides

    yield contrastive, rows, sides
    forget_drivers()


@pytest.fixture
def pretraining(monkeypatch):
    """The driver of pre-training and what it asks of our own side, the same way."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import own_pretraining
    import pretraining

    yield pretraining, own_pretraining
    forget_drivers()


def forget_drivers() -> None:
    for name in ("contrastive", "pretraining", "own_pretraining", "own_parts", "comparing", "rows", "sides"):
        sys.modules.pop(name, None)


def write_source(path, negatives: list[int]) -> None:
    """Groups of which no two have the same number of tokens, so that another order would show in the tokens of a step."""
    words = SENTENCES[0].split()
    groups = [{"query": " ".join(words[: i + 1]), "pos": ["first", "second"], "neg": [f"n{i}{j}" for j in range(n)]}
              for i, n in enumerate(negatives)]  # fmt: skip
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))


def test_data_leaves_nothing_to_draw(driver, tmp_path):
    """Every side must compute the same texts: one positive, exactly the negatives a group takes; too few groups is an error."""
    _, _, sides = driver
    write_source(tmp_path / "in.jsonl", [3, 1, 2, 5])
    sides.write_groups(tmp_path / "in.jsonl", tmp_path / "out.jsonl", groups=3, negatives=2)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [group["pos"] for group in found] == [["first"]] * 3
    assert [group["neg"] for group in found] == [["n00", "n01"], ["n20", "n21"], ["n30", "n31"]]
    with pytest.raises(ValueError, match=r"3 groups have 2 negatives or more, 4 are needed"):
        sides.write_groups(tmp_path / "in.jsonl", tmp_path / "out.jsonl", groups=4, negatives=2)


def test_sides_with_other_tokens_are_refused(driver):
    """A speed ratio between sides that computed different texts would be meaningless; a failed side is marked, not compared."""
    contrastive, _, sides = driver
    setting = sides.Setting("x", batch=2, group=2, steps=2, warmup=1)

    def side(tokens):
        record = {"seconds": [9.0, 2.0], "tokens": [7, tokens], "padded": [7, 200], "peak_bytes": 1, "versions": {}}
        return lambda setting, run: record

    def broken(setting, run):
        raise sides.SideFailed("no such environment")

    results = contrastive.compare(setting, None, {"bge_ds": side(100), "a": side(100), "b": broken}, repeats=2)
    assert [result.seconds for result in results] == [[2.0, 2.0], [2.0, 2.0], []]
    assert [result.note for result in results] == ["", "", "failed"]
    with pytest.raises(ValueError, match="not the same texts"):
        contrastive.compare(setting, None, {"bge_ds": side(100), "a": side(101)}, repeats=1)


def test_rows_say_how_ours_compares(driver, tmp_path):
    """A peer's row holds ours by theirs: speed as a multiple, memory as a share; a second run appends to the same file."""
    _, rows, sides = driver
    setting = sides.Setting("x", batch=2, group=2, steps=2, warmup=1)
    ours = sides.Result("bge_ds", [1.0, 2.0, 1.0], [100] * 3, [100] * 3, 2**30, {"torch": "1"})
    peer = sides.Result("peer", [4.0, 4.0, 5.0], [100] * 3, [200] * 3, 4 * 2**30)
    made = rows.rows_of(setting, [ours, peer, sides.Result("part", figure=0.12345)], "here")
    for _ in range(2):
        rows.append_rows(tmp_path / "rows.csv", made)
    with (tmp_path / "rows.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6 and tuple(found[0]) == rows.COLUMNS
    assert (found[0]["tokens_per_second"], found[0]["lowest"], found[0]["ours_times_as_fast"]) == ("100", "50", "")
    assert (found[1]["ours_times_as_fast"], found[1]["ours_share_of_memory"]) == ("4.00", "0.25")
    assert (found[1]["peak_MiB"], found[1]["padding"]) == ("4096", "0.50")
    assert (found[2]["figure"], found[2]["tokens_per_second"]) == ("0.123", "")


def test_own_side_reads_the_commands_figures(driver, tmp_path, tiny_bert_path):
    """Our side is the real command, and the parts measured apart are of exactly its batches: the same tokens step by step."""
    contrastive, _, sides = driver
    write_source(tmp_path / "in.jsonl", [2] * 9)
    sides.write_groups(tmp_path / "in.jsonl", tmp_path / "groups.jsonl", groups=9, negatives=2)
    run = sides.Run(envs=tmp_path, work=tmp_path / "work", threads=1)
    setting = sides.Setting(
        "x", batch=3, group=3, steps=3, warmup=1, model=str(tiny_bert_path), data=str(tmp_path / "groups.jsonl"),
        query_max_len=16, passage_max_len=16,
    )  # fmt: skip
    ours, share, products, used = contrastive.step_parts(setting, run, repeats=1)
    assert len(ours.seconds) == 2 and min(ours.seconds) > 0 and ours.peak_bytes > 2**20
    assert share.figure > 0 and products.figure > 1 and 0 < used.figure < 1
    with pytest.raises(sides.SideFailed, match="make_environments"):
        sides.flagembedding(replace(setting, what="y"), run)


# ----------------------------------------------------------------------------------------------- pre-training


def texts_of(own_pretraining, folder, model, *, count: int, least_tokens: int) -> list[str]:
    """Texts as the driver has them written, from sentences of which some come twice."""
    groups = [{"query": "q", "pos": [text], "neg": []} for text in [*SENTENCES[:2], *SENTENCES]]
    (folder / "in.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    asked = {"source": str(folder / "in.jsonl"), "target": str(folder / "texts.jsonl"), "model": str(model)}
    own_pretraining.write_texts({"count": count, "least_tokens": least_tokens, **asked})
    return [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]


def test_texts_are_the_first_ones_and_full_ones_are_full(pretraining, tmp_path, tiny_bert_path):
    """Every side gets one file in order, each text once; a full text is long enough to be cut, of as few as that takes."""
    _, own = pretraining
    assert texts_of(own, tmp_path, tiny_bert_path, count=4, least_tokens=0) == SENTENCES[:4]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_path)
    one = len(tokenizer(SENTENCES[0])["input_ids"])
    found = texts_of(own, tmp_path, tiny_bert_path, count=2, least_tokens=one + 1)
    assert found[0] == " ".join(SENTENCES[:2])
    assert all(len(tokenizer(text)["input_ids"]) > one for text in found)
    with pytest.raises(SystemExit, match="4 are needed"):
        texts_of(own, tmp_path, tiny_bert_path, count=4, least_tokens=one + 1)


def test_pretraining_sides_compute_the_same_tokens(pretraining, tmp_path, tiny_bert_path):
    """The command, the plain trainer and the input pipeline, alone or through a worker, take the same texts in order."""
    driver, own = pretraining
    from sides import SideFailed

    texts_of(own, tmp_path, tiny_bert_path, count=6, least_tokens=0)
    run = driver.Run(envs=tmp_path, work=tmp_path / "work", threads=1)
    setting = driver.Pretraining(
        "x", batch=2, steps=3, warmup=1, model=str(tiny_bert_path), data=str(tmp_path / "texts.jsonl"), max_seq_length=16
    )
    sides = {"bge_ds": driver.ours, "plain": lambda setting, run: own.train_plain(asked)}
    for name, how in (("alone", {}), ("worker", {"worker": True}), ("masks", {"masks": True})):
        sides[name] = lambda setting, run, how=how: own.time_input({**asked, "rounds": 1, **how})
    asked = {**asdict(setting), "shards": str(driver.shards_of(setting, run))}
    results = driver.compare(setting, run, sides, repeats=1)
    assert [result.note for result in results] == ["", "", *["mean of 1 batches each"] * 3]
    assert all(result.tokens == results[0].tokens and len(result.tokens) == 2 for result in results)
    assert all(min(result.seconds) > 0 and result.peak_bytes > 2**20 for result in results)
    shares = driver.shares_of_rate(results[:2], own.measure_needed(asked))
    assert all(0 < share.figure < 1 for share in shares)
    with pytest.raises(SideFailed, match="make_environments"):
        driver.flagembedding(setting, run)


def test_texts_that_are_not_full_are_refused(pretraining):
    """A row that says full texts must be about texts that were all cut."""
    driver, _ = pretraining
    setting = driver.Pretraining("full", batch=2, steps=2, warmup=1, full=True, max_seq_length=8)
    good, short = (driver.Result("bge_ds", [1.0], [tokens], [16], 1) for tokens in (16, 15))
    assert driver.check_full(setting, [good, driver.Result("failed")])
    with pytest.raises(ValueError, match="full texts give 16"):
        driver.check_full(setting, [good, short])


def test_pretraining_rows_count_texts_and_say_what_was_not_measured(pretraining):
    """Texts a second are compared; an extrapolated peak has no speed, and its row says that nobody measured it."""
    driver, _ = pretraining
    setting = driver.Pretraining("vocabulary", batch=16, steps=3, warmup=1)
    ours = driver.Result("bge_ds", [2.0, 2.0], [100, 200], [100, 200], 2**30, {"torch": "1"})
    guessed = driver.extrapolated(16, [3 * 2**30, 4 * 2**30])
    made = driver.rows_of(setting, [ours, guessed], "here")
    assert (made[0]["texts_per_second"], made[0]["lowest"], made[0]["highest"], made[0]["group"]) == ("8", "8", "8", "")
    assert made[0]["max_seq_length"] == 512
    assert (made[1]["peak_MiB"], made[1]["texts_per_second"], made[1]["ours_times_as_fast"]) == ("18432", "", "")
    assert made[1]["ours_share_of_memory"] == "0.06" and made[1]["note"].startswith("NOT MEASURED")


def test_peers_tokens_are_counted_in_the_step(monkeypatch):
    """Of a trainer's batch only the masks of texts count, not the decoder's matrices, and the step gets its arguments."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks" / "peers"))
    import steps

    counter = steps.TokenCounter(lambda model, inputs, items: (model, inputs, items))
    mask_NL = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {
        "encoder_attention_mask": mask_NL,
        "decoder_attention_mask": torch.ones(2, 3, 3),
        "more": {"attention_mask": mask_NL},
    }
    assert counter("model", batch, 7) == ("model", batch, 7)
    assert (counter.tokens, counter.padded) == ([8], [12])
    sys.modules.pop("steps")
