"""Structured logs on stderr, for people (text) or for machines (one JSON object per line)."""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from typing import TYPE_CHECKING, cast

import structlog

if TYPE_CHECKING:
    from typing import TextIO


class LogSink:
    """A file descriptor for lines that may be lost: a full disk or a reader that hangs must not stop the agent.

    It has no buffer, since what is left in one would fail again when the process exits.
    """

    def __init__(self, fd: int) -> None:
        self.lost = 0
        """Lines that could not be written, or not completely."""
        self._fd = fd
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)
        self._lock = threading.Lock()
        """poll(2) of one object by two threads is an error to Python."""

    def write(self, text: str) -> None:
        """Write a line, or count it as lost."""
        data = text.encode(errors="backslashreplace")
        try:
            with self._lock:
                while data:
                    # A pipe that is ready takes this much at once; one that is not is full, and a write would block.
                    if not self._room.poll(0):
                        raise BlockingIOError
                    data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        except OSError:
            self.lost += 1

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


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
    """Lets a key through once per period, and a bounded number of keys: for log lines that others can cause.

    Give each of several sources an instance of its own, so that one that fills its table does not silence the others.
    """

    def __init__(self, period_s: float, keys: int = 1_024) -> None:
        self._period_s = period_s
        self._keys = keys
        self._until: dict[object, float] = {}
        self._full_until = 0.0

    @property
    def full(self) -> bool:
        """Whether other keys are refused for a while."""
        return len(self._until) >= self._keys

    def __call__(self, key: object, now: float) -> bool:
        """Return whether this key may be logged now."""
        if now < self._full_until or self._until.get(key, 0.0) > now:
            return False
        if self.full:
            self._until = {k: t for k, t in self._until.items() if t > now}
            if self.full:
                # Looking through all keys for each one refused would cost more than the log lines.
                self._full_until = min(self._until.values())
                return False
        self._until[key] = now + self._period_s
        return True
