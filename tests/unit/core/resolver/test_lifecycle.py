"""The resolver's conversations about whole clusters: ready, silent, replaced, gone, and their breakers."""

import pytest

from lazymesh.core.events import (
    ClusterGone,
    ClusterReady,
    ClusterSilent,
    Command,
    Read,
    StoreReset,
    TableChanged,
)
from lazymesh.core.model import Reason
from lazymesh.core.resolver.limits import Limits
from tests.support.playbook import (
    B1,
    B2,
    B3,
    C1,
    CACHE,
    DATABASE,
    DIRECT,
    Play,
    answered,
    cache_answered,
    deleted,
    entry,
    evict,
    failed,
    info,
    install,
    mesh,
    miss,
    put,
    read,
    record,
    report,
    stands,
    unwatch,
    watch,
)


def play(**kwargs: object) -> Play:
    """Return a play in which both clusters are ready."""
    return Play(**kwargs) >> ClusterReady("b") >> ClusterReady("c")  # type: ignore[arg-type]


def installed(**kwargs: object) -> Play:
    """Return a play in which B1 was read at revision 10 and installed."""
    story = play(**kwargs) >> miss(B1) << read(B1) >> answered(10, {B1: record(B1)})
    return story << install(B1) << watch(B1, 10) >> stands(B1) << report(B1, "installed", missed_at=0.0)


# --- 2: not ready yet ---------------------------------------------------------------------------------------------


def test_addresses_of_a_cluster_that_is_not_ready_wait_for_it() -> None:
    """They are read together once it can be judged."""
    (Play() >> miss(B1) >> miss(B2) >> ClusterReady("b") << read(B1, B2)).end()


def test_addresses_that_wait_in_vain_are_answered_when_the_cluster_is_silent() -> None:
    """And so are those whose read is in flight; a late answer is still used."""
    (
        play()
        >> miss(B1, at=1.0)
        << read(B1)
        >> ClusterSilent("b")
        << report(B1, "absent", Reason.CLUSTER_DOWN, missed_at=1.0)
        >> miss(B2, at=2.0)
        << report(B2, "absent", Reason.CLUSTER_DOWN, missed_at=2.0)
        >> answered(10, {B1: record(B1)})
        << install(B1)
        << watch(B1, 10)
    ).end()


def test_a_cluster_that_is_down_is_tried_again_soon() -> None:
    """The negative answer is short, and the cluster's return cancels it at once."""
    story = (
        play() >> ClusterSilent("b") >> miss(B1) << report(B1, "absent", Reason.CLUSTER_DOWN, missed_at=0.0)
    )
    (
        story
        >> ClusterReady("b")
        << read(B1)
        >> answered(10, {B1: record(B1)})
        << install(B1)
        << watch(B1, 10)
    ).end()


def test_repeated_readiness_changes_nothing() -> None:
    """A reconnect without silence between lost nothing."""
    (installed() >> ClusterReady("b")).end()


# --- 11: silence and reset ----------------------------------------------------------------------------------------


def test_entries_outlive_silence_and_are_read_again_after_it() -> None:
    """The same answer changes nothing, and the watch that resumes by itself is not asked for again."""
    (
        installed() >> ClusterSilent("b") >> ClusterReady("b") << read(B1) >> answered(20, {B1: record(B1)})
    ).end()


def test_what_changed_during_silence_is_found_by_the_second_reading() -> None:
    """Whether the watch or the read brings it first."""
    story = installed() >> ClusterSilent("b") >> ClusterReady("b") << read(B1)
    (
        story >> answered(20, {B1: None}) << evict(B1, "deleted") << report(B1, "evicted", Reason.NOT_FOUND)
    ).end()


def test_entries_of_a_cluster_silent_for_too_long_expire() -> None:
    """Its addresses may be other pods' by now."""
    story = (installed() >> ClusterSilent("b")).later(599.9)
    story >> ClusterSilent("b")  # said again: the clock does not start again
    story = story.later(0.2) << evict(B1, "expired") << report(B1, "evicted", detail="expired")
    (story << unwatch(B1)).end()


def test_an_entry_verified_after_silence_starts_its_time_over() -> None:
    """Doubt ends with an answer."""
    story = (installed() >> ClusterSilent("b")).later(400)
    story = story >> ClusterReady("b") << read(B1) >> answered(20, {B1: record(B1)}) >> ClusterSilent("b")
    story.later(599).end()


