"""The resolver's conversations about single addresses: misses, answers, changes, identities, adoption.

What happens to whole clusters is in test_lifecycle, what the map and the budget do in test_moves, queue and batches in
test_backlog, and everything at once in test_machine_model.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.events import (
    Adopted,
    AllListed,
    ClusterGone,
    ClusterReady,
    ClusterSilent,
    Command,
    Event,
    Evict,
    IdentitiesKnown,
    IdentityGone,
    Install,
    KeyState,
    Lost,
    Misses,
    Report,
    Shrink,
    StoreReset,
    TableChanged,
)
from lazymesh.core.model import Reason, Space, parse_address
from lazymesh.core.resolver import Resolver
from lazymesh.core.resolver.limits import Limits
from tests.support.playbook import (
    ALL_IDENTITIES,
    B1,
    B2,
    B3,
    B4,
    B_V6,
    C1,
    CACHE,
    CLAIMED_TWICE,
    DATABASE,
    DIRECT,
    MAIL,
    NODE,
    STRANGER,
    WEB,
    WEB_OF_C,
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
    refused,
    report,
    stands,
    unwatch,
    watch,
)

TTL = Limits().negative_ttl


def play(**kwargs: object) -> Play:
    """Return a play in which both clusters are ready."""
    begun = Play(**kwargs)  # type: ignore[arg-type]
    return begun >> ClusterReady("b") >> ClusterReady("c")


def installed(**kwargs: object) -> Play:
    """Return a play in which the address B1 was missed, read at revision 10 and installed."""
    return (
        play(**kwargs)
        >> miss(B1)
        << read(B1)
        >> answered(10, {B1: record(B1)})
        << install(B1)
        << watch(B1, 10)
        >> stands(B1)
        << report(B1, "installed", missed_at=0.0)
    )


# --- 1, 2: one miss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [B1, B_V6], ids=["IPv4", "IPv6"])
def test_a_miss_is_read_installed_watched_and_reported(address: bytes) -> None:
    """The whole story of one packet."""
    (
        play()
        >> miss(address, at=3.5)
        << read(address)
        >> answered(10, {address: record(address)})
        << install(address)
        << watch(address, 10)
        >> stands(address)
        << report(address, "installed", missed_at=3.5)
    ).end()


def test_a_record_in_the_pull_only_space_is_as_good() -> None:
    """A filtered endpoint can be resolved: that is the point of the second space."""
    (
        play()
        >> miss(B1)
        << read(B1)
        >> answered(10, pull_only={B1: record(B1)})
        << install(B1)
        << watch(B1, 10)
    ).end()


def test_more_misses_while_resolving_cause_no_read_and_no_second_report() -> None:
    """Single flight; the one report counts from the first miss."""
    (
        play()
        >> miss(B1, at=1.0)
        << read(B1)
        >> miss(B1, at=2.0)
        >> answered(10, {B1: record(B1)})
        << install(B1)
        << watch(B1, 10)
        >> miss(B1, at=3.0)
        >> stands(B1)
        << report(B1, "installed", missed_at=1.0)
    ).end()


@pytest.mark.parametrize(
    ("address", "reason"),
    [(STRANGER, Reason.NO_CLUSTER), (CLAIMED_TWICE, Reason.AMBIGUOUS)],
    ids=["none", "two"],
)
def test_an_address_without_exactly_one_owner_is_not_read(address: bytes, reason: Reason) -> None:
    """No cluster, or none in particular, could be asked; the answer is cached."""
    (
        play()
        >> miss(address, at=1.0)
        << report(address, "absent", reason, missed_at=1.0, cluster=None)
        >> miss(address, at=2.0)
        << report(address, "absent", reason, missed_at=2.0, cluster=None, cached=True)
    ).end()


# --- 5: read groups and judgement ---------------------------------------------------------------------------------


def cached_play(**kwargs: object) -> Play:
    """Return a play in which cluster b is read from the cache first, then from its own store."""
    return Play(table=mesh([info("b", CACHE, DIRECT), info("c")]), **kwargs) >> ClusterReady("b")  # type: ignore[arg-type]


def from_the_cache() -> Play:
    """Return a cached play in which B1 was found there, and its entry is on its way into the map."""
    return (
        cached_play()
        >> miss(B1)
        << read(B1, spaces=CACHE)
        >> cache_answered(10, {B1: record(B1)})
        << install(B1)
        << watch(B1, 10, Space.CACHED)
    )


def test_what_the_cache_holds_is_not_asked_of_the_owner() -> None:
    """The first group that holds a record ends the search."""
    from_the_cache().end()


def beyond_the_cache() -> Play:
    """Return a cached play in which B1 was found, at revision 500, in the owner's store only."""
    return (
        cached_play()
        >> miss(B1)
        << read(B1, spaces=CACHE)
        >> cache_answered(10, {B1: None})
        << watch(B1, 10, Space.CACHED)
        << read(B1)
        >> answered(500, {B1: record(B1)})
        << install(B1)
        << watch(B1, 500)
        >> stands(B1)
        << report(B1, "installed", missed_at=0.0)
    )


