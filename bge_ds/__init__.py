"""RetroMAE pre-training and contrastive fine-tuning of text embedding models, on DeepSpeed."""

__version__ = "0.1.0"
