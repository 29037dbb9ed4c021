"""Training data: sources read at any index, batches that depend on seed and step alone.

Nothing in a data file is executed; damaged records are counted and named.
Reading order: config, sources, webdataset, token_shards, crops, reader, loader, tokenize_shards.
"""
