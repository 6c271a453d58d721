"""Ranks that train a toy objective through the training loop: from the average of a text's embeddings, which token is first?

Arguments: folder for the runs, JSON of flags. Trains once to the end and once from the checkpoint in the middle.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bge_ds.config.arguments import PretrainArguments
from bge_ds.data import collate
from bge_ds.data.preprocess import validate
from bge_ds.data.shards import shard_reader
from bge_ds.deepspeed_engine import engine as engines
from bge_ds.distributed import collectives
from bge_ds.kernels.segment_mean import segment_mean
from bge_ds.modeling.encoder import load_config
from bge_ds.training import loop
from bge_ds.training.objective import Objective


class Averages(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding, self.dropout, self.out = nn.Embedding(vocabulary, 8), nn.Dropout(0.2), nn.Linear(8, vocabulary)

    def forward(self, texts):
        mean_NE = segment_mean(self.dropout(self.embedding(texts.ids_T)), texts.cu_seqlens, texts.runs)
        return nn.functional.cross_entropy(self.out(mean_NE).float(), texts.ids_T[texts.cu_seqlens[:-1].long() + 1])


class ToyObjective(Objective):
    title = "toy training"
    resume_names = ("max_seq_length",)

    def __init__(self, args):
        self.args, self.data = args, shard_reader.open_folders([Path(args.train_data[0])])
        self.tokenizer = validate.load_tokenizer(args.model_name_or_path, None)
        self.model_config = load_config(args.model_name_or_path)

    def build_model(self, device):
        return Averages(self.model_config.vocab_size)

    def collate(self, seed):
        return collate.collate_texts, dict(seed=seed, max_seq_length=self.args.max_seq_length, encoder_share=0.3)

    def backward(self, engine, batch, share, seed):
        seed(0)
        loss = engine(batch.texts)
        engine.backward(engines.all_or_nothing(loss))
        return {"loss": loss.detach()}

    def save(self, engine, folder, scores):
        weights, file = engines.full_parameters(engine), folder / "model.safetensors"

        def write():
            save_file(weights, file)
            return max(float((weight - weights[name]).abs().max()) for name, weight in load_file(file).items())

        return collectives.on_first_rank(write)


def main(folder: str, given: str) -> None:
    flags = json.loads(given)
    torch.use_deterministic_algorithms(True)
    loop.train(ToyObjective, PretrainArguments.build(**flags, output_dir=f"{folder}/whole"))
    again = {"output_dir": f"{folder}/resumed", "resume_from_checkpoint": f"{folder}/whole/checkpoint-3"}
    loop.train(ToyObjective, PretrainArguments.build(**flags, **again))
