"""Measures: reconstruction, generation, linear probing, and the small Fashion-MNIST classifier."""
