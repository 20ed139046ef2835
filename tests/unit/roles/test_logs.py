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
    assert once.full
    assert once("c", 61)
    assert not once.full


def test_being_turned_away_costs_next_to_nothing() -> None:
    """A hundred thousand of them must not keep anybody else waiting."""
    once = OncePer(600, keys=1_000)
    assert sum(once(number, number / 1e6) for number in range(1_000)) == 1_000
    looked_at = once._until
    assert not any(once(number, 1.0) for number in range(1_000, 50_000))
    assert once._until.keys() == looked_at.keys()
    seen = id(once._until)
    assert not once("another", 2.0)
    assert id(once._until) == seen, "nobody has looked through all of them again"
