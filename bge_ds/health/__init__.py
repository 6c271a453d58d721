"""Failure detection, preemption and exit codes. Knows no models and no checkpoints."""
