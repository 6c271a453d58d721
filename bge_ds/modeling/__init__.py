"""Padding-free backbones, pooling, RetroMAE, vocabulary heads, export, LoRA. Must not know data or engine."""
