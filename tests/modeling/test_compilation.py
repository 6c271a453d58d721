"""Rows filled up to a bucket, and layers compiled for them, give what the plain row gives."""

from __future__ import annotations

import shutil
from itertools import pairwise

import helpers
import pytest
import torch
from test_encoder import CASES, assert_same_gradients, make_model
from torch._dynamo.utils import counters

from bge_ds.kernels.packed import pack
from bge_ds.modeling import compilation
from bge_ds.modeling.encoder import Encoder

# What people run; it compiles C++ here. Without a compiler the same graphs run uncompiled: all but the code made of them.
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"
BUCKET = 128
# 2 to 7 texts, some of one length or of a single token; each row but the last is 82 to 128 tokens, one bucket.
STEPS = [[5, 17, 3, 40, 17], [60, 1, 1, 9, 22, 5, 17], [30, 31, 32, 33], [100, 28], [90, 70, 3]]
WIDTH = 32


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs, counts and limits of one test are not another's."""
    settings = torch._dynamo.config
    with torch._dynamo.config.patch(
        recompile_limit=settings.recompile_limit, accumulated_recompile_limit=settings.accumulated_recompile_limit
    ):
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()


def build(path, *, compiled=False, backend=BACKEND, checkpointing: bool | None = None, **options):
    model = Encoder.load(path, pooling="mean", **options).train()
    if checkpointing is not None:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    if compiled:
        compilation.compile_layers(model.backbone, token_bucket=BUCKET, backend=backend)
    return model


def texts_of(lengths, seed=0):
    return pack(helpers.random_texts(lengths, first=0, last=2, seed=seed))[0]


