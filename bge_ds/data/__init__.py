"""From lines of JSON to padding-free batches: reading, tokenising, Arrow shards, order, collation."""
