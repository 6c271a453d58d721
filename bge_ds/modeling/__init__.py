"""Models and losses: the padding-free encoder, RetroMAE's decoder, the contrastive loss. Nothing here knows the engine."""