def step(model, lengths, seed=0):
    """Vectors and, in the parameters, gradients of one step whose dropout is seeded."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(texts_of(lengths, seed))
    (out * torch.randn(len(lengths), WIDTH, generator=torch.Generator().manual_seed(1))).sum().backward()
    return out.detach()


@pytest.mark.parametrize("bucket", [1, 7, 64, 1000])
@pytest.mark.parametrize("lengths", [[5, 17, 3, 40, 17], [1, 1], [64], [9]])
def test_a_filled_row_is_packed_texts(lengths, bucket):
    """As if the filler had been packed with the texts: a wrong end or position would let texts see each other.

    No filler is longer than the longest text: it needs no position that the row does not have.
    """
    texts = texts_of(lengths)
    filled, ids_T = compilation.pad_to_bucket(texts, texts.ids_T, bucket)
    total = sum(lengths)
    assert filled.tokens == len(ids_T) == len(filled.positions_T) and filled.tokens % bucket == 0
    assert total <= filled.tokens < total + bucket
    assert filled.max_length == texts.max_length
    ends = filled.cu_seqlens.tolist()
    assert ends[: len(lengths) + 1] == texts.cu_seqlens.tolist() and ends[-1] == filled.tokens
    found = [end - start for start, end in pairwise(ends)]
    assert found == [length for n, length in filled.runs for _ in range(n)] and min(found) > 0
    assert filled.positions_T.tolist() == [place for length in found for place in range(length)]
    assert torch.equal(ids_T[:total], texts.ids_T) and torch.equal(filled.place_N, texts.place_N)
    for name in ("ids_T", "positions_T", "cu_seqlens"):
        assert getattr(filled, name).dtype == getattr(texts, name).dtype, name


@pytest.mark.parametrize(("family", "bidirectional"), CASES)
def test_filler_changes_nothing(tmp_path, family, bidirectional):
    """Every family gives the same vectors and gradients with a filled row; the filler's own gradient is nothing.

    Sums over more rows, of which the further ones are zeros, may be added up in another order: a few roundings of fp32
    (observed: none but in gradients of Qwen's, 2e-7).
    """
    path = make_model(family, tmp_path)
    plain, filled = (build(path, bidirectional=bidirectional) for _ in range(2))
    filled.backbone.token_bucket = BUCKET
    rows = []
    first = next(m for m in filled.backbone.modules() if isinstance(m, torch.nn.Linear))
    first.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    for lengths in STEPS:
        expected, found = step(plain, lengths), step(filled, lengths)
        assert rows.pop() == -(-sum(lengths) // BUCKET) * BUCKET
        assert (found - expected).abs().max() < 2e-6
        assert_same_gradients(filled, plain)
    assert torch.equal(filled.eval()(texts_of(STEPS[0])), plain.eval()(texts_of(STEPS[0])))  # only training fills up


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_compiled_layers_equal_plain_ones(tmp_path, family):
    """Same vectors and gradients, and within one bucket nothing is compiled twice, whatever the texts of a step.

    Fused sums are rounded elsewhere: observed 4e-7 on the vectors. In evaluation the layers run as they are.
    """
    path = make_model(family, tmp_path)
    plain, compiled = build(path), build(path, compiled=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for number, lengths in enumerate(STEPS[:-1]):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = step(compiled, lengths, number)
        assert (found - step(plain, lengths, number)).abs().max() < 2e-6
        assert_same_gradients(compiled, plain)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert torch.equal(compiled.eval()(texts_of(STEPS[0])), plain.eval()(texts_of(STEPS[0])))
    assert counters["stats"]["unique_graphs"] == graphs


def test_all_layers_share_their_graphs(tmp_path):
    """Four layers compile as many graphs as one: else a run would compile for hours.

    Each further size of a row compiles as many again: a graph for any size would make a step depend on those before it.
    """
    counts = []
    for layers in (1, 4):
        torch._dynamo.reset()
        counters.clear()
        model = build(
            helpers.make_model("bert", tmp_path / str(layers), num_hidden_layers=layers), compiled=True, backend="aot_eager"
        )
        for lengths in STEPS[0], STEPS[-1], [130, 130]:
            step(model, lengths)
            counts.append(counters["stats"]["unique_graphs"])
    assert 0 < counts[0] <= 4 and counts == [counts[0], 2 * counts[0], 3 * counts[0]] * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_what_is_computed_twice_draws_the_same_dropout(tmp_path, family, reentrant):
    """A piece without gradients (GradCache) and a layer's second pass (checkpointing) are the first to the bit.

    Their graphs are not the same one. Otherwise the gradient would be that of another model than the loss's.
    """
    path = make_model(family, tmp_path, dropout=0.2)
    kept, checkpointed = (build(path, compiled=True, checkpointing=how) for how in (None, reentrant))
    for lengths in STEPS[:2]:
        vectors = step(kept, lengths, seed=3)
        torch.manual_seed(3)
        with torch.no_grad():
            assert torch.equal(kept(texts_of(lengths, 3)), vectors)
        assert torch.equal(step(checkpointed, lengths, seed=3), vectors)
        assert_same_gradients(checkpointed, kept)
        assert (step(kept, lengths, seed=3) - build(path).eval()(texts_of(lengths, 3))).abs().max() > 1e-2  # it is on
    assert counters["stats"]["unique_graphs"] > 0


def test_compiled_dropout_drops_its_share(tmp_path):
    """The share p is 0 and the rest scaled by its inverse, in one graph: the plain CPU's masks, of numpy, would part it."""
    dropout = build(helpers.make_model("bert", tmp_path, dropout=0.3)).backbone.embeddings.dropout
    out = torch.compile(lambda x: dropout(x) * 1, backend=BACKEND, dynamic=False, fullgraph=True)(torch.ones(400, 400))
    kept = out != 0
    # Five standard errors of a share of 160,000 draws.
    assert abs(kept.float().mean().item() - 0.7) < 5 * (0.3 * 0.7 / 160_000) ** 0.5
    assert torch.allclose(out[kept], torch.tensor(1 / 0.7))


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    """A model without layers to share graphs, and a machine without a compiler, which would fail in the first step."""
    with pytest.raises(ValueError, match="Linear has no layers that can be compiled"):
        compilation.compile_layers(torch.nn.Linear(2, 2), token_bucket=8)
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    assert "there is no C++ compiler" in compilation.obstacle("cpu")
    assert compilation.obstacle("cpu", "aot_eager") is None
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert "triton" in compilation.obstacle("cuda")
