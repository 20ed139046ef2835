"""What the installer is asked for, from what a test writes down."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from lazymesh.core.events import Install

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazymesh.core.model import Address, Entry


def installs_of(entries: Iterable[tuple[Address, Entry, int]]) -> list[Install]:
    """Return the Installs of addresses, each with its entry and cluster id: neighbours that are alike share one."""
    runs = groupby(entries, lambda each: each[1:])
    return [Install([address for address, *_ in run], *alike) for alike, run in runs]
