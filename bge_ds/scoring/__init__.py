"""A teacher's scores for training groups, by any number of ranks, resumable. Knows no losses and no training."""
