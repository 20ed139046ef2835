"""The maps of holding in the agent's words; what the programs make of them is in test_hold_program.py."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import abi, libbpf
from lazymesh.datapath.holdmaps import HoldControl, HoldCounterMap, HoldLimits
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.pins import expected_layouts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    """Return pinned maps without any program."""
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    for name in ("lm_hold_control", "lm_hold_count", "lm_holder_stats", "lm_hold_total"):
        made = Map.create(name, expected_layouts(1)[name])
        libbpf.pin(made.fd, tmp_path / name)
        made.close()
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def words(pins: Path) -> abi.HoldControl:
    """Return struct lm_hold_control as the kernel has it."""
    control = Map.pinned(pins / "lm_hold_control")
    raw = control.lookup(bytes(4)) or b""
    control.close()
    return abi.HoldControl.from_buffer_copy(raw)


def test_limits_and_beats_are_the_kernels_at_once(pins: Path) -> None:
    """The map is this process's memory; a rate becomes a spacing and a depth in time."""
    control = HoldControl(pins)
    control.set_limits(HoldLimits(address_packets=7, interface_rate=1_000, interface_burst=5), 0.25)
    control.beat(123)
    now = words(pins)
    assert (now.address_packets, now.limit_ns, now.agent_beat_ns) == (7, 250_000_000, 123)
    assert (now.interface_interval_ns, now.interface_burst_ns) == (1_000_000, 4_000_000)
    assert control.holder_beat() == 0


def test_a_rate_of_zero_is_no_limit(pins: Path) -> None:
    """The program takes a spacing of zero for that."""
    HoldControl(pins).set_limits(HoldLimits(interface_rate=0), 0.25)
    assert words(pins).interface_interval_ns == 0


def test_a_burst_of_none_is_a_burst_of_one(pins: Path) -> None:
    """And not one without an end, which a depth below zero would be."""
    HoldControl(pins).set_limits(HoldLimits(interface_rate=1_000, interface_burst=0), 0.25)
    assert words(pins).interface_burst_ns == 0


def test_counters_are_summed_over_cpus(pins: Path) -> None:
    """And named as in C."""
    copies = [abi.HoldCounters(held=number + 1, stray=1) for number in range(libbpf.possible_cpus())]
    counts = Map.pinned(pins / "lm_hold_count")
    counts.update(bytes(4), b"".join(map(bytes, copies)))
    counts.close()
    stats = Map.pinned(pins / "lm_holder_stats")
    stats.update(bytes(4), bytes(abi.HolderStats(lost=3)).ljust(ctypes.sizeof(abi.HolderStats)))
    stats.close()
    total = Map.pinned(pins / "lm_hold_total")
    total.update(bytes(4), bytes(abi.Outstanding(packets=2, bytes=3_000)))
    total.close()
    n = libbpf.possible_cpus()
    with contextlib.closing(HoldCounterMap(pins)) as read:
        assert read.outstanding() == (2, 3_000)
        assert (read.kernel()["held"], read.kernel()["stray"]) == (n * (n + 1) // 2, n)
        assert read.holder()["lost"] == 3
