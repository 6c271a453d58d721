"""From arguments and shards to an order: what a set is, every mode's promises, and the table."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.data import dataloader
from bge_ds.data.sampling.sampler import EpochSampler
from bge_ds.data.shards.manifest_file import SourceEntry
from bge_ds.training import data_order
from bge_ds.training.step_plan import StepPlan

LENGTHS = np.random.default_rng(2).integers(5, 60, 400)


class Data:
    """What an order asks of opened shards: folders (each with files of so many rows), lengths, the `type` of a file's lines."""

    def __init__(self, *folders: tuple[int, ...], skipped: int | None = None, types: tuple[str | None, ...] = ()):
        self.folders, sources, first = [Path(f"f{k}") for k in range(len(folders))], [], 0
        for k, name in ((k, f"f{k}/{n}.jsonl") for k, sizes in enumerate(folders) for n in range(len(sizes))):
            size = folders[k][int(Path(name).stem)]
            sources.append(SourceEntry(path=name, rows=(first, first + size), folder=k, skipped=skipped))
            first += size
        self.manifest = SimpleNamespace(sources=sources, counts={"skipped": skipped or 0})

        self.types = dict(zip((source.rows for source in sources), types, strict=False))

    def notes(self, row):
        return next((of for (first, end), of in self.types.items() if first <= row < end), None), None

    def distinct(self, column):
        return set(self.types.values()) - {None}

    def scored(self):
        return [(0 if k == 1 else source.rows[1] - source.rows[0], 0) for k, source in enumerate(self.manifest.sources)]

    def lengths(self, rows_K, *longest):
        return LENGTHS[rows_K]


def arguments(*train_data: str, cls=FinetuneArguments, **flags):
    more = {} if cls is PretrainArguments else {"query_max_len": 30, "passage_max_len": 30}
    flags = {"per_device_train_batch_size": 8, **more, **flags}
    return cls.build(output_dir="o", train_data=list(train_data), model_name_or_path="m", **flags)


TWO = ("f0", "f1")
MODES = {
    "plain": (TWO, {}),
    "sequential": (TWO, {"train_sampling_strategy": "sequential"}),
    "weights": (("f0=3", "f1=1"), {}),
    "temperature": (TWO, {"mixing_temperature": 2.0}),
    "one set": (TWO, {"same_dataset_within_batch": True}),
    "one set, weights": (("f0=3", "f1=1"), {"same_dataset_within_batch": True}),
    "lengths": (TWO, {"group_by_length": True}),
    "lengths, weights": (("f0=3", "f1=1"), {"train_sampling_strategy": "group_by_length"}),
    "one set, lengths": (TWO, {"group_by_length": True, "same_dataset_within_batch": True}),
    "one set, lengths, temperature": (
        TWO, {"group_by_length": True, "same_dataset_within_batch": True, "mixing_temperature": 3.0},
    ),
}  # fmt: skip
EVERY_MODE = pytest.mark.parametrize(("entries", "flags"), MODES.values(), ids=MODES)
DATA = Data((100, 60, 0), (150,))


def order_of(entries, flags, most=None):
    more = {} if most is None else {"max_example_num_per_dataset": most}
    return data_order.make_order(arguments(*entries, **flags, **more), DATA)


def test_split_weights(tmp_path):
    """A weight follows the last '='; an entry that is a path as it stands has none."""
    odd = tmp_path / "k=3"
    odd.mkdir()
    assert data_order.split_weights(["a=1", "b=c=0.5"]) == (["a", "b=c"], [1.0, 0.5])
    assert data_order.split_weights([str(odd)]) == ([str(odd)], None)
    assert data_order.split_weights([f"{odd}=2", "x=1"]) == ([str(odd), "x"], [2.0, 1.0])


