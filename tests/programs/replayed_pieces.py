"""A rank that fine-tunes in pieces and prints whether each piece computed twice has the same vectors, dropout included.

Arguments: model, data, output folder.
"""

import torch

from bge_ds.losses import grad_cache
from programs.train import train


def main(model: str, data: str, out: str) -> None:
    original, seen, replayed = grad_cache.backward, {}, []

    def watched(embed, sizes, loss, run_backward):
        seen.clear()

        def watched_embed(k):
            vectors, scale = embed(k)
            if k in seen:
                replayed.append(torch.equal(seen[k], vectors.detach()))
            seen[k] = vectors.detach()
            return vectors, scale

        return original(watched_embed, sizes, loss, run_backward)

    grad_cache.backward = watched
    flags = dict(
        model_name_or_path=model, train_data=data, output_dir=out, cache_dir=out + "_cache", max_steps=2, train_group_size=3,
        per_device_train_batch_size=3, sub_batch_size=2, save_strategy="no", dataloader_num_workers=0,
    )  # fmt: skip
    train("finetune", flags)
    different = not torch.equal(seen[0], seen[1])
    print("replayed", len(replayed), all(replayed), different)
