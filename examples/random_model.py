"""Saves a model of a config with random weights: where training from scratch starts, as a model of its own.

python examples/random_model.py --config quickstart/small_bert --output quickstart/random
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, logging


def main() -> None:
    parser = argparse.ArgumentParser(description="Saves a masked language model with random weights.")
    parser.add_argument("--config", type=Path, required=True, help="folder with config.json and the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=42, help="of the weights (42)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(args.config)).save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.config).save_pretrained(args.output)
    print(f"random weights in {args.output}")


if __name__ == "__main__":
    main()
