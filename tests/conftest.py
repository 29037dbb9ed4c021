"""Shared fixtures. Without a GPU, kernels under test run in Triton's interpreter."""

import os
import sys
from pathlib import Path

import pytest
import torch

# `python -m pytest` puts the repository's root here, where transformers and diffusers would take
# the folder kernels/ for another project's package
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
