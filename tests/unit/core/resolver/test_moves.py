"""The resolver's conversations with the map: results, changes that overtake them, and the budget."""

import pytest

from lazymesh.core.events import (
    ClusterGone,
    ClusterReady,
    ClusterSilent,
    Command,
    IdentityGone,
    Install,
    Lost,
    Misses,
    Read,
    Report,
    Shrink,
    StoreReset,
    Used,
    Watch,
)
from lazymesh.core.model import Reason
from lazymesh.core.resolver.limits import Limits
from lazymesh.core.resolver.machine import Known
from tests.support.playbook import (
    B1,
    B2,
    B3,
    DATABASE,
    DIRECT,
    MAIL,
    WEB,
    Play,
    answered,
    deleted,
    entry,
    evict,
    install,
    miss,
    put,
    read,
    record,
    refused,
    report,
    said_to,
    stands,
    unwatch,
    watch,
)


def sent(**kwargs: object) -> Play:
    """Return a play in which the Install of B1 is sent and not answered."""
    story = Play(**kwargs) >> ClusterReady("b") >> miss(B1) << read(B1)  # type: ignore[arg-type]
    return story >> answered(10, {B1: record(B1)}) << install(B1) << watch(B1, 10)


def installed(**kwargs: object) -> Play:
    """Return a play in which B1 is installed."""
    return sent(**kwargs) >> stands(B1) << report(B1, "installed", missed_at=0.0)


UNKNOWN = 131999
"""An identity of cluster b that nobody has published."""
ERRORS = {Reason.NOT_OURS: "absent", Reason.MAP_FULL: "failed", Reason.INSTALL_FAILED: "failed"}


@pytest.mark.parametrize(("error", "outcome"), ERRORS.items(), ids=[error.value for error in ERRORS])
def test_a_refused_install_makes_the_address_absent(error: Reason, outcome: str) -> None:
    """Nothing is evicted, as we have no entry there; a change of the record tries again."""
    story = sent() >> refused(B1, error) << report(B1, outcome, error, missed_at=0.0)
    assert story.resolver.owned == 0
    (story >> put(B1, 11, record(B1, DATABASE)) << install(B1, entry(DATABASE))).end()


def test_an_entry_of_the_maps_owner_is_as_good_as_ours() -> None:
    """The packet may go, and there is no entry of ours to look after."""
    story = (
        sent()
        >> refused(B1, Reason.TAKEN)
        << report(B1, "installed", detail="by the map's owner", missed_at=0.0)
    )
    (story << unwatch(B1)).end()
    assert story.resolver.owned == 0
    assert story.resolver.describe(B1) is None


def test_what_the_maps_owner_has_taken_over_is_given_up_without_an_eviction() -> None:
    """The entry there now is not ours; a miss would start over."""
    story = installed() >> Lost((B1, B2)) << report(B1, "taken-over") << unwatch(B1)
    assert story.resolver.owned == 0
    (story >> miss(B1, at=1.0) << read(B1)).end()


def test_nothing_is_left_of_an_address_that_is_forgotten() -> None:
    """Pods come and go for months, and identities stay: no untracked address is found by its identity."""
    story = installed() >> miss(B2) << read(B2) >> answered(10, {B2: record(B2, 131_999)})
    story = story << report(B2, "absent", Reason.UNKNOWN_IDENTITY, missed_at=0.0) << watch(B2, 10)
    assert set(story.resolver._ledger._named) == {WEB, 131_999}
    story = story >> ClusterGone("b") << evict(B1, "cluster-gone")
    (story << report(B1, "evicted", detail="cluster-gone") << unwatch(B1) << unwatch(B2)).end()
    assert not story.resolver._ledger._named


def test_an_install_under_way_finds_out_by_itself_that_the_entry_is_lost() -> None:
    """Its result is newer."""
    (sent() >> Lost((B1,)) >> stands(B1) << report(B1, "installed", missed_at=0.0)).end()


