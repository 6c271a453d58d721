"""The padding-free forward is the padded stock model, output and gradients."""

from __future__ import annotations

import helpers
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
from transformers.models.qwen3 import modeling_qwen3

from bge_ds.data.preprocess.validate import load_tokenizer
from bge_ds.kernels.packed import pack
from bge_ds.modeling import encoder as encoder_module
from bge_ds.modeling.encoder import FAMILIES, Encoder, can_run_unpadded, check_lengths, has_causal_attention, longest_text, pool
from bge_ds.modeling.export import save_model

# fp32 sums in another order: observed 4e-7 on the output.
TOLERANCE = 2e-6
# Texts of one token, of one length, and longer than the 6 tokens of the tiny models' windows.
LENGTHS = [5, 17, 3, 40, 17, 100, 5, 1]
CASES = [
    pytest.param(name, both, id=f"{name}-bidirectional" if both else name)
    for name, family in FAMILIES.items()
    for both in ([False, True] if family.decoder else [False])
    if family.unpadded
]


def build(path, attention=None, pooling="mean", **options):
    return Encoder.load(path, pooling=pooling, attention=attention, **options).eval()


def make_model(family, folder, **changes):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    return helpers.make_model(family, folder, **changes)


def assert_same_gradients(ours, theirs):
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
            continue
        difference = (parameter.grad - theirs[name].grad).abs().max()
        # Key biases have a true gradient of zero: compare with the size of the layer's, not of their own noise.
        assert difference <= 1e-5 * max(theirs[name].grad.abs().max(), 1e-1), name


class Rounding:
    """Loads as transformers 5.17 does while DeepSpeed shards a model of 16 bits: what is computed and not read is rounded."""

    extra: tuple[str, ...] = ()  # modules that get a buffer which no one can compute

    @classmethod
    def from_pretrained(cls, *args, **options):
        model, info = AutoModel.from_pretrained(*args, **options)
        for place, module in model.named_modules():
            if place in cls.extra:
                module.register_buffer("learned", torch.ones(3), persistent=False)
            for name, x in module.named_buffers(recurse=False):
                if x.is_floating_point():
                    module._buffers[name] = x.bfloat16()
        return model, info


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.unpadded])
def test_rounded_buffers_are_computed_anew(tmp_path, family):
    """A loaded model has the buffers and weights of one loaded without rounding, in fp32."""
    exact = build(make_model(family, tmp_path)).backbone
    backbone = encoder_module.load_backbone(Rounding, str(tmp_path))
    for mine, theirs in (
        (backbone.named_buffers(), exact.named_buffers()),
        (backbone.named_parameters(), exact.named_parameters()),
    ):
        for (name, x), (_, other) in zip(mine, theirs, strict=True):
            assert x.dtype == other.dtype and (torch.equal(x, other) or "pooler" in name), name


def test_weights_beside_a_rounded_buffer_stay(tmp_path):
    """What was loaded is not made anew with the buffers of its module."""
    backbone = build(make_model("llama", tmp_path)).backbone
    before = {name: x.clone() for name, x in backbone.named_parameters()}
    backbone._init_weights = lambda module: (type(backbone)._init_weights(backbone, module), module.learned.fill_(1.0))
    for module in (backbone.norm, backbone.embed_tokens, backbone.layers[0].mlp.up_proj):
        module.register_buffer("learned", torch.ones(3, dtype=torch.float16), persistent=False)
    encoder_module._restore_buffers(backbone)
    assert all(torch.equal(x, before[name]) for name, x in backbone.named_parameters())


@pytest.mark.parametrize("place", ["", "norm"])
def test_rounded_buffers_that_no_one_can_compute_are_refused(tmp_path, monkeypatch, place):
    """Rather than trained as they are, beside weights or alone."""
    monkeypatch.setattr(Rounding, "extra", (place,))
    with pytest.raises(ValueError, match=r"makes learned of Llama.* in 16 bits under ZeRO 3"):
        encoder_module.load_backbone(Rounding, str(make_model("llama", tmp_path)))


def assert_padding_free_equals_padded(path, **options):
    texts, _ = pack(helpers.random_texts(LENGTHS, first=0, last=2))
    weights = torch.randn(len(LENGTHS), 32, generator=torch.Generator().manual_seed(1))
    ours, padded = build(path, None, **options), build(path, "sdpa", **options)
    assert ours.backbone.config._attn_implementation != padded.backbone.config._attn_implementation
    out, expected = ours(texts), padded(texts)
    assert (out - expected).abs().max() < TOLERANCE
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(ours, padded)


