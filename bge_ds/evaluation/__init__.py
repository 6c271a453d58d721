"""BEIR folders, exact search, retrieval measures, and evaluation while training. Knows no losses."""
