"""Removes everything of lazymesh from a node: entries, programs, pins. The agent must have been stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.datapath.cilium import NodeView, take_out_ours
from lazymesh.datapath.hooks import detach_everywhere
from lazymesh.datapath.interfaces import InterfaceSelection
from lazymesh.datapath.pins import Pins, alone, check_bpffs
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed."""

    entries: int
    """Our entries in Cilium's ipcaches; those in a map of our own went with it."""
    interfaces: tuple[str, ...]
    """Those that carried our programs."""
    pins: bool
    """Whether maps and programs were pinned."""


async def uninstall(bpffs: Path) -> Removed:
    """Remove everything; DatapathError while an agent runs, or without root."""
    if os.geteuid() != 0:
        raise DatapathError("lazymesh uninstall needs root: it detaches BPF programs")
    check_bpffs(bpffs)
    pins = Pins.under(bpffs)
    there = pins.directory.is_dir()
    with alone(*([pins.directory] if there else ())):
        # Programs first: once they are detached, no packet is held that nothing would resolve.
        interfaces = await detach_everywhere(pins)
        entries = await take_out_everywhere(bpffs)
        pins.remove()
    return Removed(entries, tuple(interfaces), there)


async def take_out_everywhere(bpffs: Path) -> int:
    """Delete our entries from all of Cilium's ipcaches; return how many there were."""
    # While a Cilium agent starts, programs read maps that are no longer pinned, and these have entries of ours, too.
    async with NodeView(InterfaceSelection(("+",))) as node:
        return take_out_ours(bpffs, await node.ipcaches())
