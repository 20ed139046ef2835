"""The queue: batches, fairness, shedding and muting, seen through the resolver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.events import (
    Admit,
    ClusterReady,
    ClusterSilent,
    Command,
    Misses,
    Mute,
    Read,
    ReadFailed,
    Tick,
)
from lazymesh.core.model import Reason
from lazymesh.core.resolver.limits import Limits
from tests.support.playbook import (
    B1,
    B2,
    B3,
    B4,
    B5,
    B6,
    B7,
    B8,
    C1,
    C2,
    Play,
    answered,
    cache_answered,
    info,
    install,
    mesh,
    miss,
    read,
    record,
    report,
    watch,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MUTED: list[Command] = [Mute(True), Admit(0.5)]
MANY = [bytes([10, 2, n % 100, n // 100]) for n in range(300)]
NEIGHBOURS = [bytes([10, 2, 1 + n // 256, n % 256]) for n in range(300)]


def reads(commands: list[Command]) -> list[Read]:
    """Return the reads among the commands."""
    return [command for command in commands if isinstance(command, Read)]


def play(**kwargs: object) -> Play:
    """Return a play in which both clusters are ready."""
    return Play(**kwargs) >> ClusterReady("b") >> ClusterReady("c")  # type: ignore[arg-type]


# --- 4: batches ---------------------------------------------------------------------------------------------------


def test_lone_misses_go_out_at_once_until_the_window_is_full() -> None:
    """Nothing waits for company; what comes while eight are in flight goes out together as soon as one is back."""
    story = play()
    for address in MANY[:8]:
        story = story >> miss(address) << read(address)
    for address in MANY[8:11]:
        story = story >> miss(address)
    first = MANY[0]
    (
        story
        >> answered(10, {first: record(first)})
        << install(first)
        << watch(first, 10)
        << read(*MANY[8:11])
    ).end()


def of_one_space() -> Play:
    """Begin where a record is under one key, as behind a cache."""
    return Play(table=mesh([info("b", tuple(info("b").spaces[0][:1]))], [("b", "10.2.0.0/16")]))


def test_a_transaction_never_has_more_keys_than_etcd_takes() -> None:
    """Two keys for each address of the owner's store, one in the cache."""
    direct, cached = Play(), of_one_space()
    for story in (direct, cached):
        for address in MANY:
            story.tell(miss(address))
    assert [len(r.addresses) for r in reads(direct.tell(ClusterReady("b")))] == [64, 64, 64, 64, 44]
    assert [len(r.addresses) for r in reads(cached.tell(ClusterReady("b")))] == [128, 128, 44]


def test_many_neighbours_are_read_whole() -> None:
    """One range brings a /24's records for less than 64 of them cost alone; of another /24 there are too few."""
    story = Play()
    for address in NEIGHBOURS:
        story.tell(miss(address))
    first, second = reads(story.tell(ClusterReady("b")))
    assert (first.addresses, first.whole) == (tuple(NEIGHBOURS[:288]), (256,))
    assert (second.addresses, second.whole) == (tuple(NEIGHBOURS[288:]), ())


@pytest.mark.parametrize("begin", [Play, of_one_space])
def test_two_neighbourhoods_fill_a_transaction(begin: Callable[[], Play]) -> None:
    """More would make its answer too long for those that wait behind it."""
    story = begin()
    for group in range(3):
        story.tell(Misses(tuple([bytes([10, 2, group, n]) for n in range(200)]), (0.0,) * 200))
    sent = reads(story.tell(ClusterReady("b")))
    assert [one.whole for one in sent] == [(200, 200), (200,)]


@given(st.lists(st.integers(1, 256), min_size=1, max_size=5))
def test_no_transaction_has_more_reads_than_etcd_takes(counts: list[int]) -> None:
    """However many miss of each /24, every one is read once."""
    story = Play()
    missed = [bytes([10, 2, group, n]) for group, count in enumerate(counts) for n in range(count)]
    story.tell(Misses(tuple(missed), (0.0,) * len(missed)))
    sent = reads(story.tell(ClusterReady("b")))
    for one in sent:
        assert 2 * (len(one.whole) + len(one.addresses) - sum(one.whole)) <= 128
    assert len(sent) == 8 or sorted(address for one in sent for address in one.addresses) == sorted(missed)


