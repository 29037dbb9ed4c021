"""The settings of a training run: a frozen `Recipe`, read from YAML under upstream's names.

A recipe is a file, or a name of one that comes with the package. Every key of it is used, is known
to mean nothing here, or is an error that names the nearest keys.
Reading order: recipe, sections, official.
"""