def test_known_addresses_of_a_cluster_that_is_back_are_read_after_a_random_pause() -> None:
    """All nodes of a mesh notice at the same moment. Misses do not wait for it; entries count as stale until then."""
    story = installed(spread=2.0) >> ClusterSilent("b") >> ClusterReady("b") >> miss(B2) << read(B2)
    assert story.resolver.stale == {"b": 1}
    assert story.resolver.stale_addresses() == [B1]
    story = story.later(1.9).later(0.2) << read(B1) >> answered(20, {B1: record(B1)})
    story.end()
    assert story.resolver.stale == {}


def test_an_entry_in_doubt_is_read_again_until_it_is_verified() -> None:
    """A failed re-read costs a pause, not the entry."""
    story = installed() >> ClusterSilent("b") >> ClusterReady("b") << read(B1) >> failed(B1, kind="timeout")
    story = story.later(0.9).later(0.1) << read(B1) >> answered(20, {B1: record(B1)})
    story.end()
    assert story.resolver.stale == {}


def test_an_entry_that_can_never_be_verified_expires_though_its_cluster_is_ready() -> None:
    """For example because our certificate lost the right to read it."""
    story = installed() >> ClusterSilent("b") >> ClusterReady("b") << read(B1)
    for _ in range(599):
        story = (story >> failed(B1, kind="permission")).later(1) << read(B1)
    story = story.later(1) << evict(B1, "expired") << report(B1, "evicted", detail="expired") << unwatch(B1)
    story.end()


def test_a_reset_store_is_read_again_with_new_watches_and_without_old_revisions() -> None:
    """The new store counts from one; entries serve meanwhile."""
    (
        installed()
        >> StoreReset("b")
        << unwatch(B1)
        << read(B1)
        >> answered(3, {B1: record(B1, DATABASE)})
        << install(B1, entry(DATABASE))
        << watch(B1, 3)
        >> stands(B1)
        << report(B1, "updated")
        >> deleted(B1, 4)
        << read(B1)
        >> answered(4, {B1: None})
        << evict(B1, "deleted")
        << report(B1, "evicted", Reason.NOT_FOUND)
    ).end()


def test_an_entry_that_could_not_be_read_after_a_reset_is_read_again() -> None:
    """It is in doubt, and nothing watches it until an answer comes."""
    story = installed() >> StoreReset("b") << unwatch(B1) << read(B1) >> failed(B1, kind="timeout")
    assert story.resolver.stale_addresses() == [B1]
    (story.later(1) << read(B1) >> answered(3, {B1: record(B1)}) << watch(B1, 3)).end()


def test_a_reset_during_silence_waits_for_the_new_store_to_be_filled() -> None:
    """An apiserver that restarts begins with an empty store: "not found" would evict the living."""
    (
        installed()
        >> ClusterSilent("b")
        >> StoreReset("b")
        << unwatch(B1)
        >> ClusterReady("b")
        << read(B1)
        >> answered(3, {B1: record(B1)})
        << watch(B1, 3)
    ).end()


def test_an_answer_of_the_old_store_is_void_after_a_reset() -> None:
    """Its revision would outrank everything that the new store says for years; the address is read again."""
    (
        play()
        >> miss(B1, at=1.0)
        << read(B1)
        >> StoreReset("b")
        >> answered(99999, {B1: record(B1, DATABASE)})
        << read(B1)
        >> answered(3, {B1: record(B1)})
        << install(B1)
        << watch(B1, 3)
        >> stands(B1)
        << report(B1, "installed", missed_at=1.0)
    ).end()


def test_a_change_of_the_old_store_is_ignored_after_a_reset() -> None:
    """No watch of it is left."""
    story = installed() >> StoreReset("b") << unwatch(B1) << read(B1) >> put(B1, 99999, record(B1, DATABASE))
    (story >> answered(3, {B1: record(B1)}) << watch(B1, 3)).end()


def test_negative_answers_are_read_again_after_a_reset() -> None:
    """Otherwise the publication that cancels them would go unnoticed."""
    (
        play()
        >> miss(B1)
        << read(B1)
        >> answered(10, {B1: None})
        << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0)
        << watch(B1, 10)
        >> StoreReset("b")
        << unwatch(B1)
        << read(B1)
        >> answered(3, {B1: None})
        << watch(B1, 3)
        >> put(B1, 4)
        << install(B1)
    ).end()


