"""Checks of every host before a run."""