def test_what_the_cache_lacks_is_asked_of_the_owner() -> None:
    """Every key that was read is watched, the empty one too."""
    beyond_the_cache().end()


def test_a_cache_that_lags_behind_does_not_overrule_the_owner() -> None:
    """The owner's record is the newer one, whatever the cache's revision numbers: the stores do not share them."""
    stale = record(B1, DATABASE)
    (beyond_the_cache() >> put(B1, 11, stale, Space.CACHED) >> put(B1, 9999, stale, Space.CACHED)).end()


def test_a_record_deleted_from_the_cache_is_evicted_and_then_asked_of_the_owner() -> None:
    """The entry goes first: by now the address may be another pod's."""
    (
        from_the_cache()
        >> stands(B1)
        << report(B1, "installed", missed_at=0.0)
        >> deleted(B1, 11, Space.CACHED)
        << evict(B1, "deleted")
        << report(B1, "evicted", Reason.NOT_FOUND)
        << read(B1)
        >> answered(500, pull_only={B1: record(B1)})
        << install(B1)
        << watch(B1, 500)
    ).end()


def test_a_record_deleted_from_the_cache_before_its_install_is_answered_is_evicted_all_the_same() -> None:
    """Whatever becomes of the owner's read: nothing would ever look at the entry again."""
    (
        from_the_cache()
        >> deleted(B1, 11, Space.CACHED)
        << evict(B1, "deleted")
        << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0)
        << read(B1)
        >> failed(B1, kind="timeout")
        >> stands(B1)
    ).end()


NOT_INSTALLABLE = {
    "garbage": (b"{", Reason.MALFORMED),
    "another address's record": (record(B2), Reason.MALFORMED),
    "identity of another cluster": (record(B1, WEB_OF_C), Reason.FORGED),
    "reserved identity": (record(B1, 2), Reason.FORGED),
    "identity zero": (record(B1, 0), Reason.FORGED),
    "node-local identity": (record(B1, 0x01000001), Reason.FORGED),
    "identity nobody told us of": (record(B1, 131999), Reason.UNKNOWN_IDENTITY),
}


@pytest.mark.parametrize(("value", "reason"), NOT_INSTALLABLE.values(), ids=NOT_INSTALLABLE)
def test_a_record_that_must_not_be_installed_makes_the_address_absent(value: bytes, reason: Reason) -> None:
    """Nothing reaches the map, the reason is reported, and the keys are watched all the same."""
    started = play() >> miss(B1) << read(B1)
    said = started.tell(answered(10, {B1: value}))
    assert [c for c in said if not isinstance(c, Report)] == [watch(B1, 10)]
    assert [(c.outcome, c.reason) for c in said if isinstance(c, Report)] == [("absent", reason)]


def test_a_record_for_another_region_is_out_of_scope() -> None:
    """It is absent here, and watched in case the exporter changes it."""
    table = mesh(regions=[(NODE, "south")])
    (
        play(table=table, region="north")
        >> miss(B1)
        << read(B1)
        >> answered(10, {B1: record(B1, scope="regional")})
        << report(B1, "absent", Reason.OUT_OF_SCOPE, missed_at=0.0)
        << watch(B1, 10)
    ).end()


# --- 6, 7: negative answers ---------------------------------------------------------------------------------------


def not_found() -> Play:
    """Return a play in which B1 was read at revision 10 and does not exist."""
    return (
        play()
        >> miss(B1, at=1.0)
        << read(B1)
        >> answered(10, {B1: None})
        << report(B1, "absent", Reason.NOT_FOUND, missed_at=1.0)
        << watch(B1, 10)
    )


def test_a_negative_answer_is_watched_and_cached() -> None:
    """The next miss is answered without a read."""
    (
        not_found() >> miss(B1, at=2.0) << report(B1, "absent", Reason.NOT_FOUND, missed_at=2.0, cached=True)
    ).end()


def test_a_publication_cancels_a_negative_answer_at_once() -> None:
    """No miss is needed; the watches stay in use."""
    (not_found() >> put(B1, 11) << install(B1) >> stands(B1) << report(B1, "installed")).end()


def test_a_scanned_address_is_not_watched_and_soon_read_again() -> None:
    """The allowance for watching absent addresses is used up; a publication is noticed by the next miss."""
    limits = Limits(negative_watch_rate=0.01, negative_watch_burst=0.0)
    story = play(limits=limits) >> miss(B1) << read(B1) >> answered(10, {B1: None})
    story = story << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0) << watch(B1, 10)
    story = story >> miss(B2) << read(B2) >> answered(10, {B2: None})
    story = story << report(B2, "absent", Reason.NOT_FOUND, missed_at=0.0)
    story = (
        story.later(limits.unwatched_ttl) >> miss(B2, at=2.0) << read(B2) >> answered(12, {B2: record(B2)})
    )
    story = story << install(B2) << watch(B2, 12) >> stands(B2) << report(B2, "installed", missed_at=2.0)
    story.end()


