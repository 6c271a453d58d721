"""A damaged state.json is a ValueError that names the file, and the field where it can be known; none is read silently."""

import json
import random

import pytest
from damage import damaged

from bge_ds.checkpoint import checkpoint, state_file
from bge_ds.checkpoint.state_file import STATE, State


def make(folder) -> tuple[bytes, State]:
    """(the file's bytes, the state) of a checkpoint that has a value for every field."""
    meter = {"steps": 2, "seconds": 0.5, "sums": {"loss": (3.25, 2.0), "reg": (float("nan"), 1.0)}, "skipped": (0, 1)}
    state = State(
        step=7, tokens_seen=900, best={"step": 5, "metric": "eval_nDCG@10", "value": 0.75}, ranks=2, zero_stage=1,
        asked={"per_device_train_batch_size": 4}, agreement={"seed": 1, "train_weights": [0.5, 0.5], "data_seed": None},
        files={"model": (8, "ab"), "sub/model": (9, "cd")}, meters=[meter, meter | {"sums": {}}],
    )  # fmt: skip
    folder.mkdir()
    state_file.write(folder, state)
    return (folder / STATE).read_bytes(), state


def test_300_damages_are_refused_or_without_effect(tmp_path):
    """No damage is a traceback of another kind, and what is read has every value as it was written: a run that resumed from
    another step or batch would not be the same run."""
    folder = tmp_path / "checkpoint-7"
    content, _ = make(folder)
    written = repr(state_file.read(folder))  # repr, as NaN is not equal to itself
    refused = named = 0
    for seed in range(300):
        spoiled, key = damaged(content, random.Random(seed))
        (folder / STATE).write_bytes(spoiled)
        try:
            assert repr(state_file.read(folder)) == written, (seed, key)
        except state_file.Damaged as error:
            assert str(folder / STATE) in str(error), (seed, error)
            refused += 1
            named += "$" in str(error) or "field `" in str(error)
        else:
            continue
        with pytest.raises(ValueError, match=r"checkpoint-7 is damaged: .*state\.json"):
            checkpoint.select(str(folder), tmp_path)
    assert refused > 250 and named > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "7"}, r"Expected `int`, got `str` - at `\$\.step`"),
        ({"tokens_seen": -1}, r"Expected `int` >= 0 - at `\$\.tokens_seen`"),
        ({"ranks": 0}, r"Expected `int` >= 1 - at `\$\.ranks`"),
        ({"best": {"step": 5, "value": 0.5}}, r"Object missing required field `metric` - at `\$\.best`"),
        ({"agreement": None}, r"Expected `object`, got `null` - at `\$\.agreement`"),
        ({"files": {"model": [8]}}, r"Expected `array` of length 2, got 1 - at `\$\.files\[\.\.\.\]`"),
        ({"meters": [{"steps": 1}]}, r"Object missing required field `seconds` - at `\$\.meters\[0\]`"),
    ],
)
def test_an_error_names_the_field(tmp_path, change, message):
    """A file of another shape says where the value lies and what belongs there, even where its checksum is right."""
    folder = tmp_path / "checkpoint-7"
    content = json.loads(make(folder)[0]) | change
    content["checksum"] = state_file._checksum(content)
    (folder / STATE).write_text(json.dumps(content))
    with pytest.raises(state_file.Damaged, match=rf"state\.json: {message}"):
        state_file.read(folder)


def test_what_is_written_is_read(tmp_path):
    """All fields, in the order and under the names that earlier versions wrote."""
    content, state = make(tmp_path / "checkpoint-7")
    names = ["format", "step", "tokens_seen", "best", "ranks", "zero_stage", "asked", "agreement", "files", "meters"]
    assert list(json.loads(content)) == [*names, "checksum"]
    assert repr(state_file.read(tmp_path / "checkpoint-7")) == repr(state)
