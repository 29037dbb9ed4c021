"""Signals that end a run in good order."""

import os
import signal
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Inside `with`, the first SIGTERM or SIGINT sets `requested`; the same one again kills.

    The same one, because Ctrl-C under torchrun sends both: SIGINT from the terminal, then SIGTERM
    from the launcher. Only the main thread may enter.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._before: dict[signal.Signals, Any] = {}
        self._seen: set[int] = set()

    def __enter__(self) -> "Interrupt":
        self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._seen.add(number)
        self.requested = signal.Signals(number).name
