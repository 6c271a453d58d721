"""A process that computes RetroMAE's losses of a text of 8,192 tokens; they add less than 1 GiB. Argument: a folder."""

from pathlib import Path

from retromae_models import make, make_batch

from bge_ds.training.metrics import process_peak


def main(folder: str) -> None:
    model = make("modernbert", Path(folder), {"max_position_embeddings": 8192}).float()
    before = process_peak()
    losses = model(make_batch([8192, 5]))
    losses[:3].sum().backward()
    assert losses.isfinite().all() and all(p.grad.isfinite().all() for p in model.decoder.parameters())
    grown = process_peak() - before
    assert grown < 1 << 30, grown
