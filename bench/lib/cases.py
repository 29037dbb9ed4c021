"""The old name of lib/candidates.py for bench/peers.py and bench/paper; goes with their imports."""

from lib.candidates import arithmetic
from lib.harness import say

__all__ = ["arithmetic", "say"]