def test_misses_of_one_moment_share_a_transaction() -> None:
    """What came in one wake-up is read together."""
    together = Misses((B1, B2, B3), (0.0,) * 3)
    (play() >> together << read(B1, B2, B3)).end()


def test_an_expired_negative_answer_is_forgotten_with_its_watches() -> None:
    """And the next miss reads again."""
    (not_found().later(TTL[Reason.NOT_FOUND]) << unwatch(B1) >> miss(B1, at=40.0) << read(B1)).end()


def test_a_miss_does_not_wait_for_the_tick_that_forgets_an_expired_answer() -> None:
    """Between two ticks a miss may find a negative answer whose time is up."""
    late = not_found()
    late.now += TTL[Reason.NOT_FOUND]
    (late >> miss(B1, at=31.0) << unwatch(B1) << read(B1)).end()


def test_a_forgotten_address_is_not_given_an_answer_older_than_what_it_knew() -> None:
    """A re-read was in flight when its watch reported the deletion and the negative answer expired."""
    story = installed() >> ClusterSilent("b") >> ClusterReady("b") << read(B1)
    story = story >> deleted(B1, 20) >> ClusterSilent("b")
    story = story << evict(B1, "deleted") << report(B1, "evicted", Reason.NOT_FOUND) >> ClusterReady("b")
    story = story.later(TTL[Reason.NOT_FOUND]) << unwatch(B1) >> miss(B1, at=40.0)
    story = story >> answered(19, {B1: record(B1)}) << read(B1) >> answered(21, {B1: None})
    (story << report(B1, "absent", Reason.NOT_FOUND, missed_at=40.0) << watch(B1, 21)).end()


def test_a_failed_read_is_not_watched_and_soon_forgotten() -> None:
    """The kind of failure is in the report."""
    story = (
        play()
        >> miss(B1, at=1.0)
        << read(B1)
        >> failed(B1, kind="permission")
        << report(B1, "failed", Reason.READ_FAILED, missed_at=1.0, detail="permission")
        >> miss(B1, at=1.1)
        << report(B1, "absent", Reason.READ_FAILED, missed_at=1.1, cached=True)
    )
    (story.later(TTL[Reason.READ_FAILED]) >> miss(B1, at=3.0) << read(B1)).end()


def test_the_oldest_negative_answers_are_forgotten_first_when_there_are_too_many() -> None:
    """Absence is bounded too, and so are the watches that it keeps."""
    (
        play(limits=Limits(negatives=2))
        >> miss(B1)
        << read(B1)
        >> miss(B2)
        << read(B2)
        >> miss(B3)
        << read(B3)
        >> answered(10, {B1: None})
        << report(B1, "absent", Reason.NOT_FOUND, missed_at=0.0)
        << watch(B1, 10)
        >> answered(10, {B2: None})
        << report(B2, "absent", Reason.NOT_FOUND, missed_at=0.0)
        << watch(B2, 10)
        >> answered(10, {B3: None})
        << report(B3, "absent", Reason.NOT_FOUND, missed_at=0.0)
        << unwatch(B1)
        << watch(B3, 10)
    ).end()


# --- 8: changes ---------------------------------------------------------------------------------------------------


def test_a_deleted_record_is_evicted_and_may_come_back() -> None:
    """The pod goes, the entry goes; the pod returns, the entry returns, by the same watch."""
    (
        installed()
        >> deleted(B1, 11)
        << read(B1)
        >> answered(11, {B1: None})
        << evict(B1, "deleted")
        << report(B1, "evicted", Reason.NOT_FOUND)
        >> put(B1, 12)
        << install(B1)
        >> stands(B1)
        << report(B1, "installed")
    ).end()


def test_a_record_that_moves_to_the_other_space_leaves_no_gap() -> None:
    """The watches of the two keys may lag differently: the deletion comes first, the read finds the new record."""
    (
        installed()
        >> deleted(B1, 12)
        << read(B1)
        >> answered(12, pull_only={B1: record(B1, DATABASE)})
        << install(B1, entry(DATABASE))
        >> stands(B1)
        << report(B1, "updated")
        >> put(B1, 11, record(B1, DATABASE), Space.PULL_ONLY)
    ).end()


def test_a_read_from_before_the_deletion_does_not_decide() -> None:
    """It was under way, or the store shows its reads the deletion later than its watches."""
    (
        installed()
        >> deleted(B1, 12)
        << read(B1)
        >> answered(11, {B1: record(B1)})
        << read(B1)
        >> answered(12, pull_only={B1: record(B1, DATABASE)})
        << install(B1, entry(DATABASE))
    ).end()


