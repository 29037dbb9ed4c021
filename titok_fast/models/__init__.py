"""The networks: tokenizer, generators, MaskGIT-VQGAN, and the frozen ones that measure images.

They hold weights and call kernels; batches, files and fast modes lie above them.
Reading order: attention_cpu, attention, blocks, encoder, quantizer, decoder, vqgan, tokenizer,
generator, weights, code_usage, classifier, packages, perceptual.
"""