@pytest.mark.parametrize(
    ("entries", "flags", "message"),
    [
        (["a=1", "b"], {}, "--train_data b has no weight and other entries have one"),
        (["a=1", "b=-1"], {}, "b=-1: '-1' is no weight; give PATH=NUMBER"),
        (["a=1", "b=x"], {}, "b=x: 'x' is no weight"),
        (["a=2"], {}, "a=2: the weight of a single entry has no effect"),
        (["a", "a"], {}, "a path stands twice"),
        (
            ["f0=1", "f1=2"],
            {"mixing_temperature": 2.0},
            "--mixing_temperature and the weights of --train_data exclude each other",
        ),
        (["f0=1", "f1=1e-12"], {}, "the share of f1 is below one text in a thousand million"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(entries, flags, message):
    with pytest.raises(ValueError, match=message):
        order_of(entries, flags)


@pytest.mark.parametrize("flags", [{"mixing_temperature": 2.0}, {"same_dataset_within_batch": True}])
def test_a_single_set_cannot_be_mixed(flags):
    """A setting without an effect is an error."""
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} has no effect: f0 is a single set"):
        data_order.make_order(arguments("f0", **flags), Data((50, 0)))


def test_an_entry_without_rows_has_no_share():
    with pytest.raises(ValueError, match="--train_data f1 holds no rows"):
        data_order.make_order(arguments("f0=1", "f1=1"), Data((50,), (0,)))


def test_without_a_mixture_the_order_is_that_of_earlier_versions():
    """Several folders are one line over all their files, as one folder's files are: a run of before goes on."""
    order = order_of(*MODES["plain"], most=70)
    assert order == EpochSampler(42, ((0, 100), (100, 160), (160, 160), (160, 310)), 8, 70)


def test_shares():
    """Weights are shares as they stand; a temperature gives rows ** (1/T); one set a batch divides an entry over its files."""
    weighted, warm = order_of(*MODES["weights"]), order_of(*MODES["temperature"])
    assert weighted.texts_of_sets(4000) == pytest.approx([3000, 1000], abs=4)
    root = np.sqrt([160, 150])
    assert warm.texts_of_sets(4000) == pytest.approx(4000 * root / root.sum(), abs=4)
    batches = order_of(*MODES["one set, weights"])
    assert batches.texts_of_sets(32000) == pytest.approx([24000 * 100 / 160, 24000 * 60 / 160, 8000], abs=8 * 4)
    files = data_order.make_order(arguments("f0", mixing_temperature=2.0), Data((100, 25)))
    assert files.texts_of_sets(3000) == pytest.approx([2000, 1000], abs=4)


@EVERY_MODE
@pytest.mark.parametrize("most", [None, 40])
def test_every_text_once_an_epoch_of_its_set(entries, flags, most):
    """In every mode a text is visited once in each epoch of its set: after a long run, texts differ by what the last window,
    or the set's begun epoch, holds; with max_example_num_per_dataset, the same subsample of each file."""
    order = order_of(entries, flags, most)
    found = [order.step_rows(step) for step in range(400)]
    epochs, rows = (np.concatenate(part) for part in zip(*found, strict=True))
    assert len(np.unique(epochs * 10_000 + rows)) == len(rows)
    kept = [len(np.unique(rows[(rows >= a) & (rows < b)])) for a, b in ((0, 100), (100, 160), (160, 310))]
    assert kept == ([100, 60, 150] if most is None else [40, 40, 40])
    window = 512 / 40 if "group" in str(flags) else 0
    for a, b in ((0, 100), (100, 160), (160, 310)):
        visits = np.unique(rows[(rows >= a) & (rows < b)], return_counts=True)[1]
        assert visits.max() - visits.min() <= 1 + window


@EVERY_MODE
def test_resumed_anywhere_and_on_any_ranks(entries, flags):
    """A fresh order asked for any step on 1, 2, 4 or 8 ranks gives the rows of the run that walked there."""
    walked = order_of(entries, flags)
    steps = [walked.step_rows(step) for step in range(130)]
    for step, world in product((129, 17, 64), (1, 2, 4, 8)):
        fresh = order_of(entries, flags)
        parts = [fresh.micro_batches(step, 1, rank, world)[0] for rank in range(world)]
        for found, wanted in zip(zip(*parts, strict=True), steps[step], strict=True):
            assert np.array_equal(np.concatenate(found), wanted)
    if "same_dataset_within_batch" in flags:
        assert all(len(set(np.searchsorted([100, 160], rows, side="right"))) == 1 for _, rows in steps)


@EVERY_MODE
def test_workers_load_every_mode(entries, flags, monkeypatch, tmp_path):
    """Worker processes, each with a copy of the order, hand over the steps in turn."""
    monkeypatch.setattr(dataloader.shard_reader, "open_folders", lambda folders: None)
    order = order_of(entries, flags)
    found = dataloader.steps(
        [tmp_path], order, lambda shards, epochs, rows: rows, first_step=3, end_step=9, accumulation=2, rank=1, world=2,
        workers=2, pin_memory=False, context="fork",
    )  # fmt: skip
    for step, micro in enumerate(found, start=3):
        for mine, (_, rows) in zip(micro, order.micro_batches(step, 2, 1, 2), strict=True):
            assert np.array_equal(mine, rows)
    assert step == 8


def test_the_plan_of_batches_of_one_set():
    """Whole batches end an epoch; what fills none is said before the run, with the remedy."""
    args = arguments(*TWO, same_dataset_within_batch=True, num_train_epochs=2)
    plan = StepPlan.make(args, data_order.make_order(args, DATA))
    assert plan.total == 200 // 8 + 120 // 8 + 300 // 8
    args = arguments(*TWO, same_dataset_within_batch=True, num_train_epochs=1, per_device_train_batch_size=200)
    with pytest.raises(ValueError, match=r"no set's rows fill a batch of 200 in 1 epochs; lower --per_device_train_batch_size"):
        StepPlan.make(args, data_order.make_order(args, DATA))


def test_token_budgets_take_mixtures_and_refuse_grouping():
    args = PretrainArguments.build(output_dir="o", train_data=["f0=3", "f1=1"], per_device_train_tokens=200, max_seq_length=60)
    order = data_order.make_order(args, DATA)
    rows = np.concatenate([order.bin(number)[1] for number in range(300)])
    assert (rows < 160).mean() == pytest.approx(0.75, abs=0.01)
    assert "0.7500" in data_order.table(args, DATA, order, 100)
    with pytest.raises(ValueError, match="--group_by_length and --per_device_train_tokens exclude each other"):
        PretrainArguments.build(output_dir="o", train_data="d", group_by_length=True, per_device_train_tokens=200)


def test_texts_are_grouped_by_the_length_that_training_cuts_them_to():
    """Texts beyond the limit are alike to the model: ordering them by what is cut off would sort noise."""
    args = PretrainArguments.build(output_dir="o", train_data=["f0", "f1"], group_by_length=True, max_seq_length=20)
    order = data_order.make_order(args, DATA)
    assert order.lengths(np.arange(310)).tolist() == np.minimum(LENGTHS[:310], 20).tolist()
    batches = [np.minimum(LENGTHS[order.step_rows(step)[1]], 20) for step in range(39)]
    assert sum(batch.max() - batch.min() > 3 for batch in batches) <= 2


def test_many_sets_keep_small_windows():
    """With batches of one set each set keeps a window: a thousand full ones would be memory that grows with the sets."""
    flags = {"group_by_length": True, "same_dataset_within_batch": True}
    windows = [data_order.make_order(arguments("f0", **flags), Data((20,) * sets)).sets[0].window for sets in (2, 30, 900)]
    assert windows == [64, 34, 8]


def test_the_table_says_what_is_taken_and_dropped():
    """A person sees, before the run, what each set brings, what was dropped and why, its share and its epochs."""
    args = arguments("f0=3", "f1=1", max_example_num_per_dataset=70)
    lines = data_order.table(args, Data((100, 60), (150,), skipped=2), order_of(("f0=3", "f1=1"), {}, 70), 100).splitlines()
    assert lines[0].split() == ["kept", "weight", "share", "epochs", "set"]
    kept, weight, share, epochs, name, *_ = lines[1].split()
    assert (kept, weight, name) == ("130", "0.7500", "f0") and abs(float(share[:-1]) - 75) < 0.5
    assert float(epochs) == pytest.approx(600 / 130, abs=0.03)
    assert "(dropped: 30 above max_example_num_per_dataset, 4 bad lines)" in lines[1]
    assert "(dropped: 80 above max_example_num_per_dataset, 2 bad lines)" in lines[2]
    plain = arguments(*TWO)
    lines = data_order.table(plain, DATA, data_order.make_order(plain, DATA), 31).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["f0/0.jsonl", "f0/1.jsonl", "f1/0.jsonl"]
    assert lines[1].split()[:4] == ["100", "-", f"{100 / 310:.2%}", f"{31 * 8 / 310:.2f}"]


@pytest.mark.parametrize("weighted", [False, True])
def test_steps_of_a_symmetric_set_have_half_the_texts(weighted):
    """Every text once an epoch all the same; with weights, the shares are still those of texts; ranks cut equal parts."""
    entries = ("f0=1", "f1=1") if weighted else TWO
    data = Data((96,), (160,), types=("normal", "symmetric_sts"))
    args = arguments(*entries, same_dataset_within_batch=True, num_train_epochs=2)
    order = data_order.make_order(args, data)
    steps = StepPlan.make(args, order).total
    rows = [order.step_rows(step)[1] for step in range(steps)]
    assert {(len(of), bool((of >= 96).all())) for of in rows} == {(8, False), (4, True)}
    counts = np.bincount(np.concatenate(rows), minlength=256)
    if weighted:
        assert abs(counts[:96].sum() - counts[96:].sum()) <= 2 * 8  # a cycle's places are right within a few
    else:
        assert steps == 2 * (12 + 40) and (counts == 2).all() and order.epochs(steps) == 2
    for step in range(3):
        parts = [order.micro_batches(step, 1, rank, 2)[0][1] for rank in range(2)]
        assert np.array_equal(np.concatenate(parts), rows[step]) and len(parts[0]) == len(parts[1])
    table = data_order.table(args, data, order, steps)
    assert "f1/0.jsonl, 4 a step" in table and "f0/0.jsonl\n" in table
    assert data_order.smallest_batch(args, data) == 4 and data_order.smallest_batch(arguments(*TWO), data) is None


def test_types_mean_something_only_where_a_batch_is_of_one_set():
    """A single file with a type may be asked for same_dataset_within_batch: its type then counts; otherwise it never does."""
    single = Data((50,), types=("only_1neg",))
    data_order.make_order(arguments("f0", same_dataset_within_batch=True), single)
    symmetric = Data((96,), (160,), types=("symmetric_sts", "symmetric_sts"))
    order = data_order.make_order(arguments("f0=1", "f1=1"), symmetric)
    assert len(order.step_rows(0)[1]) == 8


@pytest.mark.parametrize(
    ("small", "drop", "sizes", "words"),
    [
        (0, 0, [40, 10, 20, 30], ""),
        (25, 0, [40, 30, 30], "f0, 2 small files"),  # 10 and 20 together
        (25, 31, [40, 30], "left out by --small_threshold or --drop_threshold: f0, 2 small files, 30 groups"),
        (35, 20, [40, 30, 30], "f1, 1 small file"),
    ],
)
def test_small_files_of_a_folder_are_one_set_or_left_out(small, drop, sizes, words):
    """FlagEmbedding's thresholds, and the table says what they did; every group that is kept is seen once an epoch."""
    data = Data((40, 10, 20), (30,))
    args = arguments(*TWO, same_dataset_within_batch=True, small_threshold=small, drop_threshold=drop, num_train_epochs=1)
    assert [of.kept for of in data_order.sets_of(args, data)] == sizes
    order = data_order.make_order(args, data)
    assert len(order) == sum(sizes) and words in data_order.table(args, data, order, 10)
    if small == 25 and not drop:
        assert any(((of >= 40) & (of < 50)).any() and (of >= 50).any() for _, of in map(order.step_rows, range(10)))


def test_a_small_file_by_itself_is_left_out():
    data = Data((40, 10))
    data.folders = [Path("cache")]
    args = arguments("f0/0.jsonl", "f0/1.jsonl", same_dataset_within_batch=True, small_threshold=25)
    with pytest.raises(ValueError, match="is a single set"):
        data_order.make_order(args, data)
    with pytest.raises(ValueError, match="--small_threshold 50 leaves no set"):
        data_order.sets_of(arguments("f0/0.jsonl", "f0/1.jsonl", same_dataset_within_batch=True, small_threshold=50), data)


def test_the_table_says_which_sets_are_distilled():
    data = Data((40,), (30,))
    args = arguments(*TWO, knowledge_distillation=True)
    lines = data_order.table(args, data, data_order.make_order(args, data), 10).splitlines()
    assert lines[1].endswith("f0/0.jsonl, distilled") and lines[2].endswith("f1/0.jsonl, no scores: contrast alone")