def test_a_deleted_record_that_cannot_be_read_again_is_gone() -> None:
    """The deletion is certain, that it has moved is not."""
    story = installed() >> deleted(B1, 11) << read(B1) >> failed(B1)
    (story << evict(B1, "deleted") << report(B1, "evicted", Reason.NOT_FOUND)).end()


@pytest.mark.parametrize("end", [ClusterSilent("b"), StoreReset("b")])
def test_a_deleted_record_goes_with_the_store_that_could_say_more(end: Event) -> None:
    """No entry outlives its record for want of an answer."""
    story = installed() >> deleted(B1, 11) << read(B1) >> end
    story = story << evict(B1, "deleted") << report(B1, "evicted", Reason.NOT_FOUND)
    if isinstance(end, StoreReset):
        story = story << unwatch(B1)
    story.end()


def test_a_record_deleted_in_a_silent_cluster_is_gone_at_once() -> None:
    """No store can be asked: the watch may not say any more."""
    story = installed() >> ClusterSilent("b") >> deleted(B1, 11)
    (story << evict(B1, "deleted") << report(B1, "evicted", Reason.NOT_FOUND)).end()


def test_a_reused_address_gets_the_new_identity() -> None:
    """One Install replaces the entry: there is no moment without one."""
    (
        installed()
        >> put(B1, 11, record(B1, DATABASE))
        << install(B1, entry(DATABASE))
        >> stands(B1)
        << report(B1, "updated")
    ).end()


def test_a_record_that_turns_bad_is_evicted_for_its_reason() -> None:
    """A peer that suddenly claims another cluster's identity loses its entry."""
    (
        installed()
        >> put(B1, 11, record(B1, 2))
        << evict(B1, "forged")
        << report(B1, "evicted", Reason.FORGED, detail="identity 2 is reserved")
    ).end()


def test_an_endpoint_that_moves_to_the_other_space_keeps_its_entry() -> None:
    """Publish there, delete here, in this order: the map never changes."""
    (installed() >> put(B1, 11, space=Space.PULL_ONLY) >> deleted(B1, 12)).end()


def test_older_and_repeated_states_change_nothing() -> None:
    """A watch replays what the read has seen, and something older still."""
    (installed() >> put(B1, 10, record(B1, DATABASE)) >> deleted(B1, 9)).end()


def test_changes_of_keys_that_are_not_watched_are_ignored() -> None:
    """They come from watches given up meanwhile."""
    (play() >> put(B1, 11) >> miss(B1) << read(B1) >> put(B1, 11)).end()


LIFE_OF_A_KEY = (
    KeyState(B1, Space.PUSHED, None, 11),
    KeyState(B1, Space.PUSHED, record(B1, DATABASE), 12),
    KeyState(B1, Space.PUSHED, None, 13),
    KeyState(B1, Space.PUSHED, record(B1, MAIL), 14),
)


@given(order=st.permutations(LIFE_OF_A_KEY + LIFE_OF_A_KEY[1:3]), slow=st.booleans())
def test_deletes_and_creates_delivered_in_any_order_converge(order: list[KeyState], slow: bool) -> None:
    """In whatever order and however often, what was true last prevails; however late the map answers."""
    story = installed()
    held: list[Install] = []
    world: dict[bytes, object] = {B1: entry()}

    def carry_out(commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Install):
                world.update(dict.fromkeys(command.addresses, command.entry))
                held.append(command)
            elif isinstance(command, Evict):
                world.pop(command.address, None)

    def answer_installs() -> None:
        while held:
            done = held.pop(0)
            carry_out(story.tell(stands(*done.addresses)))

    for state in order:
        carry_out(story.tell(put(B1, state.as_of, state.value) if state.value else deleted(B1, state.as_of)))
        if not slow:
            answer_installs()
    answer_installs()
    assert world == {B1: entry(MAIL)}


# --- 9: identities ------------------------------------------------------------------------------------------------


def test_an_address_waits_for_its_identity() -> None:
    """The record may come before the labels; the labels then bring the entry, without a read."""
    early = play(identities=()) >> miss(B1) << read(B1) >> answered(10, {B1: record(B1)})
    early << report(B1, "absent", Reason.UNKNOWN_IDENTITY, missed_at=0.0) << watch(B1, 10)
    early.identities.add(WEB)
    (
        early
        >> IdentitiesKnown((DATABASE,))
        >> IdentitiesKnown((WEB,))
        << install(B1)
        >> stands(B1)
        << report(B1, "installed")
    ).end()


def test_a_withdrawn_identity_takes_its_entries_along() -> None:
    """And gives them back when it returns."""
    story = installed()
    story.identities.discard(WEB)
    (
        story
        >> IdentityGone(WEB)
        << evict(B1, "unknown-identity")
        << report(B1, "evicted", Reason.UNKNOWN_IDENTITY)
    )
    story.identities.add(WEB)
    (story >> IdentitiesKnown((WEB,)) << install(B1) >> stands(B1) << report(B1, "installed")).end()


