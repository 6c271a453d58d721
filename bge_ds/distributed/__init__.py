"""What ranks do together: the DeepSpeed engine, collectives that carry gradients, checkpoints."""
