"""Hard negatives for training groups: exact search shared by ranks, selection, output. Knows no losses and no training."""
