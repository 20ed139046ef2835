"""Which capabilities are needed where; that they are enough, and each of them needed, is told by the ship tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.capabilities import Circumstances, held_here, missing

if TYPE_CHECKING:
    from pathlib import Path

NEW, OLD = (6, 18), (5, 10)


@pytest.mark.parametrize(
    ("held", "where", "lacking"),
    [
        ({"BPF", "NET_ADMIN", "PERFMON"}, Circumstances(False, NEW, False), []),
        ({"NET_ADMIN", "SYS_ADMIN"}, Circumstances(False, NEW, False), []),
        ({"BPF"}, Circumstances(False, NEW, False), ["NET_ADMIN", "PERFMON"]),
        (set(), Circumstances(False, NEW, False), ["BPF", "NET_ADMIN", "PERFMON"]),
        ({"BPF", "NET_ADMIN", "PERFMON"}, Circumstances(True, NEW, False), ["SYS_ADMIN"]),
        ({"NET_ADMIN", "SYS_ADMIN"}, Circumstances(True, NEW, False), []),
        ({"BPF", "NET_ADMIN", "PERFMON"}, Circumstances(False, OLD, False), ["SYS_RESOURCE"]),
        ({"BPF", "NET_ADMIN", "PERFMON"}, Circumstances(False, OLD, True), []),
    ],
)
def test_what_is_missing(held: set[str], where: Circumstances, lacking: list[str]) -> None:
    """Beside Cilium more than alone, and more on old kernels."""
    assert missing(frozenset(held), where) == lacking


def test_held_ones_are_read_from_the_kernels_bits(tmp_path: Path) -> None:
    """The effective ones: what may be raised is not in force."""
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t000000c000001000\n")
    assert held_here(status) == {"BPF", "NET_ADMIN", "PERFMON"}
