"""Faults that are put into data and settings on purpose are named before a run begins, and clean data is left in peace."""

from __future__ import annotations

import json
import random

import helpers
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bge_ds import preprocess
from bge_ds.config.arguments import FinetuneArguments, PretrainArguments
from bge_ds.data import beir, diagnosis
from bge_ds.data.preprocess import validate
from bge_ds.data.shards import shard_reader
from bge_ds.modeling import retromae
from bge_ds.objectives.diagnosis import of_finetuning, of_pretraining

GROUPS = 300
draw = random.Random(0)


def text(words: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 6))) for _ in range(words))


def clean_group(_: int) -> dict:
    group = {"query": text(8), "pos": [text(30)], "neg": [text(30) for _ in range(3)]}
    return group | {"pos_scores": [0.9], "neg_scores": [0.3, 0.2, 0.1]}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return helpers.make_tokenizer("bytes", tmp_path_factory.mktemp("tokenizer"))


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def findings(folder, tokenizer_path, files: dict[str, list[dict]], lengths=(256, 256), model=None, **settings) -> list[str]:
    """Of groups by file, with a set to evaluate on whose first query is the first training query where it is asked for."""
    for name, rows in files.items():
        write(folder / "in" / name, rows)
    words = ["finetune", "--input", *(folder / "in" / name for name in files), "--output", folder / "shards"]
    words += ["--tokenizer", tokenizer_path, "--query_max_len", lengths[0], "--passage_max_len", lengths[1]]
    words += ["--query_instruction_for_retrieval", settings.get("query_instruction_for_retrieval", "")]
    words += ["--passage_instruction_for_retrieval", settings.get("passage_instruction_for_retrieval", "")]
    assert preprocess.main([str(word) for word in words]) == 0
    asked = settings.pop("eval_queries", [text(8) for _ in range(20)])
    write(folder / "eval" / "corpus.jsonl", [{"_id": "d", "text": text(30)}])
    write(folder / "eval" / "queries.jsonl", [{"_id": f"q{i}", "text": query} for i, query in enumerate(asked)])
    (folder / "eval" / "qrels.tsv").write_text("".join(f"q{i}\td\t1\n" for i in range(len(asked))))
    common = {"train_data": [str(folder / "shards")], "output_dir": str(folder / "out"), "query_max_len": lengths[0]}
    common |= {"model_name_or_path": str(model or tokenizer_path), "passage_max_len": lengths[1]}
    batch = settings.pop("negatives", 31)
    args = FinetuneArguments.build(**common, **settings)
    data = shard_reader.open_folder(folder / "shards")
    sets = {"eval": beir.read_folder(folder / "eval")}
    return of_finetuning(args, data, validate.load_tokenizer(tokenizer_path), batch, sets)


def model_with_prompts(folder):
    """The sentence-transformers files of a model that pools by mean and wants an instruction."""
    for name, content in {
        "modules.json": [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}},
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def damage(group: dict, **changes) -> dict:
    return group | changes


