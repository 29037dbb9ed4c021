"""What a training run is: a frozen `Recipe`, read from YAML under upstream's field names.

Every key of a file is used, is known to mean nothing, or is an error.
Reading order: recipe, sections, official.
"""