def test_a_withdrawn_identity_touches_no_entry_of_another() -> None:
    """The index follows the address from identity to identity."""
    story = installed() >> put(B1, 11, record(B1, DATABASE)) << install(B1, entry(DATABASE))
    story >> stands(B1) << report(B1, "updated")
    story.identities.discard(WEB)
    (story >> IdentityGone(WEB)).end()


def test_an_identity_that_comes_back_does_not_bring_back_what_was_deleted_meanwhile() -> None:
    """The address is absent for another reason by then."""
    story = installed() >> deleted(B1, 11) << read(B1) >> answered(11, {B1: None})
    story = story << evict(B1, "deleted") << report(B1, "evicted", Reason.NOT_FOUND)
    (story >> IdentityGone(WEB) >> IdentitiesKnown((WEB,))).end()


# --- 10: the table ------------------------------------------------------------------------------------------------


def test_an_address_that_changes_hands_is_evicted() -> None:
    """The next packet finds its new owner."""
    theirs = mesh(networks=[("c", "10.2.0.0/16")])
    (
        installed()
        >> TableChanged(theirs)
        << evict(B1, "no-cluster")
        << report(B1, "evicted", detail="no-cluster")
        << unwatch(B1)
        >> miss(B1, at=1.0)
        << read(B1, cluster="c")
    ).end()


def test_an_address_claimed_by_two_from_now_on_is_evicted_as_ambiguous() -> None:
    """The larger claim must not win."""
    (
        installed()
        >> TableChanged(mesh(networks=[("b", "10.2.0.0/16"), ("c", "10.2.0.0/24")]))
        << evict(B1, "ambiguous")
        << report(B1, "evicted", detail="ambiguous")
        << unwatch(B1)
    ).end()


def test_a_table_that_changes_elsewhere_changes_nothing_here() -> None:
    """Nodes come and go all day."""
    (installed() >> TableChanged(mesh(networks=[("b", "10.2.0.0/16"), ("c", "10.77.0.0/16")]))).end()


def test_an_address_that_gets_an_owner_is_resolved_by_the_next_miss() -> None:
    """No-cluster and ambiguous are forgotten as soon as they are no longer so."""
    (
        play()
        >> miss(STRANGER)
        << report(STRANGER, "absent", Reason.NO_CLUSTER, missed_at=0.0, cluster=None)
        >> TableChanged(mesh(networks=[("b", "192.0.2.0/24")]))
        >> miss(STRANGER, at=1.0)
        << read(STRANGER)
    ).end()


def test_an_address_given_to_a_cluster_that_is_away_is_resolved_by_the_next_miss_once_it_joins() -> None:
    """No other cluster is asked meanwhile."""
    (
        Play(table=mesh([info("c")]))
        >> miss(B1)
        << report(B1, "absent", Reason.NO_CLUSTER, missed_at=0.0, cluster=None)
        >> TableChanged(mesh([info("c")]))
        >> TableChanged(mesh())
        >> ClusterReady("b")
        >> miss(B1, at=1.0)
        << read(B1)
    ).end()


def test_a_miss_of_a_cluster_that_has_left_is_answered_when_the_table_says_so() -> None:
    """The table may follow later, and the address stays its own because the operator said so."""
    (
        play()
        >> ClusterGone("b")
        >> miss(B1, at=1.0)
        >> TableChanged(mesh([info("c")]))
        << report(B1, "absent", Reason.NO_CLUSTER, missed_at=1.0, cluster=None)
    ).end()


def test_a_miss_under_way_follows_its_address_to_the_new_owner() -> None:
    """It is read again there, and still reported once, from the first miss on; the old answer means nothing."""
    (
        play()
        >> miss(B1, at=1.0)
        << read(B1)
        >> TableChanged(mesh(networks=[("c", "10.2.0.0/16")]))
        << read(B1, cluster="c")
        >> answered(10, {B1: record(B1)})
        >> answered(7, {B1: record(B1, WEB_OF_C)}, cluster="c")
        << install(B1, entry(WEB_OF_C), cluster_id=3)
        << watch(B1, 7, cluster="c")
        >> stands(B1)
        << report(B1, "installed", missed_at=1.0, cluster="c")
    ).end()


def test_an_address_forgotten_for_another_of_the_same_table_is_left_in_peace() -> None:
    """The negative cache is full, and the table makes one more address absent."""
    twice = [(name, cidr) for cidr in ("10.2.0.0/16", "192.0.2.0/24") for name in ("b", "c")]
    story = (
        play(limits=Limits(negatives=1))
        >> miss(B1)
        << read(B1)
        >> miss(STRANGER)
        << report(STRANGER, "absent", Reason.NO_CLUSTER, missed_at=0.0, cluster=None)
    )
    (
        story.later(1.0)
        >> TableChanged(mesh(networks=twice))
        << report(B1, "absent", Reason.AMBIGUOUS, missed_at=0.0, cluster=None)
    ).end()


