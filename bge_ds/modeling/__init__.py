"""Backbones without padding, pooling, RetroMAE, vocabulary heads, export, LoRA. Knows neither data nor engine."""
