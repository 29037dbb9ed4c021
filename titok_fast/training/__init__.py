"""Training: a recipe to a model, for every stage of a tokenizer and for the generator.

A task computes losses, `update` turns them into an optimizer step, `loop` runs, logs and saves.
Reading order: recipe, tasks, losses, discriminator, optim, ema, code_revival, engine, stage_model,
update, loop, checkpoints, resume, validation, logs, signals.
"""
