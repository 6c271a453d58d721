"""The shard format: manifest, memory-mapped reader, writer, integrity checks. Knows no tokenizer and no torch."""
