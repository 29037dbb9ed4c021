"""Joining and leaving the processes of a run."""

from pathlib import Path

import pytest
from support.processes import python

LEAVE = """
import time
from pathlib import Path
from titok_fast.distributed import join

def threads():
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]

with join("cpu"):
    import torch._dynamo  # as the first custom op does
    import torch.distributed.fsdp
    assert threads()
end = time.monotonic() + 5  # a thread that has ended may be listed for a moment
while threads() and time.monotonic() < end:
    time.sleep(0.05)
print(*threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_no_thread_of_the_group_outlives_the_run() -> None:
    """Such a thread could abort the process at its end, after all its work was done."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    done = python("-c", LEAVE, **where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


END = """
import atexit, threading, time
from titok_fast.distributed import end_process, join

try:
    with join("cpu"):
        raise ValueError  # so the group lives on
except ValueError:
    pass
threading.Thread(target=time.sleep, args=(600,)).start()  # Python's own end would wait for it
atexit.register(print, "atexit")
end_process(3)
"""


def test_a_rank_ends_beside_a_group_that_is_still_alive() -> None:
    """One in forty processes that met a killed rank ended by SIGABRT, with that status."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    done = python("-c", END, **where)
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip() == "atexit"
