"""From lines of text to Arrow shards: inputs, validation, tokenizing, workers, merging. Knows no ranks, no torch."""
