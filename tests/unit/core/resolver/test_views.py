"""What people may see of the resolver."""

from lazymesh.core.events import ClusterReady, ClusterSilent
from lazymesh.core.model import Reason, Space
from lazymesh.core.resolver.views import AddressView, ClusterView
from tests.support.playbook import (
    B1,
    B2,
    B3,
    C1,
    DIRECT,
    STRANGER,
    Play,
    answered,
    entry,
    miss,
    record,
    stands,
)


def story() -> Play:
    """Return a play with one address in each state."""
    play = Play()
    for event in (
        ClusterReady("b"),
        miss(B1),
        answered(10, {B1: record(B1)}),
        stands(B1),
        miss(B2),
        answered(11, {B2: None}),
        miss(B3),
        miss(C1),
        miss(STRANGER),
    ):
        play.tell(event)
    return play


def test_addresses_are_counted_by_state_and_reason() -> None:
    """What metrics need, without a walk over all addresses."""
    resolver = story().resolver
    assert resolver.counts == {"resolving": 2, "installed": 1, "absent": 2}
    assert resolver.absent == {Reason.NOT_FOUND: 1, Reason.NO_CLUSTER: 1}
    assert (resolver.owned, resolver.queued, resolver.muted) == (1, 1, False)


def test_each_cluster_is_shown_with_its_window_and_breaker() -> None:
    """One line of the status screen."""
    resolver = story().resolver
    assert resolver.clusters == {
        "b": ClusterView(state="ready", breaker="closed", in_flight=1, queued=0, addresses=3),
        "c": ClusterView(state="connecting", breaker="closed", in_flight=0, queued=1, addresses=1),
    }


def test_an_installed_address_is_described() -> None:
    """Entry, keys and watches; verified until its cluster is silent."""
    play = story()
    view = play.resolver.describe(B1)
    assert view == AddressView(
        state="installed",
        owners=("b",),
        cluster="b",
        reason=None,
        expires=None,
        entry=entry(),
        verified=True,
        reading=False,
        known=((Space.PUSHED, True, 10), (Space.PULL_ONLY, False, 10)),
        watched=DIRECT,
    )
    play.tell(ClusterSilent("b"))
    assert not play.resolver.describe(B1).verified


def test_absent_waiting_and_unknown_addresses_are_described() -> None:
    """Why, until when, or nothing at all."""
    resolver = story().resolver
    absent, reading = resolver.describe(B2), resolver.describe(B3)
    assert (absent.state, absent.reason, absent.expires, absent.entry) == (
        "absent",
        Reason.NOT_FOUND,
        30.0,
        None,
    )
    assert (reading.state, reading.reading, reading.reason) == ("resolving", True, None)
    assert resolver.describe(bytes(4)) is None
