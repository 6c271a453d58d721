"""A corpus to vectors on disk, by any number of ranks, resumable; and their reader. Knows no losses and no training."""
