"""mteb, which many people measure with, runs on a saved folder. Skipped where it is not installed: it brings 270 MB."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from bge_ds import evaluate
from bge_ds.modeling import export

mteb = pytest.importorskip("mteb", reason="mteb is not installed (pip install mteb)")

PASSAGES = {
    "p1": "cats purr when they are content", "p2": "dogs bark at strangers", "p3": "fish swim in schools",
    "p4": "a purring engine runs smoothly", "p5": "the bark of a tree protects it", "p6": "children swim at school",
}  # fmt: skip
QUERIES = {"q1": "what purrs", "q2": "what barks at night", "q3": "who swims", "q4": "tree skin"}
QRELS = {"q1": {"p1": 1, "p4": 1}, "q2": {"p2": 1}, "q3": {"p3": 1}, "q4": {"p6": 1}}
PROMPTS = {"query": "represent this question about trees: ", "passage": "school text: "}


@pytest.fixture
def saved(minilm_path, tmp_path) -> Path:
    """A model as fine-tuning saves it, with prompts that change the vectors much."""
    model = AutoModel.from_pretrained(minilm_path)
    folder = tmp_path / "out"
    folder.mkdir()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export.save_model(model, weights, AutoTokenizer.from_pretrained(minilm_path), folder)
    export.write_sentence_transformers(folder, model.config, "mean", True, PROMPTS)
    return folder


def local_task():
    """A retrieval task of mteb that needs no hub."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Local(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="LocalRetrieval", description="made here", type="Retrieval", main_score="ndcg_at_10", eval_langs=["eng-Latn"],
            dataset={"path": "local/none", "revision": "1"},
        )  # fmt: skip

        def load_data(self, *args, **kwargs) -> None:
            texts = {"corpus": PASSAGES, "queries": QUERIES}
            sets = {kind: Dataset.from_list([{"id": k, "text": t} for k, t in of.items()]) for kind, of in texts.items()}
            self.dataset = {"default": {"test": {**sets, "relevant_docs": QRELS, "top_ranked": None}}}
            self.data_loaded = True

    return Local()


def write_set(folder: Path) -> Path:
    folder.mkdir()
    for name, texts in (("corpus", PASSAGES), ("queries", QUERIES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"_id": k, "text": t}) + "\n" for k, t in texts.items()))
    rows = [f"{query}\t{passage}\t{grade}\n" for query, found in QRELS.items() for passage, grade in found.items()]
    (folder / "qrels.tsv").write_text("".join(rows))
    return folder


def test_mteb_gives_the_figures_of_evaluate(saved, tmp_path):
    """Pooling, normalisation and both prompts reach mteb: without one prompt, figures differ on this data."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(saved), device="cpu")
    results = mteb.evaluate(model, local_task(), cache=None, co2_tracker=False, show_progress_bar=False)
    (theirs,) = results.task_results[0].scores["test"]

    def ours(*flags: str) -> dict:
        output = tmp_path / "scores.json"
        data = tmp_path / "set" if (tmp_path / "set").is_dir() else write_set(tmp_path / "set")
        given = ["--model_name_or_path", str(saved), "--data", str(data), "--output", str(output), "--use_cpu", *flags]
        assert evaluate.main(given) == 0
        return json.loads(output.read_text())["results"]["set"]

    mine = ours()
    assert theirs["ndcg_at_10"] == pytest.approx(mine["nDCG@10"], abs=1e-5)
    assert theirs["mrr_at_10"] == pytest.approx(mine["MRR@10"], abs=1e-5)
    for side in ("query", "passage"):
        assert ours(f"--{side}_instruction_for_retrieval", "")["nDCG@10"] != mine["nDCG@10"]