def test_an_address_that_a_reset_pushes_out_of_what_is_remembered_is_unwatched_once() -> None:
    """A deleted record is no longer expected to have moved, and there is room for only one absence."""
    (
        installed(limits=Limits(negatives=1))
        >> miss(B2)
        << read(B2)
        >> answered(10, {B2: None})
        << report(B2, "absent", Reason.NOT_FOUND, missed_at=0.0)
        << watch(B2, 10)
        >> deleted(B1, 11)
        << read(B1)
        >> StoreReset("b")
        << evict(B1, "deleted")
        << report(B1, "evicted", Reason.NOT_FOUND)
        << unwatch(B2)
        << unwatch(B1)
    ).end()


def test_an_address_that_a_reset_refuses_and_forgets_at_once_is_unwatched_once() -> None:
    """It would be the first to expire, so with no room left it is the one to go."""
    negative_ttl = {**Limits().negative_ttl, Reason.NOT_FOUND: 1.0}
    (
        installed(limits=Limits(negatives=1, negative_ttl=negative_ttl))
        >> miss(B2)
        << read(B2)
        >> answered(10, {B2: record(B2, 9)})
        << report(B2, "absent", Reason.FORGED, detail="identity 9 is reserved", missed_at=0.0)
        << watch(B2, 10)
        >> deleted(B1, 11)
        << read(B1)
        >> StoreReset("b")
        << evict(B1, "deleted")
        << report(B1, "evicted", Reason.NOT_FOUND)
        << unwatch(B1)
        << unwatch(B2)
        << read(B2)
    ).end()


def test_a_read_in_flight_is_joined_by_the_reading_after_silence() -> None:
    """Single flight holds for re-reads, too."""
    (
        installed()
        >> ClusterSilent("b")
        >> ClusterReady("b")
        << read(B1)
        >> ClusterSilent("b")
        >> ClusterReady("b")
    ).end()


def test_after_silence_the_owner_is_asked_again_and_not_the_cache_that_lacked_the_record() -> None:
    """A cache that lags would bring back what the owner has long replaced."""
    table = mesh([info("b", CACHE, DIRECT)], [("b", "10.2.0.0/16")])
    story = Play(table=table) >> ClusterReady("b") >> miss(B1) << read(B1, spaces=CACHE)
    story = story >> cache_answered(10, {B1: None}) << watch(B1, 10, *CACHE) << read(B1)
    story = story >> answered(500, {B1: record(B1)}) << install(B1) << watch(B1, 500)
    story = story >> stands(B1) << report(B1, "installed", missed_at=0.0)
    (story >> ClusterSilent("b") >> ClusterReady("b") << read(B1) >> answered(501, {B1: record(B1)})).end()


def test_many_entries_are_read_again_in_full_batches() -> None:
    """64 addresses of two keys each to a transaction, unless they are neighbours."""
    story = play()
    addresses = [bytes([10, 2, n, 1]) for n in range(200)]
    story.tell(ClusterSilent("b"))
    for address in addresses:
        story.tell(miss(address))
    said = story.tell(ClusterReady("b"))
    assert [len(c.addresses) for c in said if isinstance(c, Read)] == [64, 64, 64, 8]


# --- cluster gone -------------------------------------------------------------------------------------------------


def test_a_cluster_that_leaves_takes_its_entries_along() -> None:
    """Misses that wait for it are answered; nothing of it is remembered."""
    story = (
        installed()
        >> miss(B2, at=1.0)
        << read(B2)
        >> ClusterGone("b")
        << evict(B1, "cluster-gone")
        << report(B1, "evicted", detail="cluster-gone")
        << unwatch(B1)
        << report(B2, "absent", Reason.NO_CLUSTER, missed_at=1.0)
        >> answered(10, {B2: record(B2)})
    )
    story.end()
    assert story.resolver.describe(B1) is None
    assert story.resolver.describe(B2) is None


