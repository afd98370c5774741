"""SIGTERM, which schedulers and containers send, ends a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def ended_gently() -> Iterator[None]:
    """The first signal of the block raises KeyboardInterrupt, the second one ends the process at once.

    What was ignored before stays so (nohup). One of several processes that work together is left alone: whoever
    started them ends and tells it.
    """
    if threading.current_thread() is not threading.main_thread() or "TORCHELASTIC_RUN_ID" in os.environ:
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    taken = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def stop(*_: Any) -> None:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
