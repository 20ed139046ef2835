"""Which capabilities are needed where; that they are enough, and each is needed, is tested in the ship tier."""

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
        ({"NET_ADMIN", "SYS_ADMIN"}, Circumstances(NEW, False), []),
        ({"SYS_ADMIN"}, Circumstances(NEW, False), ["NET_ADMIN"]),
        (set(), Circumstances(NEW, False), ["NET_ADMIN", "SYS_ADMIN"]),
        ({"NET_ADMIN", "SYS_ADMIN"}, Circumstances(OLD, False), ["SYS_RESOURCE"]),
        ({"NET_ADMIN", "SYS_ADMIN"}, Circumstances(OLD, True), []),
    ],
)
def test_what_is_missing(held: set[str], where: Circumstances, lacking: list[str]) -> None:
    """More on old kernels."""
    assert missing(frozenset(held), where) == lacking


def test_held_ones_are_read_from_the_kernels_bits(tmp_path: Path) -> None:
    """The effective ones: what may be raised is not in force."""
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000201000\n")
    assert held_here(status) == {"NET_ADMIN", "SYS_ADMIN"}
