"""Structured logs on stderr, for people (text) or for machines (one JSON object a line)."""

from __future__ import annotations

import logging
import os
import select
import sys
from typing import TYPE_CHECKING, cast

import structlog

if TYPE_CHECKING:
    from typing import TextIO


class LogSink:
    """A file descriptor for lines that may be lost: a full disk or a reader that hangs must not stop who logs.

    Without a buffer, since what is left in one fails again at the process's end.
    """

    def __init__(self, fd: int) -> None:
        self.lost = 0
        """Lines that could not be written, at least not whole."""
        self._fd = fd
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)

    def write(self, text: str) -> None:
        """Write a line, or count it as lost."""
        data = text.encode(errors="backslashreplace")
        try:
            while data:
                # A pipe that says yes takes this much at once; one that says no is full, and a write would wait.
                if not self._room.poll(0):
                    raise BlockingIOError
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        except OSError:
            self.lost += 1

    def flush(self) -> None:
        """There is nothing to flush."""


stderr = LogSink(2)


def configure_logging(form: str, level: str) -> None:
    """Set up structlog once, at start. ``form``: text or json."""
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        renderer = structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=0, sort_keys=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", stderr)),
        cache_logger_on_first_use=True,
    )


class OncePer:
    """Lets a key through once per period, and a bounded number of keys: for logs of what others can cause.

    Whoever is one of many has a table of his own, so that the others are still heard when he has filled it.
    """

    def __init__(self, period_s: float, keys: int = 1_024) -> None:
        self._period_s = period_s
        self._keys = keys
        self._until: dict[object, float] = {}
        self._full_until = 0.0

    @property
    def full(self) -> bool:
        """No other key is let through for a while."""
        return len(self._until) >= self._keys

    def __call__(self, key: object, now: float) -> bool:
        """Tell whether this key may speak now."""
        if now < self._full_until or self._until.get(key, 0.0) > now:
            return False
        if self.full:
            self._until = {k: t for k, t in self._until.items() if t > now}
            if self.full:
                # A look through all keys for each that is turned away would cost more than the words.
                self._full_until = min(self._until.values())
                return False
        self._until[key] = now + self._period_s
        return True