@pytest.mark.parametrize(("family", "bidirectional"), CASES)
def test_every_family_without_padding_equals_padded(tmp_path, family, bidirectional):
    """Same vectors and same gradient of every parameter; without it, texts would see each other or sit at wrong places."""
    path = make_model(family, tmp_path)
    assert_padding_free_equals_padded(path, bidirectional=bidirectional)


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("pooling", ["cls", "last_token"])
def test_every_pooling_without_padding_equals_padded(tmp_path, family, pooling):
    """The same for the vector of one token: the first or last one of a text, not of a rectangle's row."""
    both = family == "qwen3" and pooling == "cls"
    assert_padding_free_equals_padded(make_model(family, tmp_path), pooling=pooling, bidirectional=both)


@pytest.mark.parametrize(("pooling", "mode"), [("cls", "cls"), ("mean", "mean"), ("last_token", "lasttoken")])
def test_every_pooling_is_that_of_sentence_transformers(pooling, mode):
    """Vectors and gradients of each pooling, against a reference of other authors over padded texts.

    The padded model of the other tests shares `pool` with the packed one: a wrong token would be the same in both.
    """
    from sentence_transformers.models import Pooling

    texts, order = pack(helpers.random_texts(LENGTHS))
    rows = [torch.randn(length, 8, generator=torch.Generator().manual_seed(n)) for n, length in enumerate(LENGTHS)]
    padded_NLD = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1e3).requires_grad_()
    mask_NL = torch.nn.utils.rnn.pad_sequence([torch.ones(length, dtype=torch.int64) for length in LENGTHS], batch_first=True)
    hidden_TD = torch.cat([rows[n] for n in order]).requires_grad_()

    reference = Pooling(8, pooling_mode=mode)({"token_embeddings": padded_NLD, "attention_mask": mask_NL})["sentence_embedding"]
    vectors_ND = pool(hidden_TD, texts, pooling)[texts.place_N]
    assert (vectors_ND - reference).abs().max() < TOLERANCE

    weights_ND = torch.randn(len(LENGTHS), 8, generator=torch.Generator().manual_seed(99))
    (vectors_ND * weights_ND).sum().backward()
    (reference * weights_ND).sum().backward()
    expected_TD = torch.cat([padded_NLD.grad[n, : LENGTHS[n]] for n in order])
    assert (hidden_TD.grad - expected_TD).abs().max() < TOLERANCE


