"""Saving, finding, checking and restoring checkpoints; optimizer state by parameter. Builds no models."""
