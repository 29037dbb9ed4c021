"""What differs between stages: the networks, the loss of a batch, and what is shown and measured.

Reading order: base, tokenizer, generator, classifier, registry.
"""
