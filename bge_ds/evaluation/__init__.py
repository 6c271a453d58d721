"""BEIR folders, exact search, retrieval measures, and evaluation while training. Knows no losses."""

DEFAULT_LENGTHS = {"query_max_len": 64, "passage_max_len": 256}  # tokens, where neither a flag nor a run says so
