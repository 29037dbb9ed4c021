"""Training from a recipe: all tokenizer stages, the generator and the classifier.

A task computes losses and trainer.py turns them into updates of the model and its discriminator.
loop.py repeats updates, writes logs and checkpoints, and resumes a run bit for bit.
Reading order: recipe, tasks, losses, discriminator, optim, ema, code_revival, engine, stage_model,
trainer, loop, checkpoints, resume, validation, logs.
"""
