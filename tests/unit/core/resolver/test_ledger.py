"""The books over our entries: use, doubt, identities."""

from lazymesh.core.resolver.ledger import Ledger
from lazymesh.core.resolver.limits import Limits
from lazymesh.core.resolver.tracked import Tracked
from tests.support.playbook import B1, B2, B3, DATABASE, WEB, entry

LIMITS = Limits(owned=2, stale_after=600.0)


def owned(ledger: Ledger, *addresses: bytes) -> list[Tracked]:
    """Return addresses whose entries are ours, least recently used first."""
    entries = [Tracked(address, ("b",)) for address in addresses]
    for tracked in entries:
        ledger.own([tracked], entry())
    return entries


def test_the_least_recently_used_entry_is_the_oldest() -> None:
    """Owning again and touching are use."""
    ledger = Ledger(LIMITS)
    first, second = owned(ledger, B1, B2)
    assert (ledger.oldest(), ledger.room) == (first, 0)
    ledger.touch(first)
    assert ledger.oldest() is second
    ledger.own([second], entry(DATABASE))
    assert ledger.oldest() is first
    ledger.disown(first)
    assert (list(ledger), ledger.room) == ([second], 1)


def test_doubt_counts_from_its_beginning() -> None:
    """Doubting twice does not start the clock again; trust does."""
    ledger = Ledger(LIMITS)
    first, second, third = owned(ledger, B1, B2, B3)
    for tracked in (first, second, third):
        ledger.doubt([tracked], 0.0)
    ledger.doubt([first], 500.0)
    ledger.trust(second)
    ledger.doubt([second], 500.0)
    stale = []
    for tracked in ledger.stale(600.0):
        ledger.disown(tracked)
        stale.append(tracked)
    assert stale == [first, third]
    assert ledger.doubts(second)


def test_an_address_is_found_by_the_identity_it_depends_on_now() -> None:
    """And by no earlier one."""
    ledger = Ledger(LIMITS)
    first, second = owned(ledger, B1, B2)
    ledger.name(first, WEB)
    ledger.name(second, WEB)
    assert ledger.named(WEB) == [first, second]
    ledger.name(first, DATABASE)
    ledger.name(second, 0)
    assert ledger.named(WEB) == []
    assert ledger.named(DATABASE) == [first]
