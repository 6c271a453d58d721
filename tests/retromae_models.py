"""Tiny RetroMAE models and batches for them."""

from __future__ import annotations

import helpers
import numpy as np
import torch
from transformers import AutoModelForMaskedLM

from bge_ds.data.collate import PretrainBatch, choose_masked
from bge_ds.data.sampling.sampler import mix64
from bge_ds.kernels.packed import pack
from bge_ds.modeling.encoder import load_backbone
from bge_ds.modeling.retromae import RetroMAE, RetroMAESettings


def make_batch(lengths, seed=0, epoch=0) -> PretrainBatch:
    rng = np.random.default_rng(seed)
    texts, order = pack(helpers.random_texts(lengths, seed=seed))
    words = []
    for i in order:
        steps = rng.integers(0, 2, lengths[i])  # words of one, two or more tokens
        steps[0], steps[-1:] = 0, 1
        if lengths[i] > 1:
            steps[1] = 1
        words.append(np.cumsum(steps))
    keys = mix64(seed, epoch, np.arange(len(lengths)))[order].view(np.int64)
    words_T, keys_N = torch.from_numpy(np.concatenate(words)), torch.from_numpy(keys)
    masked_M = choose_masked(texts, words_T, keys_N, 0.3)
    return PretrainBatch(texts, words_T, keys_N, torch.from_numpy(order), masked_M)


def make(family, path, changes=None, **settings) -> RetroMAE:
    helpers.make_model(family, path, **(changes or {}))
    torch.manual_seed(5)
    model = RetroMAE(load_backbone(AutoModelForMaskedLM, str(path)), RetroMAESettings(mask_id=4, **settings))
    for parameter in model.decoder.parameters() if model.decoder else ():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()