# --- 12: adoption -------------------------------------------------------------------------------------------------


def adopted() -> Play:
    """Return a play that begins with the entry B1 of an earlier life, in doubt."""
    return Play() >> Adopted(B1, entry(), 2)


def test_an_adopted_entry_is_verified_when_its_cluster_is_ready() -> None:
    """It serves all the time; nothing is written if it is still true."""
    story = adopted()
    assert story.resolver.stale_addresses() == [B1]
    (story >> ClusterReady("b") << read(B1) >> answered(10, {B1: record(B1)}) << watch(B1, 10)).end()
    assert story.resolver.stale == {}


def test_an_adopted_entry_is_updated_if_its_address_was_reused() -> None:
    """The earlier life's identity is replaced, not removed first."""
    (
        adopted()
        >> ClusterReady("b")
        << read(B1)
        >> answered(10, {B1: record(B1, DATABASE)})
        << install(B1, entry(DATABASE))
        << watch(B1, 10)
        >> stands(B1)
        << report(B1, "updated")
    ).end()


def test_an_adopted_entry_is_evicted_if_its_record_is_gone() -> None:
    """The pod went while the agent was down."""
    (
        adopted()
        >> ClusterReady("b")
        << read(B1)
        >> answered(10, {B1: None})
        << evict(B1, "deleted")
        << report(B1, "evicted", Reason.NOT_FOUND)
        << watch(B1, 10)
    ).end()


def test_adopted_entries_are_verified_before_anything_else_is_read() -> None:
    """What waited for the cluster, and what is missed meanwhile, waits for one answer more."""
    (
        adopted()
        >> miss(B2)
        >> ClusterReady("b")
        << read(B1)
        >> miss(B3)
        >> answered(10, {B1: record(B1, DATABASE)})
        << install(B1, entry(DATABASE))
        << watch(B1, 10)
        << read(B2, B3)
        >> stands(B1)
        << report(B1, "updated")
    ).end()


def test_a_store_that_does_not_answer_for_adopted_entries_keeps_no_miss_waiting() -> None:
    """Not for longer than a second, and not once it has said no."""
    story = adopted() >> miss(B2) >> ClusterReady("b") << read(B1)
    (story.later(0.9).later(0.1) << read(B2)).end()
    (adopted() >> miss(B2) >> ClusterReady("b") << read(B1) >> failed(B1) << read(B2)).end()


def test_an_adopted_entry_that_goes_keeps_no_miss_waiting() -> None:
    """Its identity was withdrawn, or its address lost its owner, before its read has ended."""
    story = adopted() >> miss(B2) >> ClusterReady("b") << read(B1)
    (
        story
        >> IdentityGone(entry().identity)
        << evict(B1, "unknown-identity")
        << report(B1, "evicted", Reason.UNKNOWN_IDENTITY)
        >> answered(10, {B1: None})
        << watch(B1, 10)
        << read(B2)
    )


def test_an_adopted_entry_outlives_an_empty_cache() -> None:
    """Its record may be in the owner's store alone: the last group decides."""
    (
        Play(table=mesh([info("b", CACHE, DIRECT)], networks=[("b", "10.2.0.0/16")]))
        >> Adopted(B1, entry(), 2)
        >> ClusterReady("b")
        << read(B1, spaces=CACHE)
        >> cache_answered(10, {B1: None})
        << watch(B1, 10, Space.CACHED)
        << read(B1)
        >> answered(500, pull_only={B1: record(B1)})
        << watch(B1, 500)
    ).end()


def test_an_adopted_entry_whose_cluster_never_answers_expires() -> None:
    """Ten minutes of trust in an earlier life are enough."""
    story = adopted().later(599.9)
    (story.later(0.1) << evict(B1, "expired") << report(B1, "evicted", detail="expired")).end()


@pytest.mark.parametrize(
    ("address", "cluster_id", "why"),
    [(C1, 2, "no-cluster"), (CLAIMED_TWICE, 2, "ambiguous"), (B1, 7, "no-cluster")],
    ids=["address of another cluster", "address of two clusters", "and its own has not joined"],
)
def test_an_entry_whose_owner_has_changed_is_not_adopted(address: bytes, cluster_id: int, why: str) -> None:
    """What an earlier life installed may have lost its owner since."""
    (
        Play()
        >> Adopted(address, entry(), cluster_id)
        << evict(address, why)
        << report(address, "evicted", detail=why, cluster={2: "b", 7: "id 7"}[cluster_id])
    ).end()


ALONE = mesh([info("c")], networks=[])
"""Cluster b has not joined: its store is down since this life began."""


def stranded(*addresses: bytes) -> Play:
    """Return a play in which cluster b is known by entries of an earlier life alone."""
    story = Play(table=ALONE, limits=Limits(owned=3))
    for address in addresses:
        story = story >> Adopted(address, entry(), 2)
    return story


