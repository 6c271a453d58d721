"""The training loop and its set-up, data order, resuming, metrics, non-finite steps. Knows no losses and no models."""
