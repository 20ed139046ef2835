"""Logs that do not flood."""

from __future__ import annotations

from lazymesh.roles.logs import OncePer


def test_key_speaks_once_in_its_period() -> None:
    """Each key for itself."""
    once = OncePer(60)
    assert [once("a", 0), once("a", 1), once("b", 1), once("a", 59), once("a", 60)] == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_memory_is_bounded_and_recovers() -> None:
    """A flood of new keys is silenced; once old ones are over, new ones speak."""
    once = OncePer(60, keys=2)
    assert [once(key, 0) for key in "abc"] == [True, True, False]
    assert once("c", 61)
