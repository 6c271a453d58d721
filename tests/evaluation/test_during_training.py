"""Evaluation while training: the same figures on any number of ranks, nothing changed by it, the best checkpoint kept."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import score_runs
import torch

from bge_ds import evaluate
from bge_ds.checkpoint import checkpoint, state_file
from bge_ds.data import beir
from bge_ds.data.ragged import RaggedArrays
from bge_ds.evaluation import bm25, distributed_texts, during_training, retrieval, run_files
from bge_ds.kernels.packed import chunk_bounds, pack, runs_of, split
from bge_ds.modeling.encoder import Encoder
from bge_ds.training.metrics import Meter, RunLog

WORDS = " ".join(helpers.SENTENCES).split()


def write_set(folder: Path, passages: int = 75, queries: int = 20) -> Path:
    """A folder of random texts, some of them equal; what is relevant is chance, so that no measure is 0 or 1."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 2 + i % 30)) for i in range(passages)]
    texts[9::20] = [texts[8]] * len(texts[9::20])
    folder.mkdir(parents=True)
    rows = [{"_id": f"p{i}", "text": text} for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": f"q{i}", "text": " ".join(rng.choice(WORDS, 2 + i % 5))} for i in range(queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = [f"q{i}\tp{p}\t{1 + k}\n" for i in range(queries) for k, p in enumerate(rng.choice(passages, 4, replace=False))]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(qrels))
    return folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny BERT with dropout, training data of both kinds, and a retrieval set."""
    base = tmp_path_factory.mktemp("evaluation")
    helpers.make_model("bert", base / "model", dropout=0.1)
    helpers.make_tokenizer("wordpiece", base / "model")
    write_set(base / "set")
    texts = [" ".join(WORDS[i : i + 3 + i]) for i in range(12)]
    groups = [{"query": texts[i][:20], "pos": [texts[i]], "neg": [texts[i - 5], texts[i - 3]]} for i in range(12)]
    (base / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return base


def flags_of(setting: Path, command: str, out: Path, **more) -> dict:
    own = {
        "finetune": {"train_data": str(setting / "groups.jsonl"), "train_group_size": 3, "query_max_len": 16,
                     "passage_max_len": 24, "sentence_pooling_method": "mean", "query_instruction_for_retrieval": "the "},
        "pretrain": {"train_data": str(setting / "texts.jsonl"), "max_seq_length": 24, "save_strategy": "steps"},
    }  # fmt: skip
    return {
        "output_dir": str(out), "model_name_or_path": str(setting / "model"), "per_device_train_batch_size": 2,
        "max_steps": 4, "logging_steps": 1, "learning_rate": 3e-3, "dataloader_num_workers": 0,
        "cache_dir": str(setting / "cache"), **own[command], **more,
    }  # fmt: skip


def lines_of(folder: Path) -> tuple[dict[int, dict], dict[int, dict]]:
    """(step -> losses and the like, step -> measures) of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "learning_rate", "grad_norm")
    losses = {row["step"]: {k: row[k] for k in kept} for row in rows if "loss" in row}
    measures = {row["step"]: {k: v for k, v in row.items() if k != "eval_seconds"} for row in rows if "eval_seconds" in row}
    return losses, measures


def test_any_number_of_ranks_finds_the_same(tmp_path, setting):
    """1 and 3 ranks give the same ranking to the last place, on every rank, in as many passes on each rank; it is the
    ranking of one search over all passages, and the figures are the evaluate command's."""
    found = {}
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        out.mkdir()
        helpers.run_ranks("share_of_evaluation", ranks, setting / "model", setting / "set", out)
        found[ranks] = [json.loads((out / str(rank)).read_text()) for rank in range(ranks)]
    values, rows, _ = found[1][0]
    assert len(set(map(tuple, rows))) > 5 and 0.01 < values["eval_nDCG@10"] < 0.9
    for results in found.values():
        assert all(result[:2] == [values, rows] for result in results)
        assert len({passes for *_, passes in results}) == 1
    args = ["--model_name_or_path", str(setting / "model"), "--data", str(setting / "set"), "--use_cpu"]
    args += ["--query_max_len", "16", "--passage_max_len", "24", "--sentence_pooling_method", "mean"]
    assert evaluate.main([*args, "--output", str(tmp_path / "scores.json")]) == 0
    written = json.loads((tmp_path / "scores.json").read_text())["results"]["set"]
    assert {f"eval_set_{name}": written[name] for name in retrieval.NAMES}.items() <= values.items()


