"""Exact search, retrieval measures, embedding with a trained model, and evaluation while training. Knows no losses."""

DEFAULT_LENGTHS = {"query_max_len": 64, "passage_max_len": 256}  # tokens, where neither a flag nor a run says so
