"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the check."""

    name: str
    verdict: str
    """``ok``, ``warn`` or ``fail``."""
    text: str
    """What was found, and for warn and fail what to do."""