@pytest.mark.parametrize("kind", ["exhausted", "permission"])
def test_neighbours_that_cannot_be_read_whole_are_read_apart_for_a_while(kind: str) -> None:
    """There is too much between them, or the range is forbidden: they are not reported as absent."""

    def missed(group: int) -> list[tuple[int, tuple[int, ...]]]:
        addresses = tuple([bytes([10, 2, group, n]) for n in range(100)])
        return sizes(reads(story.tell(Misses(addresses, (story.now,) * 100))))

    def sizes(said: list[Read]) -> list[tuple[int, tuple[int, ...]]]:
        return [(len(one.addresses), one.whole) for one in said]

    story = play()
    assert missed(1) == [(100, (100,))]
    addresses = tuple([bytes([10, 2, 1, n]) for n in range(100)])
    said = story.tell(ReadFailed("b", addresses, kind, whole=True))
    assert sizes(reads(said)) == [(64, ()), (36, ())]
    assert said == reads(said)
    assert missed(2) == [(64, ()), (36, ())]
    story.now += 60.0
    assert missed(3) == [(100, (100,))]


def test_the_window_bounds_what_is_in_flight_for_each_cluster() -> None:
    """And the other cluster has a window of its own."""
    story = play(limits=Limits(transactions_in_flight=1))
    (story >> miss(B1) << read(B1) >> miss(B2) >> miss(C1) << read(C1, cluster="c") >> miss(C2)).end()
    assert story.resolver.clusters["b"].in_flight == 1


def test_ready_clusters_take_turns() -> None:
    """A cluster with much to read does not send all of it before the others' first."""
    limits = Limits(keys_per_transaction=2, transactions_in_flight=2)
    story = play(limits=limits) >> ClusterSilent("b") >> ClusterSilent("c")
    for address in (B1, B2, C1, C2):
        story.tell(miss(address))
    story.tell(ClusterReady("b"))
    assert story.resolver.clusters["b"].in_flight == 2
    story = play(limits=Limits(keys_per_transaction=2, transactions_in_flight=1))
    for address in (B1, B2, B3, C1, C2):
        story.tell(miss(address))
    assert reads(story.tell(answered(10, {B1: None}))) == [read(B2)]
    assert reads(story.tell(answered(10, {C1: None}, cluster="c"))) == [read(C2, cluster="c")]


def test_verification_gets_its_share_beside_a_storm_of_misses() -> None:
    """A quarter of each transaction at least: old entries must not stay unverified as long as misses come."""
    story = play(limits=Limits(keys_per_transaction=16, transactions_in_flight=1))
    sent = [one for address in MANY[:20] for one in reads(story.tell(miss(address)))]
    while sent:
        sent = reads(story.tell(answered(10, {a: record(a) for a in sent[0].addresses})))
    story.tell(ClusterSilent("b"))
    first = reads(story.tell(ClusterReady("b")))
    for address in MANY[20:40]:
        story.tell(miss(address))
    [second] = reads(story.tell(answered(20, {a: record(a) for a in first[0].addresses})))
    assert len(second.addresses) == 8
    assert sum(address in MANY[20:40] for address in second.addresses) == 6


def test_both_read_groups_of_a_cluster_get_their_turn() -> None:
    """Misses that keep coming for the cache do not starve those that wait for the owner."""
    groups = [(info("b").spaces[0][0],), info("b").spaces[0]]
    table = mesh([info("b", *groups)], [("b", "10.2.0.0/16")])
    limits = Limits(keys_per_transaction=2, transactions_in_flight=1)
    story = Play(limits=limits, table=table)
    for address in (B1, B2, B3, B4, B5):
        story.tell(miss(address))
    assert reads(story.tell(ClusterReady("b"))) == [read(B1, B2, spaces=groups[0])]
    states = cache_answered(10, {B1: None, B2: None})
    turns = reads(story.tell(states))
    turns += reads(
        story.tell(
            cache_answered(10, {B3: None, B4: None})
            if turns[0].spaces == groups[0]
            else answered(9, {B1: None})
        )
    )
    assert {turn.spaces for turn in turns} == set(groups)


# --- 3: shedding and muting ---------------------------------------------------------------------------------------


