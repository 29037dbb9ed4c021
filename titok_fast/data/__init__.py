"""Training data: sources read at any index, and batches determined by seed and step.

Nothing in a data file is executed; damaged records are counted and named. Token shards hold the
tokens of all images, so that generators train without a tokenizer.
Reading order: config, sources, webdataset, token_shards, crops, reader, loader, tokenize_shards.
"""
