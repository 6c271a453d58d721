"""A model's size without its weights: elements as the loaded model has them, activations as a real pass keeps them."""

from __future__ import annotations

import helpers
import pytest
import torch

from bge_ds.deepspeed_engine import engine as engines
from bge_ds.doctor import memory
from bge_ds.kernels import packed
from bge_ds.modeling.encoder import Encoder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return helpers.make_model("bert", tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=256, dropout=0.1)


def test_elements_are_those_of_the_loaded_model(bert):
    """Counted without reading a weight: as many as the loaded encoder has, and as many that train."""
    size, model = memory.measure(str(bert), "", 0, 128, half=False), Encoder.load(str(bert), "mean")
    assert (size.elements, size.trained) == (engines.count_elements(model), engines.count_elements(model, trainable=True))
    assert size.trained < size.elements and size.activations is None  # the pooler does not train


@pytest.mark.parametrize("length", [16, 100])
def test_activations_are_those_of_a_real_pass(bert, length):
    """Never fewer bytes than a pass of the same texts keeps, and at most a fifth more; in 16 bits, about half."""
    size = memory.measure(str(bert), "", 20 * length, length, half=False)
    model, storages = Encoder.load(str(bert), "mean"), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    texts, _ = packed.pack(helpers.random_texts([length] * 20))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(texts)
    real = sum(storage.nbytes() for storage in storages.values())
    assert real <= size.activations <= 1.2 * real
    half = memory.measure(str(bert), "", 20 * length, length, half=True)
    assert 0.4 < half.activations / size.activations < 0.7


def test_a_model_that_asks_for_values_has_no_known_activations(tmp_path):
    """Tensors that hold nothing cannot say; the rest of the size is there all the same."""
    folder = helpers.make_model("qwen3", tmp_path / "qwen")
    size = memory.measure(str(folder), "", 512, 64, half=False)
    assert size.elements > 0


@pytest.mark.parametrize(
    ("name", "offloaded"), [("zero1", ()), ("zero2_offload", ("optimizer",)), ("zero3_offload", ("optimizer", "weights"))]
)
def test_what_is_offloaded_is_the_hosts(name, offloaded):
    """The shipped configs' own places; a checkpoint holds 12 bytes a trained weight and the model, whatever the stage."""
    config = memory.read_config(name, 2, bf16=True, fp16=False)
    needs = memory.requirements(memory.ModelSize(1000, 900, 5), config, 2)
    assert needs.offloaded == offloaded and needs.parts["activations"] == 5
    assert needs.checkpoint == 12 * 900 + 4 * 1000
