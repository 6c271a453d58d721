"""Contrastive loss and GradCache. Must not know the engine or the data."""
