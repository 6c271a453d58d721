"""The look over every host before a run."""