@pytest.mark.parametrize("stage", [1, 3])
def test_training_is_the_same_with_evaluation(tmp_path, setting, stage):
    """Losses, norms and the saved files are the same to the last bit with and without evaluation, dropout included; the
    evaluation before the first step finds on 2 ranks at this stage what a single process finds in the untrained model."""
    runs = []
    for command in ("finetune", "pretrain"):
        common = {"deepspeed": f"zero{stage}", "save_steps": 2}
        runs.append([command, 0, 0, flags_of(setting, command, tmp_path / command, **common)])
        more = {"eval_data": [str(setting / "set")], "eval_steps": 2, "eval_on_start": True}
        runs.append([command, 0, 0, flags_of(setting, command, tmp_path / f"{command}_evaluated", **common, **more)])
    helpers.run_ranks("evaluated_training", 2, json.dumps(runs))
    for command, weights in (("finetune", "model.safetensors"), ("pretrain", "encoder_model/model.safetensors")):
        plain, evaluated = tmp_path / command, tmp_path / f"{command}_evaluated"
        (losses, nothing), (same_losses, measures) = lines_of(plain), lines_of(evaluated)
        assert losses == same_losses and len(losses) == 4 and not nothing
        for file in (weights, weights.replace("model.safetensors", "tokenizer.json")):
            assert (plain / file).read_bytes() == (evaluated / file).read_bytes()
        assert list(measures) == [0, 2, 4] and len({tuple(row.values())[1:] for row in measures.values()}) == 3
        assert measures[0] == {"step": 0, **single_process(setting, command)}
        assert json.loads((evaluated / "best.json").read_text())["step"] in (2, 4)
        assert not (plain / "best.json").exists()
        final = evaluated / weights.removesuffix("model.safetensors")
        assert single_process(setting, command, final).items() <= measures[4].items()


def single_process(setting: Path, command: str, model: Path | None = None) -> dict[str, float]:
    """What the evaluate command measures of a model folder, under the names of the log."""
    model = setting / "model" if model is None else model
    lengths = [16, 24] if command == "finetune" else [24, 24]
    flags = ["--model_name_or_path", str(model), "--data", str(setting / "set"), "--use_cpu"]
    flags += ["--query_max_len", str(lengths[0]), "--passage_max_len", str(lengths[1])]
    if command == "finetune":
        flags += ["--sentence_pooling_method", "mean", "--query_instruction_for_retrieval", "the "]
    args = evaluate.parser().parse_args(flags)
    values = retrieval.evaluate_set(beir.read_folder(setting / "set"), evaluate.load_embedder(args))
    return {f"eval_{prefix}{name}": values[name] for prefix in ("set_", "") for name in retrieval.NAMES}