def test_crowded_map_is_left_by_what_has_not_been_used_for_longest() -> None:
    """Use that the shell reports counts, too."""
    story = Play() >> ClusterReady("b")
    for address in (B1, B2, B3):
        story = story >> miss(address) << read(address) >> answered(10, {address: record(address)})
        story = story << install(address) << watch(address, 10) >> stands(address)
        story = story << report(address, "installed", missed_at=0.0)
    story = story >> Used((B1, B3)) >> Shrink(2)
    for address in (B2, B1):
        story = (
            story
            << evict(address, "crowded")
            << report(address, "evicted", detail="crowded")
            << unwatch(address)
        )
    (
        story >> Shrink(5) << evict(B3, "crowded") << report(B3, "evicted", detail="crowded") << unwatch(B3)
    ).end()


def test_a_refused_update_evicts_the_previous_entry() -> None:
    """The old identity is known to be wrong: none is better."""
    (
        installed()
        >> put(B1, 11, record(B1, DATABASE))
        << install(B1, entry(DATABASE))
        >> refused(B1, Reason.INSTALL_FAILED)
        << evict(B1, "install-failed")
        << report(B1, "evicted", Reason.INSTALL_FAILED)
    ).end()


def test_changes_during_an_install_converge_to_the_newest_on_its_result() -> None:
    """One Install at a time for an address; what was overtaken in between is never written."""
    (
        sent()
        >> put(B1, 11, record(B1, DATABASE))
        >> put(B1, 12, record(B1, MAIL))
        >> stands(B1)
        << report(B1, "installed", missed_at=0.0)
        << install(B1, entry(MAIL))
        >> stands(B1)
        << report(B1, "updated")
    ).end()


def test_a_deletion_during_an_install_evicts_without_waiting_for_the_result() -> None:
    """Commands are carried out in order, so the eviction meets the entry; the late result means nothing."""
    (
        sent()
        >> deleted(B1, 11)
        << evict(B1, "deleted")
        << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0)
        >> stands(B1)
    ).end()


def test_a_return_during_an_install_waits_for_its_result() -> None:
    """Deleted and created again while the map was slow."""
    (
        sent()
        >> deleted(B1, 11)
        << evict(B1, "deleted")
        << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0)
        >> put(B1, 12, record(B1, DATABASE))
        >> stands(B1)
        << install(B1, entry(DATABASE))
        >> stands(B1)
        << report(B1, "installed")
    ).end()


def test_a_change_during_an_install_that_is_refused_tries_again() -> None:
    """The newest record has not been refused yet."""
    (
        sent()
        >> put(B1, 11, record(B1, DATABASE))
        >> refused(B1, Reason.INSTALL_FAILED)
        << report(B1, "failed", Reason.INSTALL_FAILED, missed_at=0.0)
        << install(B1, entry(DATABASE))
    ).end()


def test_an_install_answered_after_its_address_was_forgotten_is_not_taken_for_the_next_one() -> None:
    """Also when the address is back meanwhile: its own Install waits for that answer."""
    (
        sent()
        >> ClusterGone("b")
        << evict(B1, "cluster-gone")
        << report(B1, "evicted", detail="cluster-gone", missed_at=0.0)
        << unwatch(B1)
        >> ClusterReady("b")
        >> miss(B1, at=1.0)
        << read(B1)
        >> answered(20, {B1: record(B1, DATABASE)})
        << watch(B1, 20)
        >> stands(B1)
        << install(B1, entry(DATABASE))
        >> stands(B1)
        << report(B1, "installed", missed_at=1.0)
    ).end()


# --- 13: the budget -----------------------------------------------------------------------------------------------


def two_installed() -> Play:
    """Return a play with a budget of two in which B1 and B2 are installed, in this order."""
    story = installed(limits=Limits(owned=2)) >> miss(B2) << read(B2) >> answered(10, {B2: record(B2)})
    return story << install(B2) << watch(B2, 10) >> stands(B2) << report(B2, "installed", missed_at=0.0)