def test_a_cluster_that_returns_under_its_name_is_not_given_the_answers_of_the_old_one() -> None:
    """The read in flight is waited for, thrown away and done again: never two at a time."""
    (
        play()
        >> miss(B1, at=1.0)
        << read(B1)
        >> ClusterGone("b")
        << report(B1, "absent", Reason.NO_CLUSTER, missed_at=1.0)
        >> ClusterReady("b")
        >> miss(B1, at=2.0)
        >> answered(99999, {B1: record(B1, DATABASE)})
        << read(B1)
        >> answered(3, {B1: record(B1)})
        << install(B1)
        << watch(B1, 3)
    ).end()


def test_a_cluster_that_left_owns_nothing_any_more() -> None:
    """Its former addresses have no owner."""
    story = play() >> ClusterGone("b") >> TableChanged(mesh(networks=[("c", "10.3.0.0/16")]))
    (story >> miss(B1) << report(B1, "absent", Reason.NO_CLUSTER, missed_at=0.0, cluster=None)).end()
    assert "b" not in story.resolver.clusters


# --- 14: breakers -------------------------------------------------------------------------------------------------

FRAIL = Limits(breaker_failures=2, transactions_in_flight=1)


def broken() -> Play:
    """Return a play in which cluster b's breaker opened at time 0 and B3 was waiting behind the failing reads."""
    return (
        play(limits=FRAIL)
        >> miss(B1)
        << read(B1)
        >> failed(B1)
        << report(B1, "failed", Reason.READ_FAILED, missed_at=0.0, detail="unavailable")
        >> miss(B2)
        << read(B2)
        >> miss(B3)
        >> failed(B2)
        << report(B2, "failed", Reason.READ_FAILED, missed_at=0.0, detail="unavailable")
        << report(B3, "absent", Reason.CLUSTER_DOWN, missed_at=0.0)
    )


def test_failures_in_a_row_open_the_breaker_and_empty_the_queue() -> None:
    """No miss waits behind a store that does not answer, and the other clusters notice nothing."""
    story = broken() >> miss(C1) << read(C1, cluster="c")
    story.end()
    assert story.resolver.clusters["b"].breaker == "open"
    assert story.resolver.clusters["c"].breaker == "closed"


def test_a_lone_new_address_is_answered_at_once_while_the_breaker_is_open() -> None:
    """It would be read at once otherwise: nothing else waits, and no read is under way."""
    story = play(limits=FRAIL)
    for address in (B1, B2):
        story.tell(miss(address))
        story.tell(failed(address))
    (story >> miss(B3) << report(B3, "absent", Reason.CLUSTER_DOWN, missed_at=0.0)).end()


def test_one_read_tries_the_store_after_the_pause() -> None:
    """Misses beside it are answered as long as it is out; its success lets all of them through."""
    story = broken().later(1.0)
    (
        story
        >> miss(B1, at=1.0)
        << read(B1)
        >> miss(B2, at=1.0)
        << report(B2, "absent", Reason.CLUSTER_DOWN, missed_at=1.0)
        >> answered(10, {B1: record(B1)})
        << install(B1)
        << watch(B1, 10)
    ).end()
    assert story.resolver.clusters["b"].breaker == "closed"


def test_an_entry_to_be_verified_is_a_try_as_good_as_a_miss() -> None:
    """So a breaker heals without traffic."""
    story = installed(limits=FRAIL) >> ClusterSilent("b") >> ClusterReady("b") << read(B1) >> failed(B1)
    story = story.later(1) << read(B1) >> failed(B1)
    story = story.later(0.5).later(0.5) << read(B1) >> answered(20, {B1: record(B1)})
    story.end()
    assert story.resolver.clusters["b"].breaker == "closed"


@pytest.mark.parametrize("kind", ["unavailable", "timeout", "certificate", "protocol", "permission", "owner"])
def test_every_failure_but_that_of_a_healthy_store_opens_the_breaker(kind: str) -> None:
    """Asking it less would not help: it refuses, or it is a cache, and the owner's own store is not followed."""
    story = play(limits=FRAIL)
    said: list[Command] = []
    for address in (B1, B2):
        story.tell(miss(address))
        said += story.tell(failed(address, kind=kind))
    assert said == [report(a, "failed", Reason.READ_FAILED, missed_at=0.0, detail=kind) for a in (B1, B2)]
    assert story.resolver.clusters["b"].breaker == ("closed" if kind in ("permission", "owner") else "open")
