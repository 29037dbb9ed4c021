"""Processes that share one heap of work, tied by a key-value store and nothing else.

There is no collective call, so none can hang when a process dies: each takes the next piece when
it is free, and whoever waits for another watches its pulse. Works under torchrun and under any
launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; alone without them.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_POLL_S = 0.1


class Crew:
    """One process's view of all. Use it as a context: the pulse beats inside.

    Args:
        store: shared by all ranks of the run, and by nothing else.
        rank: 0..size-1; rank 0 leads.
        size: number of ranks.
        patience_s: a rank without a pulse for so long is taken for dead.
    """

    def __init__(
        self, store: dist.Store, rank: int = 0, size: int = 1, patience_s: float = 60.0
    ) -> None:
        self.rank, self.size, self.patience_s = rank, size, patience_s
        self._store, self._stop = store, threading.Event()
        # a thread: drawing a batch, or the first compiled one, may take longer than the patience
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    @classmethod
    def join(cls, patience_s: float) -> "Crew":
        """The crew that the launcher's environment describes, or a crew of one.

        Raises:
            ConnectionError: the others cannot be reached.
            ValueError: the environment is incomplete.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(dist.HashStore(), patience_s=patience_s)
        try:
            store, rank, size = next(
                dist.rendezvous("env://", timeout=timedelta(seconds=patience_s))
            )
        except dist.DistError as error:
            raise ConnectionError(f"the other processes cannot be reached: {error}") from error
        # a restarted crew must not find the claims of the one that died
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"titok_fast/{attempt}", store), rank, size, patience_s)

    def __enter__(self) -> "Crew":
        if self.size > 1:
            self._pulse.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end_pulse()

    def claim(self) -> int:
        """The next number from 0 on; no two ranks get the same."""
        return self._add("claimed", 1) - 1

    def report(self, count: int) -> None:
        """Add to what is finished."""
        self._add("finished", count)

    def finished(self) -> int:
        """What all ranks have reported together."""
        return self._add("finished", 0)

    def publish(self, plan: dict[str, Any] | None) -> None:
        """Rank 0: tell the others what to do; None where there is no plan, as it failed."""
        self._ask(lambda: self._store.set("plan", json.dumps(plan)))

    def plan(self) -> dict[str, Any]:
        """Other ranks: wait for the plan of rank 0.

        Raises:
            ConnectionError: rank 0 failed, or its pulse stopped.
        """
        self._wait(lambda: [0] if not self._ask(lambda: self._store.check(["plan"])) else [])
        plan = json.loads(self._ask(lambda: self._store.get("plan")))
        if plan is None:
            raise ConnectionError("rank 0 could not start; its message says why")
        return plan

    def leave(self) -> None:
        """Other ranks: say that nothing more is coming. The last call to make."""
        self._end_pulse()  # first: rank 0 may take the store away once it knows
        self._add(f"left/{self.rank}", 1)

    def wait_for_others(self, poll: Callable[[], object]) -> None:
        """Rank 0: wait until all others have left.

        Args:
            poll: called now and then, for progress bars.

        Raises:
            ConnectionError: a pulse stopped.
        """

        def present() -> Iterable[int]:
            poll()
            return [r for r in range(1, self.size) if not self._add(f"left/{r}", 0)]

        self._wait(present)

    def _wait(self, present: Callable[[], Iterable[int]]) -> None:
        """Return when no rank is present any more; watch the pulses of those that are."""
        seen: dict[int, tuple[int, float]] = {}  # beats of a rank, and when they last grew
        while ranks := list(present()):
            for rank in ranks:
                beats, now = self._add(f"pulse/{rank}", 0), time.monotonic()
                if rank not in seen or beats != seen[rank][0]:
                    seen[rank] = beats, now
                elif now - seen[rank][1] > self.patience_s:
                    raise ConnectionError(
                        f"rank {rank} has not answered for {self.patience_s:g} s and seems dead"
                    )
            time.sleep(_POLL_S)

    def _beat(self) -> None:
        try:
            while not self._stop.is_set():
                self._store.add(f"pulse/{self.rank}", 1)
                self._stop.wait(min(1.0, self.patience_s / 8))
        except dist.DistError:
            return  # the main thread meets the same error, and reports it

    def _end_pulse(self) -> None:
        self._stop.set()
        if self._pulse.is_alive():
            self._pulse.join()

    def _add(self, key: str, count: int) -> int:
        return self._ask(lambda: self._store.add(key, count))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except dist.DistError as error:
            raise ConnectionError(f"rank 0 or its launcher has gone: {error}") from error