def gone(address: bytes, why: str) -> list[Command]:
    """Return the commands that remove such an entry."""
    return [evict(address, why), report(address, "evicted", detail=why, cluster="id 2")]


def test_an_entry_of_a_cluster_that_has_not_joined_is_in_the_books() -> None:
    """It is owned, in doubt, and shown under its cluster's id, which is all that the journal has; it serves."""
    resolver = stranded(B1, B2).resolver
    assert (resolver.owned, resolver.stale, resolver.counts["installed"]) == (2, {"id 2": 2}, 2)
    assert resolver.stale_addresses() == [B1, B2]
    assert resolver.clusters.keys() == set(), "no cluster has been heard of"


def test_an_entry_of_a_cluster_that_joins_is_its_own_from_then_on() -> None:
    """Before its nodes are listed; and it is verified before anything else of the cluster is read."""
    story = stranded(B1) >> TableChanged(mesh(networks=())) >> TableChanged(mesh())
    assert story.resolver.stale == {"b": 1}
    (
        story
        >> miss(B2)
        >> ClusterReady("b")
        << read(B1)
        >> answered(10, {B1: record(B1)})
        << watch(B1, 10)
        << read(B2)
    ).end()
    assert story.resolver.stale == {}


def test_an_entry_of_a_cluster_that_has_not_joined_goes_when_its_address_is_anothers() -> None:
    """Also if that is known at the very moment at which it joins."""
    claimed = [("c", "10.2.0.0/16")]
    for table, cluster in ((mesh([info("c")], claimed), "id 2"), (mesh(networks=claimed), "b")):
        (
            stranded(B1)
            >> TableChanged(table)
            << evict(B1, "no-cluster")
            << report(B1, "evicted", detail="no-cluster", cluster=cluster)
        ).end()


def test_an_entry_of_a_cluster_that_will_not_join_goes() -> None:
    """Once all configured clusters have been listed; not before, and no other cluster's."""
    story = stranded(B1) >> Adopted(C1, entry(WEB_OF_C), 3) >> ClusterReady("c") << read(C1, cluster="c")
    (story >> AllListed() << gone(B1, "cluster-gone")).end()
    assert story.resolver.owned == 1


def test_an_entry_of_a_cluster_that_has_not_joined_goes_like_any_other() -> None:
    """The budget is used up, room is scarce, the map's owner has its own, its time is up."""
    story = stranded(B1, B2, B3) >> Adopted(B4, entry(), 2) << gone(B1, "budget")
    story = story >> Shrink(1) << gone(B2, "crowded")
    story = story >> Lost((B3,)) << report(B3, "taken-over", cluster="id 2")
    (story.later(600) << gone(B4, "expired")).end()
    assert story.resolver.owned == 0


def test_an_entry_of_a_cluster_that_has_not_joined_is_put_back_when_it_vanishes() -> None:
    """A peer that was well a moment ago most likely still is."""
    story = stranded(B1)
    story.now = 1.0
    (
        story
        >> miss(B1, at=1.0)
        << install(B1)
        >> stands(B1)
        << report(B1, "installed", missed_at=1.0, detail="the entry had vanished", cluster="id 2")
    ).end()


def test_an_entry_of_one_cluster_is_not_adopted_where_the_operator_gave_the_address_to_another() -> None:
    """Also while that one is away: the operator may not have said so to an earlier life."""
    (
        Play(table=mesh([info("c")]))
        >> Adopted(B1, entry(), 3)
        << evict(B1, "no-cluster")
        << report(B1, "evicted", detail="no-cluster", cluster="c")
    ).end()


def test_an_entry_in_a_cidr_that_the_operator_gave_to_a_cluster_that_is_away_is_kept_until_it_joins() -> None:
    """Which cluster has the journal's id is not known before; then the entry is that cluster's, or no one's."""
    away = Play(table=mesh([info("c")])) >> Adopted(B1, entry(), 2) >> TableChanged(mesh([info("c")]))
    (away >> TableChanged(mesh()) >> ClusterReady("b") << read(B1)).end()
    unjoined = Play(table=mesh([info("c")])) >> Adopted(B1, entry(), 7) >> TableChanged(mesh([info("c")]))
    unjoined = unjoined >> TableChanged(mesh()) << evict(B1, "no-cluster")
    (unjoined << report(B1, "evicted", detail="no-cluster", cluster="id 7")).end()


def test_an_entry_adopted_before_the_nodes_are_listed_stays_when_they_are() -> None:
    """At the start the table knows no CIDR yet: that the address has no owner means nothing then."""
    story = Play(table=mesh(networks=())) >> Adopted(B1, entry(), 2) >> TableChanged(mesh())
    (story >> ClusterReady("b") << read(B1)).end()


