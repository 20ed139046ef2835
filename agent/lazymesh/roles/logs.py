"""Structured logs on stderr, for people (text) or for machines (one JSON object a line)."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging(form: str, level: str) -> None:
    """Set up structlog once, at start. ``form``: text or json."""
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, sort_keys=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
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
