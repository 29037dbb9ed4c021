"""Tasks: what differs between stages.

A task builds the networks of its stage and computes the loss of a batch. It also measures the
trained network, makes example images and exports the model.
Reading order: base, tokenizer, generator, classifier, registry.
"""