def full_window(queue: int = 4) -> Play:
    """Return a play in which only b is ready, B1 is being read and nothing more goes out."""
    story = Play(limits=Limits(queue=queue, transactions_in_flight=1)) >> ClusterReady("b")
    return story >> miss(B1) << read(B1)


def test_the_oldest_waiting_address_is_shed_when_the_queue_is_full() -> None:
    """Its packet is the most likely to have given up; the next misses of it are answered for a moment."""
    story = full_window() >> miss(B2) >> miss(B3) >> miss(B4) << MUTED >> miss(B5)
    (
        story
        >> miss(B6, at=1.0)
        << report(B2, "shed", Reason.SHED, missed_at=0.0)
        >> miss(B2, at=1.1)
        << report(B2, "absent", Reason.SHED, missed_at=1.1, cached=True)
    ).end()
    assert story.resolver.queued == 4


def test_the_kernel_is_muted_at_the_high_mark_and_heard_again_at_the_low_one() -> None:
    """Each is said once; half as much as before is admitted afterwards."""
    story = full_window() >> miss(B2) >> miss(B3) >> miss(B4) << MUTED >> miss(B5)
    said = story.tell(answered(10, {B1: None}))
    assert [c for c in said if isinstance(c, Read | Mute)] == [read(B2, B3, B4, B5), Mute(False)]


def test_a_slow_cluster_among_others_mutes_nothing_and_sheds_its_own() -> None:
    """Its addresses fill the queue and are the ones shed; for the other's sake the kernel is still heard."""
    story = full_window(queue=8) >> ClusterReady("c")
    for address in MANY[:8]:
        story = story >> miss(address)
    story = story >> miss(C1) << read(C1, cluster="c") >> miss(C2)
    (story << report(MANY[0], "shed", Reason.SHED, missed_at=0.0)).end()


def test_two_slow_clusters_mute_the_kernel() -> None:
    """If more than one is slow, the agent is the cause."""
    story = full_window() >> ClusterReady("c") >> miss(C1) << read(C1, cluster="c")
    (story >> miss(B2) >> miss(C2) >> miss(B3) << MUTED).end()


def test_a_cluster_that_is_not_ready_mutes_nothing_and_sheds_its_own() -> None:
    """The others' misses must not pay for its start; among those that wait for it the oldest goes."""
    story = Play(limits=Limits(queue=4, transactions_in_flight=1)) >> ClusterReady("c")
    for address in (B1, B2, B3, B4):
        story = story >> miss(address)
    story = story >> miss(C1) << read(C1, cluster="c") >> miss(C2)
    (story << report(B1, "shed", Reason.SHED, missed_at=0.0)).end()


def test_a_cluster_that_falls_silent_leaves_the_queue_to_the_others() -> None:
    """Its waiting addresses are answered, and the kernel is heard again."""
    story = full_window() >> miss(B2) >> miss(B3) >> miss(B4) << MUTED >> ClusterSilent("b")
    story << [report(a, "absent", Reason.CLUSTER_DOWN, missed_at=0.0) for a in (B1, B2, B3, B4)]
    (story << Mute(False)).end()
    assert story.resolver.queued == 0


def test_late_answers_admit_fewer_misses_and_no_answers_more() -> None:
    """Said once a second, while it changes; how late is measured from the packet to its answer."""
    story = play()
    said: list[Command] = []
    for second in range(5):
        missed = MANY[second * 20 : second * 20 + 20]
        sent = [command for address in missed for command in story.tell(miss(address, at=story.now))]
        story.now += 0.5 if second else 0.001
        for command in sent:  # and what follows from the answers
            if isinstance(command, Read):
                sent += story.tell(answered(10, dict.fromkeys(command.addresses)))
        story.now = second + 1.0
        said += story.tell(Tick())
    assert said == [Admit(0.5), Admit(0.25)]
    said = []
    for _ in range(20):
        story.now += 1.0
        said += [c for c in story.tell(Tick()) if isinstance(c, Admit)]
    shares = [c.share for c in said]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_every_shed_miss_is_reported_exactly_once() -> None:
    """Counting the reports is counting the losses."""
    story = Play(limits=Limits(queue=4))
    outcomes = [c.outcome for a in (B1, B2, B3, B4, B5, B6, B7, B8) for c in story.tell(miss(a))]
    assert outcomes == ["shed"] * 4
