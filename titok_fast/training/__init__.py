"""Training: data, losses, optimiser, the one loop, and its recipes."""
