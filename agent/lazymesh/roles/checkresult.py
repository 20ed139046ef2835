"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of ``lazymesh check``."""

    name: str
    verdict: str
    """``ok``, ``warn`` or ``fail``."""
    text: str
    """What was found; for warn and fail also what to do."""