@pytest.mark.parametrize(("family", "bidirectional"), CASES)
def test_gradient_checkpointing(tmp_path, family, bidirectional, monkeypatch):
    """Every layer runs again in the backward, knowing where texts end, and the gradients stay the same."""
    path = make_model(family, tmp_path)
    texts, _ = pack(helpers.random_texts(LENGTHS, first=0, last=2))
    calls = []
    plain, checkpointed = (build(path, bidirectional=bidirectional).train() for _ in range(2))
    checkpointed.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attend = encoder_module.varlen_attention
    monkeypatch.setattr(encoder_module, "varlen_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    weights = torch.randn(len(LENGTHS), 32, generator=torch.Generator().manual_seed(1))
    for model, times in (plain, 2), (checkpointed, 4):
        calls.clear()
        (model(texts) * weights).sum().backward()
        assert len(calls) == times
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_dropout_has_the_same_statistics(tmp_path, family):
    """With dropout, vectors have the padded model's mean and spread: the same dropout at the same places."""
    path = make_model(family, tmp_path, dropout=0.2)
    lengths, copies, rounds = [1, 4, 9, 20], 50, 12
    texts, _ = pack([text for text in helpers.random_texts(lengths) for _ in range(copies)])
    torch.manual_seed(0)
    means, squared_errors = [], []
    for attention in (None, "sdpa"):
        model = build(path, attention).train()
        with torch.no_grad():
            draws = torch.cat([model(texts).unflatten(0, (len(lengths), copies)) for _ in range(rounds)], 1)
        mean = draws.mean(1, keepdim=True)
        # The mean of each entry, and of each text's squared distance from its mean vector: the spread.
        for values in (draws, (draws - mean).square().sum(2, keepdim=True)):
            means.append(values.mean(1))
            squared_errors.append(values.var(1) / (copies * rounds))
        assert (means[-1] > 1e-2).all()
    # 132 numbers within five standard errors: by chance once in ten thousand seeds.
    for k in (0, 1):
        assert ((means[k] - means[k + 2]).abs() <= 5 * (squared_errors[k] + squared_errors[k + 2]).sqrt()).all()


def test_a_text_does_not_see_its_neighbours(tiny_bert_path):
    """A text's vector is the same alone and in any company, and vectors come back in the caller's order."""
    encoder = build(tiny_bert_path)
    texts = helpers.random_texts([9, 30, 4, 9, 9])
    together = encoder(pack(texts)[0])
    alone = torch.cat([encoder(pack([text])[0]) for text in texts])
    assert (together - alone).abs().max() < TOLERANCE
    assert (together[0] - together[3]).abs().max() > 1e-3  # two texts of one length are not one text


def test_encode_ids_batches_change_nothing(tiny_bert_path):
    """encode_ids gives each text's vector whatever the batch it falls into, in the caller's order."""
    encoder = build(tiny_bert_path)
    texts = helpers.random_texts([9, 30, 4, 9, 50, 2])
    assert (encoder.encode_ids(texts, batch_tokens=20) - encoder(pack(texts)[0])).abs().max() < TOLERANCE


def test_real_model_keeps_its_vectors(minilm_path):
    """all-MiniLM-L6-v2 through our forward gives sentence-transformers' vectors."""
    from sentence_transformers import SentenceTransformer

    sentences = [s * k for s, k in zip(helpers.SENTENCES, [1, 3, 1, 2, 1, 8], strict=True)]
    reference = SentenceTransformer(str(minilm_path), device="cpu")
    reference.max_seq_length = 256
    ids = load_tokenizer(str(minilm_path))(sentences, truncation=True, max_length=256)["input_ids"]
    ours = build(minilm_path).encode_ids(ids)
    assert (ours - torch.from_numpy(reference.encode(sentences, normalize_embeddings=True))).abs().max() < TOLERANCE


def test_texts_longer_than_the_positions_are_refused(tiny_bert_path, tmp_path):
    """A length the position embeddings do not reach is an error before training, not an index error inside it."""
    check_lengths(AutoConfig.from_pretrained(tiny_bert_path), passage_max_len=130)
    with pytest.raises(ValueError, match="--passage_max_len 131 is more than the 130 positions"):
        check_lengths(AutoConfig.from_pretrained(tiny_bert_path), passage_max_len=131)
    roberta = AutoConfig.from_pretrained(helpers.make_model("roberta", tmp_path))
    with pytest.raises(ValueError, match="128 positions"):
        check_lengths(roberta, query_max_len=129)
    # All of the published model's 514 rows are 512 positions: a padded type counts like this too.
    assert longest_text(helpers.tiny_config("mpnet")) == 128
    assert longest_text(helpers.tiny_config("llama")) == 130


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_bidirectional_decoder_is_saved_as_one(tmp_path, tiny_bert_path, family):
    """Stock transformers runs the saved folder in both directions, a text alone or padded; else its vectors were others."""
    path = helpers.make_model(family, tmp_path / "start")
    ours = build(path, bidirectional=True, normalize=False)
    assert not has_causal_attention(ours.backbone.config)
    ids = helpers.random_texts([9, 30, 4])
    expected = ours.encode_ids(ids)
    assert (expected - build(path, normalize=False).encode_ids(ids)).abs().max() > 1e-2
    save_model(ours.backbone, ours.backbone.state_dict(), load_tokenizer(str(tiny_bert_path)), tmp_path / "saved")
    assert not has_causal_attention(build(tmp_path / "saved").backbone.config)
    stock = AutoModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        alone = torch.stack([stock(torch.from_numpy(i)[None]).last_hidden_state[0].mean(0) for i in ids])
    assert (alone - expected).abs().max() < TOLERANCE * expected.abs().max()
    padded = build(tmp_path / "saved", "sdpa", normalize=False).encode_ids(ids)
    assert (padded - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_what_makes_no_sense_for_a_backbone_is_refused(tmp_path, tiny_bert_path, monkeypatch):
    """bidirectional of an encoder, the first token of a causal decoder, and a transformers that would ignore the config."""
    with pytest.raises(ValueError, match=r"decoders \(gemma, granite, llama.* is of type bert"):
        build(tiny_bert_path, bidirectional=True)
    path = helpers.make_model("llama", tmp_path)
    with pytest.raises(ValueError, match="pooling 'cls' of a causal llama"):
        build(path, pooling="cls")
    build(path, pooling="cls", bidirectional=True)
    monkeypatch.setattr(encoder_module, "_stock_runs_bidirectionally", lambda: False)
    with pytest.raises(ValueError, match="upgrade transformers"):
        build(path, bidirectional=True)


@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_no_keys_and_values_are_kept(tmp_path, monkeypatch, attention):
    """A decoder's cache for generating is never made: it would hold the memory of all layers."""
    model = build(helpers.make_model("qwen3", tmp_path), attention)
    assert model.backbone.config.use_cache
    monkeypatch.setattr(modeling_qwen3, "DynamicCache", None)
    model(pack(helpers.random_texts([3, 5]))[0])


@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_other_backbones_run_padded_and_say_so(tmp_path, attention):
    """A backbone whose attention cannot be replaced gives each text's own vector all the same, and is named."""
    encoder = build(helpers.make_model("mpnet", tmp_path), attention)
    assert not can_run_unpadded(encoder.backbone.config)
    said = encoder_module.describe_execution(encoder.backbone.config, torch.device("cpu"), torch.float32)
    assert said.startswith("padded (mpnet is not") and "modernbert" in said and said.count("mpnet") == 1
    texts = helpers.random_texts([9, 30, 4, 9])
    alone = torch.cat([encoder(pack([text])[0]) for text in texts])
    assert (encoder(pack(texts)[0]) - alone).abs().max() < TOLERANCE
