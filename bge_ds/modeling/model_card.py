"""The model card, `README.md` of a saved model: what it was made of, how good it is, how to use it.

Written for people, and for the hub, which reads the block at its top. It holds no time, path, rank or host: the same run gives
the same bytes wherever it resumes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bge_ds import __version__

FILE = "README.md"
PLACE = "path/to/this/folder"  # in the snippets, of a model without a name on the hub
_NO_LIMIT = 1 << 20  # tokens
# What the hub is told of a model, by what loads it: an embedder, a reranker, an encoder that names no pooling.
_OF_KIND: dict[str, dict[str, Any]] = {
    "embedder": {
        "library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "bge_ds"],
    },
    "reranker": {
        "library_name": "sentence-transformers", "pipeline_tag": "text-ranking",
        "tags": ["sentence-transformers", "cross-encoder", "reranker", "bge_ds"],
    },
    "encoder": {"library_name": "transformers", "pipeline_tag": "feature-extraction", "tags": ["bge_ds"]},
}  # fmt: skip
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_POOLED = {
    "cls": "vectors = hidden[:, 0]",
    "mean": 'mask = inputs["attention_mask"].unsqueeze(-1)\nvectors = (hidden * mask).sum(1) / mask.sum(1)',
    "last_token": 'vectors = hidden[torch.arange(len(hidden)), inputs["attention_mask"].sum(1) - 1]',
}


def shown_name(name_or_path: str) -> str:
    """A model's name, of a folder its last part: a card is published, and paths of a machine are nobody's business."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path


def on_hub(name_or_path: str) -> bool:
    """Whether this may be a name of the hub: no folder here, and of its form."""
    return not Path(name_or_path).exists() and _HUB_NAME.fullmatch(name_or_path) is not None


def front_matter(base_models: list[str], licence: str | None, relation: str | None = None, kind: str = "embedder") -> str:
    """The block that the hub reads. base_models: those that may be on the hub are named. relation: the hub's word for it.

    kind: "embedder", "reranker", or "encoder" for a folder that names no pooling.
    """
    from huggingface_hub import ModelCardData

    known = [name for name in base_models if on_hub(name)]
    data = ModelCardData(
        base_model=known[0] if len(known) == 1 else known or None, license=licence, **_OF_KIND[kind],
        **({"base_model_relation": relation} if relation and known else {}),
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(features: int, length: int, pooling: str | None, normalize: bool) -> str:
    """One paragraph. length: the most tokens of a text. pooling: None for an encoder that names none."""
    pooled = f", {pooling} pooling{', length 1' if normalize else ''}" if pooling else ""
    made = f"Made with bge_ds {__version__}."
    limit = f" of at most {length} tokens" if length < _NO_LIMIT else ""
    return f"Texts{limit} become vectors of {features} features{pooled}. {made}"


def usage(name: str, pooling: str | None, normalize: bool, prompts: dict[str, str], length: int) -> str:
    """Snippets for sentence-transformers, transformers and bge_ds that give the same vectors.

    prompts: by their saved names. length: as for `describe`.
    """
    query = prompts.get("query", "")
    if pooling is None:
        code = f'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{name}")'
        return f"An encoder without pooling of its own:\n\n```python\n{code}\n```"
    texts = 'queries = model{0}(["what is a shard"]{1})\npassages = model{2}(["A shard is a part of a data set."]{3})'
    first = f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{name}")\n'
    first += texts.format(".encode_query", "", ".encode_document", "") + "\nprint(model.similarity(queries, passages))"
    cut = f"truncation=True, max_length={length}, " if length < _NO_LIMIT else ""
    second = f"""import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", padding_side="right")
model = AutoModel.from_pretrained("{name}")
inputs = tokenizer([{query + "what is a shard"!r}], padding=True, {cut}return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
{_POOLED[pooling]}"""
    second += "\nvectors = torch.nn.functional.normalize(vectors, dim=-1)" * normalize
    third = f'from bge_ds import api\n\nmodel = api.load("{name}")\n'
    third += texts.format("", ', "query"', "", ', "passage"') + "\nprint(queries @ passages.T)"
    parts = [f"With {of}:\n\n```python\n{code}\n```" for of, code in (
        ("sentence-transformers", first), ("transformers", second), ("bge_ds", third))]  # fmt: skip
    given = [(kind, f"`{prompt!r}`") for kind, prompt in prompts.items() if prompt]
    if given:
        parts.append("Prompts, which stand before a text:\n\n" + table(("name", "prompt"), given))
    return "\n\n".join(parts)


def reranker_usage(name: str, decoder: bool, prefixes: dict[str, str]) -> str:
    """Snippets that give the scores of training. prefixes: what stands before each query and passage."""
    pair = '[["what is a shard", "A shard is a part of a data set."]]'
    instructions = "".join(f", {of}_instruction_for_rerank={prefix!r}" for of, prefix in prefixes.items() if prefix or decoder)
    kind = "FlagLLMReranker" if decoder else "FlagReranker"
    flag = f'from FlagEmbedding import {kind}\n\nmodel = {kind}("{name}"{instructions})\nprint(model.compute_score({pair}))'
    ours = f"python -m bge_ds.score --model_name_or_path {name} --input groups.jsonl --output scored.jsonl"
    parts = [("FlagEmbedding", f"python\n{flag}"), ("bge_ds", f"bash\n{ours}")]
    if not decoder:
        texts = tuple(prefixes[of] + text for of, text in (("query", "what is a shard"), ("passage", "A shard is a part.")))
        code = f'from sentence_transformers import CrossEncoder\n\nmodel = CrossEncoder("{name}")\n'
        parts.insert(0, ("sentence-transformers", f"python\n{code}print(model.predict([{texts!r}]))"))
    return "\n\n".join(f"With {of}:\n\n```{code}\n```" for of, code in parts)


def scores(measured: dict[str, dict[str, float]], how: str = "Exact search with this model.") -> str:
    """A table of measures by set. measured: name of the set -> measure -> value; empty for no text. how: what gave them."""
    if not measured:
        return ""
    names = list(next(iter(measured.values())))
    return f"{how}\n\n" + table(
        ("data", *names), [(of, *(f"{values[name]:.4f}" for name in names)) for of, values in measured.items()]
    )


def page(matter: str, title: str, intro: str, sections: list[tuple[str, str]]) -> str:
    """The whole card; sections without text are left out."""
    parts = [f"# {title}", intro, *(f"## {head}\n\n{text}" for head, text in sections if text)]
    return matter + "\n" + "\n\n".join(parts) + "\n"