def test_the_least_recently_used_entry_makes_room_before_the_next_is_installed() -> None:
    """Evict first, so that the budget is never exceeded; the victim is forgotten with its watches."""
    (
        two_installed()
        >> miss(B3)
        << read(B3)
        >> answered(10, {B3: record(B3)})
        << evict(B1, "budget")
        << report(B1, "evicted", detail="budget")
        << unwatch(B1)
        << install(B3)
        << watch(B3, 10)
    ).end()


def test_a_miss_counts_as_use() -> None:
    """An entry that missed again is not the first to go."""
    story = two_installed() >> miss(B1) << report(B1, "installed", missed_at=0.0, cached=True)
    story = story >> miss(B3) << read(B3) >> answered(10, {B3: record(B3)})
    (
        story
        << evict(B2, "budget")
        << report(B2, "evicted", detail="budget")
        << unwatch(B2)
        << install(B3)
        << watch(B3, 10)
    ).end()


def test_an_update_needs_no_room() -> None:
    """It takes the place of its own older entry."""
    (two_installed() >> put(B1, 11, record(B1, DATABASE)) << install(B1, entry(DATABASE))).end()


def test_a_batch_larger_than_the_budget_leaves_its_last_ones() -> None:
    """Even entries whose Install is not answered make room; they are not watched."""
    story = Play(limits=Limits(owned=1)) >> miss(B1) >> miss(B2) >> ClusterReady("b") << read(B1, B2)
    (
        story
        >> answered(10, {B1: record(B1), B2: record(B2)})
        << install(B1)
        << evict(B1, "budget")
        << report(B1, "evicted", detail="budget", missed_at=0.0)
        << install(B2)
        << watch(B2, 10)
        >> stands(B1)
        >> stands(B2)
        << report(B2, "installed", missed_at=0.0)
    ).end()
    assert story.resolver.owned == 1


def test_what_an_answer_takes_out_of_the_map_is_room_for_what_it_brings() -> None:
    """Also if that is said first: no other entry goes for it."""
    story = two_installed() >> ClusterSilent("b") >> miss(B3)
    story = story << report(B3, "absent", Reason.CLUSTER_DOWN, missed_at=0.0) >> ClusterReady("b")
    story = story << read(B1, B2, B3)
    (
        story
        >> answered(20, {B1: record(B1), B2: record(B2, UNKNOWN), B3: record(B3)})
        << evict(B2, "unknown-identity")
        << report(B2, "evicted", Reason.UNKNOWN_IDENTITY)
        << install(B3)
        << watch(B3, 20)
    ).end()


def test_what_makes_room_for_another_of_the_same_answer_is_not_installed_again() -> None:
    """Its record has changed, too, but it was forgotten a moment before."""
    story = Play(limits=Limits(owned=1)) >> ClusterReady("b") >> miss(B1) << read(B1)
    story = story >> answered(10, {B1: None}) << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0)
    story = story << watch(B1, 10) >> miss(B2) << read(B2) >> answered(10, {B2: record(B2)})
    story = story << install(B2) << watch(B2, 10) >> stands(B2) << report(B2, "installed", missed_at=0.0)
    story = story >> StoreReset("b") << unwatch(B1) << unwatch(B2) << read(B1, B2)
    (
        story
        >> answered(20, {B1: record(B1), B2: record(B2, DATABASE)})
        << evict(B2, "budget")
        << report(B2, "evicted", detail="budget")
        << install(B1)
        << watch(B1, 20)
    ).end()


def absent_and_installed_are_read_again() -> Play:
    """Return a play in which B1 is absent, B2 is installed, and no other absence would be remembered."""
    story = Play(limits=Limits(negatives=1)) >> ClusterReady("b") >> miss(B1) << read(B1)
    story = story >> answered(10, {B1: None}) << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0)
    story = story << watch(B1, 10) >> miss(B2) << read(B2) >> answered(10, {B2: record(B2)})
    story = story << install(B2) << watch(B2, 10) >> stands(B2) << report(B2, "installed", missed_at=0.0)
    return story >> StoreReset("b") << unwatch(B1) << unwatch(B2) << read(B1, B2)