def test_the_best_checkpoint_is_kept_and_becomes_the_result(tmp_path, setting):
    """save_total_limit 1 keeps the best beside the newest, and the result is the best's model, byte for byte. A run resumed
    from it measures what the undisturbed run measured and returns the same model, though all that it sees is worse."""
    best = {"eval_data": [str(setting / "set")], "eval_steps": 1, "save_steps": 1, "save_total_limit": 1,
            "load_best_model_at_end": True}  # fmt: skip
    runs = []
    for command in ("finetune", "pretrain"):
        whole, resumed = (flags_of(setting, command, tmp_path / f"{command}_{kind}", **best) for kind in ("whole", "resumed"))
        resumed["resume_from_checkpoint"] = str(tmp_path / f"{command}_whole" / "checkpoint-2")
        runs += [[command, 2, 0, whole], [command, 2, 2, resumed]]
    flags = flags_of(setting, "finetune", tmp_path / "by_best", eval_data=best["eval_data"], eval_steps=1, save_strategy="best")
    runs.append(["finetune", 2, 0, flags])
    out = helpers.run_ranks("evaluated_training", 1, json.dumps(runs))
    for command, weights in (("finetune", "model.safetensors"), ("pretrain", "encoder_model/model.safetensors")):
        whole, resumed = tmp_path / f"{command}_whole", tmp_path / f"{command}_resumed"
        assert sorted(p.name for p in whole.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
        record = {"step": 2, "metric": "eval_nDCG@10", "value": 0.2}
        assert json.loads((whole / "best.json").read_text()) == record
        chosen = (whole / "checkpoint-2" / weights).read_bytes()
        assert (whole / weights).read_bytes() == chosen == (resumed / weights).read_bytes()
        assert (whole / "checkpoint-4" / weights).read_bytes() != chosen
        assert not (whole / "resume").exists() and not list(whole.rglob("*.partial"))
        assert f"it is that of {whole / 'checkpoint-2'}, the best (eval_nDCG@10 0.2000)" in out
        assert lines_of(resumed)[1] == {step: row for step, row in lines_of(whole)[1].items() if step > 2}
        assert json.loads((resumed / "checkpoint-4" / "state.json").read_text())["best"] == record
    assert sorted(p.name for p in (tmp_path / "by_best").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    live = (tmp_path / "by_best" / "model.safetensors").read_bytes()  # no load_best_model_at_end: the last step's
    assert live == (tmp_path / "finetune_whole" / "checkpoint-4" / "model.safetensors").read_bytes()


def test_a_reranker_is_measured_as_by_the_evaluate_command(tmp_path, setting):
    """Two ranks at ZeRO-3 on a given list, one rank on BM25's own, which is the same: the same figures before the first step,
    those of the command for that model; after the last step those of the saved model. The best checkpoint is the result."""
    start = score_runs.make_teacher(tmp_path / "start", max_position_embeddings=600)
    data, run = beir.read_folder(setting / "set"), tmp_path / "words.trec"
    found_Q = bm25.Candidates(data.distinct(), list(data.queries.values()), 100).ranked()
    run_files.write_run(run, run_files.of_found(data, found_Q), "words")
    common = {"model_name_or_path": str(start), "train_data": str(setting / "groups.jsonl"), "max_steps": 4, "save_steps": 2,
              "logging_steps": 1, "train_group_size": 3, "per_device_train_batch_size": 2, "passage_max_len": 200,
              "learning_rate": 1e-2, "cache_dir": str(tmp_path), "eval_data": [str(setting / "set")], "eval_steps": 2,
              "eval_on_start": True, "eval_rerank_depth": 9}  # fmt: skip
    two = {"output_dir": str(tmp_path / "two"), "deepspeed": "zero3", "eval_search_results": [str(run)]}
    one = {"output_dir": str(tmp_path / "one"), "load_best_model_at_end": True, "per_device_train_batch_size": 4}
    said = helpers.run_ranks("train", 2, json.dumps([["rerank", common | two]]))
    said += helpers.run_ranks("train", 1, json.dumps([["rerank", common | one]]))

    def measured(model: Path) -> dict[str, float]:
        words = ["--data", setting / "set", "--search_results", run, "--rerank", model, "--rerank_depth", 9, "--use_cpu"]
        assert evaluate.main([*map(str, words), "--output", str(tmp_path / "scores.json")]) == 0
        rows = json.loads((tmp_path / "scores.json").read_text())["results"]
        before = f"nDCG@10 {rows['set']['nDCG@10']:.4f}"
        assert f"9 passages of words.trec, {before}" in said and f"9 passages of BM25, {before}" in said
        return {f"eval_{prefix}{name}": rows["set, reranked"][name] for prefix in ("set_", "") for name in retrieval.NAMES}

    for name in ("two", "one"):
        measures = lines_of(tmp_path / name)[1]
        assert list(measures) == [0, 2, 4] and measures[0] == {"step": 0, **measured(start)}
        best = max((2, 4), key=lambda step: measures[step]["eval_nDCG@10"])
        final = measures[best if name == "one" else 4]
        assert measured(tmp_path / name).items() <= final.items() and final != {**measures[0], "step": final["step"]}
        assert (final["step"] == 4) == ("| set |" in (tmp_path / name / "README.md").read_text())


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, 2, [2, 9]), (2, 2, [2, 9]), (2, 5, [5, 9]), (3, 2, [2, 5, 9]), (5, None, [2, 3, 5, 9]), (0, None, [])],
)
def test_which_checkpoints_stay(tmp_path, keep, best, left):
    """The best stays in place of the oldest of the newest ones; the newest stays always; a limit above what is there drops
    nothing."""
    for step in (2, 3, 5, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.drop_oldest(tmp_path, keep, best)
    assert sorted(int(p.name.removeprefix("checkpoint-")) for p in tmp_path.iterdir()) == left


class Talk:
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def evaluation_of(tmp_path, **flags):
    from bge_ds.config.arguments import FinetuneArguments

    given = {"output_dir": str(tmp_path / "new"), "train_data": "d", "model_name_or_path": "m", "eval_data": ["e"]}
    args = FinetuneArguments.build(**given, **flags)
    return during_training.Evaluation(args, None, None, None, Talk(), "eval_nDCG@10")


def test_the_best_so_far_is_that_of_the_resumed_checkpoint(tmp_path):
    """Not what came after it in the stopped run; in the folder it lies in. Gone, it is an error where it is the result;
    judged by another measure, it is not compared."""
    for step, best in (
        (2, {"step": 2, "metric": "eval_nDCG@10", "value": 0.5}),
        (4, {"step": 2, "metric": "eval_nDCG@10", "value": 0.5}),
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"tokens_seen": 0, "ranks": 1, "zero_stage": 0, "asked": {}, "agreement": {}, "files": {}, "meters": []}
        state_file.write(tmp_path / f"checkpoint-{step}", state_file.State(step=step, best=best, **state))
    resumed = evaluation_of(tmp_path, load_best_model_at_end=True)
    resumed.resume(tmp_path / "checkpoint-4")
    assert resumed.best_folder == tmp_path / "checkpoint-2"
    # An equal figure is no better, and one of another step judges nothing.
    for value, evaluated, saved, expected in ((0.5, 6, 6, 2), (0.6, 8, 8, 8), (0.7, 9, 10, 8)):
        resumed.latest = (evaluated, value)
        assert resumed.judge(saved)["step"] == expected
    assert resumed.best_folder == tmp_path / "new" / "checkpoint-8"
    (tmp_path / "checkpoint-2" / "state.json").unlink()
    (tmp_path / "checkpoint-2").rmdir()
    with pytest.raises(ValueError, match="checkpoint-2, is gone; put it back"):
        evaluation_of(tmp_path, load_best_model_at_end=True).resume(tmp_path / "checkpoint-4")
    other = evaluation_of(tmp_path)
    other.metric = "eval_MRR@10"
    other.resume(tmp_path / "checkpoint-4")
    assert other.best is None and "judged by eval_nDCG@10" in other.log.said[0]


def test_names_of_the_metric(tmp_path, setting):
    """With or without `eval_`, of one set or of the mean; another name is refused with the ones there are."""
    from bge_ds.config.arguments import FinetuneArguments

    given = {"output_dir": "o", "train_data": "d", "model_name_or_path": "m", "eval_data": [str(setting / "set")]}
    names = {None: "eval_nDCG@10", "set_MRR@10": "eval_set_MRR@10", "eval_Recall@100": "eval_Recall@100"}
    for name, full in names.items():
        args = FinetuneArguments.build(**given, metric_for_best_model=name)
        assert during_training.metric_of(args, during_training.open_sets(args)) == full
    with pytest.raises(ValueError, match=r"--metric_for_best_model loss is none of what is measured: eval_nDCG@10"):
        during_training.open_sets(FinetuneArguments.build(**given, metric_for_best_model="loss"))


def test_the_line_of_an_evaluation(tmp_path, capsys):
    """In the file whole, on the screen what was asked for, to the writers under eval/; a resumed run keeps it by its step."""
    events = []
    options = {"total_steps": 9, "show_bar": False, "write_events": events.extend}
    log = RunLog(tmp_path / "m.jsonl", first_step=0, **options)
    for step in (2, 4):
        log.write_evaluation({"step": step, "eval_a_b": 0.25, "eval_b": 0.5, "eval_seconds": 1.0}, ["eval_a_b"])
    log.close()
    assert capsys.readouterr().out.splitlines()[0] == "step 2: evaluated in 1.0 s  a_b 0.2500"
    assert ("eval/b", 0.5, 4) in events and ("eval/seconds", 1.0, 2) in events
    RunLog(tmp_path / "m.jsonl", first_step=2, **options).close()
    line = {"step": 2, "eval_a_b": 0.25, "eval_b": 0.5, "eval_seconds": 1.0}
    assert [json.loads(text) for text in (tmp_path / "m.jsonl").read_text().splitlines()] == [line]


def test_evaluations_are_no_training_time():
    """Tokens per second are those of the steps."""
    meter = Meter(torch.device("cpu"))
    meter.add(loss=1.0)
    meter.began -= 100
    meter.leave_out(90)
    assert 10 <= meter.read()["seconds"] < 20


def test_tokenizing_leaves_the_tokenizer_as_it_was(setting):
    """The cut of an evaluation must not be saved with the model; a text without tokens still has a vector."""
    from bge_ds.data.preprocess import validate

    tokenizer = validate.load_tokenizer(str(setting / "model"))
    before = tokenizer.backend_tokenizer.to_str()
    rows = retrieval.tokenize(tokenizer, ["the quick brown fox " * 9, ""], 7)
    assert [len(row) for row in rows] == [7, 2] and tokenizer.backend_tokenizer.to_str() == before
    packed = RaggedArrays.of_lists(rows, np.min_scalar_type(len(tokenizer)))
    assert packed.values.dtype.itemsize == 1 and [row.tolist() for row in packed.split()] == rows


def test_pieces_hold_every_row_once():
    """Rows by length, at most the tokens asked for, a longer row by itself."""
    rows = RaggedArrays.of_lists([[1] * n for n in [5, 1, 30, 7, 7, 2, 9]], np.uint8)
    texts, _ = pack(rows.split())
    pieces = split(texts, chunk_bounds(runs_of(rows.lengths), None, 12))
    assert [piece.cu_seqlens.diff().tolist() for piece in pieces] == [[1, 2, 5], [7], [7], [9], [30]]


def test_vectors_of_a_share_are_the_encoders(setting):
    """Each unit's vectors come in the order of its texts, as the encoder gives them."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(5, 90, 3 + int(n)).tolist() for n in rng.permutation(40)]
    share = distributed_texts.DistributedTexts(
        map(str, range(40)), 40, lambda unit: [texts[int(t)] for t in unit], 200, 60, torch.device("cpu")
    )
    assert share.rows(0).ids.values.dtype.itemsize == 1  # ids below 200
    model = Encoder.load(str(setting / "model")).eval()
    with torch.no_grad():
        vectors_ND = share.encode_all(model)
    torch.testing.assert_close(vectors_ND, model.encode_ids([np.array(t) for t in texts]), rtol=0, atol=1e-5)
