"""Python processes of their own, in which kernels are compiled as on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python without Triton's interpreter, by default in the repository's root."""
    # set, so that conftest's default does not apply where a process imports it
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, cwd=cwd
    )


def output_of(code: str) -> str:
    """What a piece of Python prints; it must end well."""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout
