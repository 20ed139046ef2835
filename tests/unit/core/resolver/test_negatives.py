"""The negative cache: expiry by reason, and the bound."""

from lazymesh.core.model import Reason, Space
from lazymesh.core.resolver.limits import Limits
from lazymesh.core.resolver.negatives import Negatives
from lazymesh.core.resolver.tracked import Tracked
from tests.support.playbook import B1, B2, B3

LIMITS = Limits(negatives=2)


def absent(*addresses: bytes) -> list[Tracked]:
    """Return addresses to be made absent."""
    return [Tracked(address, ()) for address in addresses]


def test_each_reason_has_its_own_lifetime() -> None:
    """A later negative may expire before an earlier one."""
    negatives = Negatives(LIMITS)
    lasting, brief = absent(B1, B2)
    negatives.add(lasting, Reason.NOT_FOUND, 0.0)
    negatives.add(brief, Reason.CLUSTER_DOWN, 5.0)
    gone = []
    for tracked in negatives.expired(6.0):
        negatives.remove(tracked)
        gone.append(tracked)
    assert gone == [brief]
    assert negatives.counts() == {Reason.NOT_FOUND: 1}


def test_beyond_the_bound_the_one_that_would_expire_first_goes() -> None:
    """The least is lost by forgetting it."""
    negatives = Negatives(LIMITS)
    first, second, third = absent(B1, B2, B3)
    negatives.add(first, Reason.NOT_FOUND, 0.0)
    negatives.add(second, Reason.NO_CLUSTER, 1.0)
    assert negatives.overflow() is None
    negatives.add(third, Reason.NOT_FOUND, 2.0)
    assert negatives.overflow() is second
    assert len(negatives) == 3


def test_every_reason_has_a_lifetime() -> None:
    """A reason without one would end the agent at its first use."""
    assert set(LIMITS.negative_ttl) == set(Reason)


def test_watches_of_absent_addresses_are_rationed() -> None:
    """A network scan gets short memories; what is watched already, or absent for another reason, costs nothing."""
    limits = Limits(negative_watch_rate=1.0, negative_watch_burst=2.0, unwatched_ttl=0.5)
    negatives = Negatives(limits)
    scanned = [Tracked(bytes((10, 2, 9, n)), ()) for n in range(4)]
    for tracked in scanned:
        negatives.add(tracked, Reason.NOT_FOUND, 0.0)
    assert [tracked.fleeting for tracked in scanned] == [False, False, False, True]
    watched, forged = Tracked(B1, (), watched=(Space.PUSHED,)), Tracked(B2, ())
    negatives.add(watched, Reason.NOT_FOUND, 0.0)
    negatives.add(forged, Reason.FORGED, 0.0)
    assert not watched.fleeting
    assert not forged.fleeting
    assert next(iter(negatives.expired(0.5))) is scanned[3]
    negatives.remove(scanned[3])
    negatives.add(scanned[3], Reason.NOT_FOUND, 1.0)
    assert not scanned[3].fleeting, "a second later one more is allowed"
    assert negatives.counts() == {Reason.NOT_FOUND: 5, Reason.FORGED: 1}


def test_refused_record_that_is_watched_is_refused_until_it_changes() -> None:
    """A miss in time renews it; what was not found, or is not watched, is read again when its time is up."""
    negatives = Negatives(Limits())
    forged, unwatched, missing = absent(B1, B2, B3)
    forged.watched = missing.watched = (Space.PUSHED,)
    for tracked, reason in ((forged, Reason.FORGED), (unwatched, Reason.FORGED), (missing, Reason.NOT_FOUND)):
        negatives.add(tracked, reason, 0.0)
    for tracked in (forged, unwatched, missing):
        negatives.renew(tracked, 20.0)
    assert forged.expires == 20.0 + Limits().negative_ttl[Reason.FORGED]
    gone = []
    for tracked in negatives.expired(70.0):
        negatives.remove(tracked)
        gone.append(tracked)
    assert set(map(id, gone)) == {id(unwatched), id(missing)}
