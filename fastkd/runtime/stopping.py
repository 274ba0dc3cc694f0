"""Ctrl-C and SIGTERM end a run where its checkpoint is whole, and not in the middle of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from .world import RankLost

__all__ = ["Stopped", "stop_requests"]


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; a checkpoint from which it goes on is written."""


@contextlib.contextmanager
def stop_requests(wanted: bool) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set an event instead of ending the process in the middle of a step; a
    second one does what it always did."""
    event = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before: dict[int, Any] = {}

    def ask(number: Any, frame: object) -> None:
        event.set()
        signal.signal(number, before[number])

    for wanted_signal in (signal.SIGINT, signal.SIGTERM):
        before[wanted_signal] = signal.signal(wanted_signal, ask)
    try:
        yield event
    except RankLost:
        # torchrun now ends this process too, which has to say first what happened and where to go on.
        before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
