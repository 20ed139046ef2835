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
    """Lets a key through once per period, and remembers a bounded number of keys: for logs on the miss path."""

    def __init__(self, period_s: float, keys: int = 4_096) -> None:
        self._period_s = period_s
        self._keys = keys
        self._until: dict[object, float] = {}

    def __call__(self, key: object, now: float) -> bool:
        """Tell whether this key may speak now."""
        if self._until.get(key, 0.0) > now:
            return False
        if len(self._until) >= self._keys:
            self._until = {k: t for k, t in self._until.items() if t > now}
            if len(self._until) >= self._keys:
                return False
        self._until[key] = now + self._period_s
        return True