def test_a_miss_that_came_before_the_adoption_wins() -> None:
    """What it leads to is newer than the journal."""
    (
        play()
        >> miss(B1)
        << read(B1)
        >> Adopted(B1, entry(), 2)
        << evict(B1, "expired")
        << report(B1, "evicted", detail="expired")
        >> answered(10, {B1: record(B1)})
        << install(B1)
        << watch(B1, 10)
        >> Adopted(B1, entry(), 2)
    ).end()


def test_an_identity_withdrawn_before_verification_takes_the_adopted_entry_along() -> None:
    """It is known by what the map holds, though no record was read yet."""
    (
        adopted()
        >> IdentityGone(WEB)
        << evict(B1, "unknown-identity")
        << report(B1, "evicted", Reason.UNKNOWN_IDENTITY)
    ).end()


# --- 15: entries that vanish --------------------------------------------------------------------------------------


def test_a_miss_of_an_installed_address_puts_the_entry_back() -> None:
    """It was removed; a miss that is younger than our entry proves it, one that is older does not."""
    story = installed()
    story.now = 1.0
    (
        story
        >> miss(B1, at=0.9)
        << install(B1)
        >> stands(B1)
        << report(B1, "installed", missed_at=0.9, detail="the entry had vanished")
        >> miss(B1, at=1.0)
        << report(B1, "installed", missed_at=1.0, cached=True)
    ).end()


def test_a_miss_signalled_just_before_the_entry_was_installed_is_answered() -> None:
    """Its packet may be held, so it needs a report of its own; nothing is written."""
    (installed() >> miss(B1) << report(B1, "installed", missed_at=0.0, cached=True)).end()


def test_a_miss_during_an_update_is_answered_by_its_result() -> None:
    """The Install under way serves both."""
    (
        installed()
        >> put(B1, 11, record(B1, DATABASE))
        << install(B1, entry(DATABASE))
        >> miss(B1, at=0.5)
        >> miss(B1, at=0.6)
        >> refused(B1, Reason.MAP_FULL)
        << evict(B1, "map-full")
        << report(B1, "evicted", Reason.MAP_FULL, missed_at=0.5)
    ).end()


def test_all_events_have_a_handler() -> None:
    """Every kind of event that the shell may send is understood, also about clusters never heard of."""
    story = Play(identities=ALL_IDENTITIES)
    unknown = [answered(1, {B1: None}, cluster="z"), failed(B1, cluster="z"), stands(B1)]
    for event in itertools.chain(unknown, [put(B1, 1), IdentitiesKnown((5,)), IdentityGone(5)]):
        story >> event
    story.end()


# --- what status and metrics see ------------------------------------------------------------------------------------


def in_each_state() -> Resolver:
    """Return a resolver with an address in each state."""
    story = Play()
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
        story.tell(event)
    return story.resolver


def test_addresses_are_counted_by_state_and_reason() -> None:
    """What metrics need, without a walk over all addresses."""
    resolver = in_each_state()
    assert resolver.counts == {"resolving": 2, "installed": 1, "absent": 2}
    assert resolver.absent == {Reason.NOT_FOUND: 1, Reason.NO_CLUSTER: 1}
    assert (resolver.owned, resolver.queued) == (1, 1)


def test_each_cluster_is_shown_with_its_window_and_breaker() -> None:
    """One line of the status screen."""
    assert in_each_state().clusters == {"b": ("closed", 1), "c": ("closed", 0)}


def test_an_address_is_described_by_its_cluster_and_entry() -> None:
    """Nothing is known of one that never missed."""
    resolver = in_each_state()
    known = {address: resolver.describe(address) for address in (B1, B2, B3, C1, STRANGER)}
    assert known == {
        B1: ("b", entry()),
        B2: ("b", None),
        B3: ("b", None),
        C1: ("c", None),
        STRANGER: (None, None),
    }
    assert resolver.describe(bytes(4)) is None


# --- one step, one read ---------------------------------------------------------------------------------------------


def test_all_that_is_missed_again_at_one_moment_is_one_read() -> None:
    """Also when the store has just come back, and only one read may go to find out."""
    some = tuple(parse_address(f"10.2.1.{number}") for number in range(20))
    story = play(limits=Limits(breaker_failures=1, backoff_first=1.0))
    story = story >> Misses(some, (0.0,) * 20) << read(*some)
    story = (
        story
        >> failed(*some)
        << [report(each, "failed", Reason.READ_FAILED, detail="unavailable", missed_at=0.0) for each in some]
    )
    story.now = 1.5  # no tick has come by yet
    fresh = parse_address("10.2.2.1")
    (story >> Misses((*some, fresh), (1.5,) * 21) << read(*some, fresh)).end()


def test_addresses_that_change_hands_while_they_wait_are_one_read() -> None:
    """Of their new owner."""
    story = Play() >> ClusterReady("c") >> Misses((B1, B2), (0.0, 1.0))
    theirs = mesh(networks=[("c", "10.2.0.0/16")])
    (story >> TableChanged(theirs) << read(B1, B2, cluster="c")).end()
