"""Kernels that other generators can use too: one op, one file, each beside its plain reference."""

if __name__ != "titok_fast.kernels":
    raise ImportError(
        "this folder is the package titok_fast.kernels: install the project (`pip install -e .`) "
        "and import that; a bare `kernels` belongs to another project"
    )