FAULTS = {
    "negatives": lambda g, i: damage(g, neg=[g["pos"][0], *g["neg"][1:]]) if i % 20 == 0 else g,
    "near negatives": lambda g, i: damage(g, neg=[g["pos"][0] + " x", *g["neg"][1:]]) if i % 20 == 0 else g,
    "copies": lambda g, i: damage(g, query=g["pos"][0]) if i % 10 == 0 else g,
    "duplicates": lambda g, i: damage(g, query="the very same question of all") if i % 5 == 0 else g,
    "short-texts": lambda g, i: damage(g, query="a") if i % 20 == 0 else g,
    "scores": lambda g, i: damage(g, pos_scores=[0.1], neg_scores=[0.9, 0.8, 0.7]),
}
ANCHORS = {"near negatives": "negatives"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_groups_is_named(tmp_path, tokenizer_path, fault):
    """Each alone, in a part of the lines: what is named must be this fault, with its remedy and its place in the docs."""
    rows = [FAULTS[fault](clean_group(i), i) for i in range(GROUPS)]
    found = findings(tmp_path, tokenizer_path, {"a.jsonl": rows})
    assert len(found) == 1 and found[0].endswith(f"({diagnosis.PAGE}#{ANCHORS.get(fault, fault)})"), found


SETTINGS = {
    "cut-texts": dict(lengths=(64, 24)),
    "temperature": dict(temperature=0.4),
    "batch": dict(negatives=1),
    "same instructions": dict(query_instruction_for_retrieval="text: ", passage_instruction_for_retrieval="text: "),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_a_fault_in_the_settings_is_named(tmp_path, tokenizer_path, fault):
    found = findings(tmp_path, tokenizer_path, {"a.jsonl": [clean_group(i) for i in range(GROUPS)]}, **SETTINGS[fault])
    assert len(found) == 1 and found[0].endswith(f"#{fault.split()[-1]})"), found


def test_leakage_drowned_sets_and_a_model_used_otherwise_are_named(tmp_path, tokenizer_path):
    rows = [clean_group(i) for i in range(GROUPS)]
    leaked = [rows[0]["query"], rows[1]["query"] + " x", *[text(8) for _ in range(8)]]
    found = findings(tmp_path / "a", tokenizer_path, {"a.jsonl": rows}, eval_queries=leaked)
    assert len(found) == 1 and found[0].startswith("20% of the queries of eval"), found
    found = findings(tmp_path / "b", tokenizer_path, {"a.jsonl": rows, "b.jsonl": rows[:2]})
    assert len(found) == 1 and "b.jsonl has less than 1% of the rows" in found[0], found
    found = findings(tmp_path / "c", tokenizer_path, {"a.jsonl": rows}, model=model_with_prompts(tmp_path / "model"))
    assert [line.rsplit("#", 1)[1] for line in found] == ["pooling)", "instructions)"], found


def test_a_tokenizer_without_an_end_token_is_named(tmp_path, tokenizer_path):
    """Where the last token is the vector; with an end token nothing is said."""
    rows, pooling = [clean_group(i) for i in range(GROUPS)], {"sentence_pooling_method": "last_token"}
    assert findings(tmp_path / "a", tokenizer_path, {"a.jsonl": rows}, **pooling) == []
    endless = AutoTokenizer.from_pretrained(tokenizer_path)
    endless.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    endless.save_pretrained(tmp_path / "endless")
    (line,) = findings(tmp_path / "b", tmp_path / "endless", {"a.jsonl": rows}, **pooling)
    assert line.endswith("#end-token)"), line
    assert findings(tmp_path / "c", tmp_path / "endless", {"a.jsonl": rows}) == []  # [CLS]


def test_pre_training_that_is_too_short_is_named(tmp_path, tokenizer_path):
    """Tokens are counted as the run cuts them, over all epochs; a trained model may go on with any number of them."""
    write(tmp_path / "a.jsonl", [{"text": text(30)} for _ in range(GROUPS)])
    words = ["pretrain", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "s", "--tokenizer", tokenizer_path]
    assert preprocess.main([str(word) for word in words]) == 0
    data = shard_reader.open_folder(tmp_path / "s")
    common = {"train_data": [str(tmp_path / "s")], "output_dir": str(tmp_path / "out"), "max_seq_length": 32}

    def found(parameters: int, epochs: float, model: str = "") -> list[str]:
        start = {"config_name": str(tokenizer_path), "tokenizer_name": str(tokenizer_path)} if not model else {}
        args = PretrainArguments.build(**common, **start, model_name_or_path=model)
        return of_pretraining(args, data, parameters, epochs)

    tokens = 32 * GROUPS  # every text is longer than 32 bytes
    assert found(tokens, epochs=2) == []
    (line,) = found(tokens, epochs=1.9)
    assert line.startswith(f"this run sees {1.9 * tokens:,.0f} tokens for the {tokens:,} parameters") and "#few-tokens" in line
    assert found(tokens, epochs=0.1, model=str(tokenizer_path)) == []


@pytest.mark.parametrize(("objective", "pooling", "named"), [
    ("retromae", "mean", True), ("dupmae", "mean", True), ("mlm", "cls", True),
    ("retromae", "cls", False), ("mlm", "mean", False), ("unknown", "mean", False), (None, "mean", False),
])  # fmt: skip
def test_pooling_that_pre_training_was_not_for_is_named(tmp_path, tokenizer_path, objective, pooling, named):
    """An encoder's folder says what it was pre-trained by; a file that says something else is nothing to complain of."""
    model = tmp_path / "encoder_model"
    model.mkdir()
    retromae.save_objective(objective, model)
    rows = [clean_group(i) for i in range(GROUPS)]
    found = findings(tmp_path, tokenizer_path, {"a.jsonl": rows}, model=model, sentence_pooling_method=pooling)
    assert len(found) == named and all(f"pre-trained by {objective}, which" in line for line in found), found
    (model / "pretraining.json").write_text("[1]")
    assert retromae.read_objective(model) is None and retromae.read_objective(tmp_path / "nowhere") is None


def test_clean_groups_are_left_in_peace(tmp_path, tokenizer_path):
    assert findings(tmp_path, tokenizer_path, {"a.jsonl": [clean_group(i) for i in range(GROUPS)]}) == []


@pytest.mark.parametrize(("kind", "source", "lengths"), [
    ("finetune", "debian/train", {}), ("pretrain", "pretrain/train", {}),
    ("finetune", "drcd_zh/train", {"--query_max_len": 128, "--passage_max_len": 1024}),
])  # fmt: skip
def test_real_data_is_left_in_peace(tmp_path, shared_data, tokenizer_path, minilm_path, kind, source, lengths):
    """A warning on data that trains well would teach users to read none. Chinese is cut into bytes, all of them known."""
    tokenizer = tokenizer_path if "zh" in source else minilm_path
    words = [kind, "--input", shared_data / f"{source}.jsonl.gz", "--output", tmp_path / "s", "--tokenizer", tokenizer]
    words += [word for pair in lengths.items() for word in pair]
    assert preprocess.main([str(word) for word in [*words, "--sample", 3000]]) == 0
    assert diagnosis.of_shards(shard_reader.open_folder(tmp_path / "s")) == []