def test_what_an_answer_refuses_pushes_nothing_out_of_memory_that_it_brings() -> None:
    """An absent address whose record has come is absent no more when absences are counted."""
    story = absent_and_installed_are_read_again()
    (
        story
        >> answered(20, {B1: record(B1), B2: record(B2, UNKNOWN)})
        << evict(B2, "unknown-identity")
        << report(B2, "evicted", Reason.UNKNOWN_IDENTITY)
        << install(B1)
        << Watch("b", DIRECT, (B1, B2), 20)
    ).end()


@pytest.mark.parametrize("identity", [WEB, UNKNOWN])
def test_an_address_that_its_own_answer_pushed_out_of_memory_is_left_in_peace(identity: int) -> None:
    """Whatever its record says."""
    story = absent_and_installed_are_read_again()
    (
        story
        >> answered(20, {B1: record(B1, identity), B2: None})
        << evict(B2, "deleted")
        << report(B2, "evicted", Reason.NOT_FOUND)
        << watch(B2, 20)
    ).end()
    assert story.resolver.describe(B1) is None


def test_room_is_made_of_an_entry_whose_result_comes_with_it() -> None:
    """It is first reported as installed, and then evicted."""
    story = sent(limits=Limits(owned=1)) >> put(B1, 11, record(B1, MAIL)) >> IdentityGone(WEB)
    story = story << evict(B1, "unknown-identity")
    story = story << report(B1, "absent", Reason.UNKNOWN_IDENTITY, missed_at=0.0)
    story = story >> miss(B2) << read(B2) >> answered(12, {B2: record(B2)}) << install(B2) << watch(B2, 12)
    (
        story
        >> stands(B1, B2)
        << report(B2, "installed", missed_at=0.0)
        << evict(B2, "budget")
        << report(B2, "evicted", detail="budget")
        << unwatch(B2)
        << install(B1, entry(MAIL))
    ).end()


def test_what_ends_alike_is_said_at_once() -> None:
    """One command for all entries of an answer, and one for all their ends: a storm is made of these."""
    some = (B1, B2, B3)
    resolver = Play().resolver
    said_to(resolver, ClusterReady("b"), 0.0)
    said_to(resolver, Misses(some, (0.0, 1.0, 2.0)), 3.0)
    installs, _ = said_to(resolver, answered(10, {each: record(each) for each in some}), 4.0)
    assert installs == Install(list(some), entry(), 2)
    (ended,) = said_to(resolver, stands(*some), 5.0)
    assert ended == Report(list(some), "b", "installed", None, "", [0.0, 1.0, 2.0])


def test_what_a_packet_waits_for_is_said_before_it_is_noted() -> None:
    """A read goes out while nothing is known of the address, an entry in while none is owned."""
    resolver = Play().resolver
    said_to(resolver, ClusterReady("b"), 0.0)
    at_the_time: list[tuple[type, object]] = []

    def carry_out(command: Command) -> None:
        at_the_time.append((type(command), resolver.describe(B1)))

    resolver.step(Misses((B1,), (0.0,)), 1.0, carry_out)
    resolver.step(answered(10, {B1: record(B1)}), 2.0, carry_out)
    (read, unknown), (install, known), *_ = at_the_time
    assert (read, unknown) == (Read, None)
    assert (install, known) == (Install, Known("b", None))
    assert resolver.describe(B1) == Known("b", entry())


def test_the_first_of_two_misses_of_one_moment_counts() -> None:
    """Two processors may have seen the address at once: one read, one answer, and the longer wait."""
    story = Play() >> ClusterReady("b") >> Misses((B1, B1), (1.0, 2.0)) << read(B1)
    story = story >> answered(10, {B1: record(B1)}) << install(B1) << watch(B1, 10)
    (story >> stands(B1) << report(B1, "installed", missed_at=1.0)).end()
