"""Which maps count, look by look: the pin, what programs read, the time."""

from __future__ import annotations

import pytest

from lazymesh.core.ipcaches import (
    FILLING_MOST,
    LETTING_GO_S,
    MOST,
    ORPHAN_AFTER_S,
    ROOM_EVERY_S,
    ROOM_TIGHT_S,
    Arrangement,
    Room,
)

NOTHING: frozenset[int] = frozenset()


def reads(*map_ids: int) -> frozenset[int]:
    """Return what programs read."""
    return frozenset(map_ids)


def test_one_map_is_all_there_is_most_of_the_time() -> None:
    """The pinned one, whether a program is there already to read it or not."""
    arrangement = Arrangement()
    assert arrangement.step({5}, NOTHING, 0) == (5,)
    assert arrangement.step({5}, reads(5), 1) == (5,)
    assert arrangement.settled


def test_nothing_is_there_before_the_first_pin() -> None:
    """Programs alone say nothing: the agent that wrote their map may be long gone."""
    assert Arrangement().step(NOTHING, reads(3), 0) == ()


def test_missing_pin_changes_nothing() -> None:
    """For a moment at each start of the agent there is none."""
    arrangement = Arrangement()
    arrangement.step({5}, reads(5), 0)
    assert arrangement.step(NOTHING, reads(5), 1) == (5,)
    assert arrangement.there_at == 0
    arrangement.step({5}, reads(5), 2)
    assert arrangement.there_at == 2


def test_pin_of_another_version_is_known_by_its_readers() -> None:
    """Which name is used says nothing; an old pin stays, and may be younger than the map that is used."""
    assert Arrangement().step({5, 9}, reads(5), 0) == (5,)
    arrangement = Arrangement()
    assert arrangement.step({5, 9}, NOTHING, 0) == (9,)
    assert arrangement.step({5}, NOTHING, 1) == (9,), "not taken for its replacement"


def test_what_is_pinned_while_we_look_on_is_the_running_agents() -> None:
    """Even if its version uses another name: the old pin stays, and programs read that map for a while."""
    arrangement = Arrangement()
    arrangement.step({5}, reads(5), 0)
    assert arrangement.has_news({5, 9})
    assert arrangement.step({5, 9}, reads(5), 10) == (9, 5)
    assert not arrangement.has_news({5, 9})
    assert arrangement.step({5, 9}, reads(5), 70) == (9, 5)
    assert arrangement.step({5, 9}, reads(9), 72) == (9,)


def test_start_in_the_middle_of_an_upgrade_is_made_up_for() -> None:
    """As soon as a program reads the younger map."""
    arrangement = Arrangement()
    assert arrangement.step({5, 9}, reads(5), 0) == (5,)
    assert arrangement.step({5, 9}, reads(5, 9), 2) == (9, 5)


def test_old_map_counts_until_its_last_reader_has_gone() -> None:
    """And a moment longer: a packet may be on its way through that one."""
    arrangement = Arrangement()
    arrangement.step({5}, reads(5), 0)
    assert arrangement.step({9}, reads(5), 10) == (9, 5)
    assert arrangement.step({9}, reads(5, 9), 70) == (9, 5)
    assert not arrangement.settled
    assert arrangement.step({9}, reads(9), 70.5) == (9, 5)
    assert arrangement.step({9}, reads(9), 70 + LETTING_GO_S) == (9,)


def test_map_that_counted_still_counts_though_no_reader_was_seen() -> None:
    """At the moment of the move a look at the programs may be missing."""
    arrangement = Arrangement()
    arrangement.step({5}, NOTHING, 0)
    assert arrangement.step({9}, NOTHING, 10) == (9, 5)
    assert arrangement.step({9}, NOTHING, 10 + LETTING_GO_S) == (9,)


def test_agent_that_starts_late_finds_the_old_map_in_use() -> None:
    """It was not there when the pin moved."""
    assert Arrangement().step({9}, reads(5), 0) == (9, 5)


def test_restarts_in_a_row_pile_up_to_a_bound() -> None:
    """The newest are kept."""
    arrangement = Arrangement()
    for map_id in (3, 5, 7, 9, 11):
        maps = arrangement.step({map_id}, reads(3, 5, 7), map_id)
    assert len(maps) == MOST
    assert maps == (11, 9, 7)


@pytest.mark.parametrize("pinned", [9, 2])
def test_pin_that_no_program_takes_up_is_an_orphan(pinned: int) -> None:
    """What programs read is served instead, and the pinned map is left alone (cilium issue 45196)."""
    arrangement = Arrangement()
    arrangement.step({pinned}, reads(5), 0)
    assert arrangement.orphan is None
    assert arrangement.step({pinned}, reads(5), ORPHAN_AFTER_S + 1) == (5,)
    assert arrangement.orphan == pinned
    assert arrangement.step({pinned}, reads(pinned, 5), ORPHAN_AFTER_S + 2) == (pinned, 5)
    assert arrangement.orphan is None
    assert arrangement.recreated == 0, "nothing was pinned anew"
    assert arrangement.step({11}, reads(5), ORPHAN_AFTER_S + 3)[0] == 11
    assert arrangement.recreated == 1


def test_pinned_map_without_any_program_is_not_an_orphan() -> None:
    """A node without pods."""
    arrangement = Arrangement()
    for now in (0, 2 * ORPHAN_AFTER_S):
        assert arrangement.step({5}, NOTHING, now) == (5,)
    assert arrangement.orphan is None


def test_room_gets_scarce_and_is_back_only_well_below() -> None:
    """So that it does not change at every count; the surplus is returned."""
    room = Room()
    assert (room.step(949, 1000), room.crowded) == (0, False)
    assert (room.step(960, 1000), room.crowded) == (30, True)
    assert (room.step(940, 1000), room.crowded) == (10, True)
    assert (room.step(929, 1000), room.crowded) == (0, False)


@pytest.mark.parametrize("size", [1, 7, 100, 1_000, 1_001, 512_000])
def test_room_that_was_made_is_enough(size: int) -> None:
    """Else all that misses would be refused until Cilium removes an entry, with a fourteenth of the map empty."""
    room = Room()
    surplus = room.step(size, size)
    assert room.crowded
    assert (room.step(size - surplus, size), room.crowded) == (0, False)


def test_new_map_is_not_crowded_before_it_holds_what_the_last_one_did() -> None:
    """Until then our entries in it are those that Cilium is about to write."""
    room = Room()
    room.step(975, 1000)
    room.begin()
    assert not room.crowded
    for used in (10, 500, 960, 975):
        assert (room.step(used, 1000), room.crowded) == (0, False)
    assert (room.step(976, 1000), room.crowded) == (46, True)


def test_new_map_that_no_longer_grows_is_judged_like_any_other() -> None:
    """Also after two restarts in a row; a pause at its beginning does not count."""
    room = Room()
    room.step(975, 1000)
    room.begin()
    room.step(300, 1000)
    room.begin()
    for used in (0, 0, 960):
        assert (room.step(used, 1000), room.crowded) == (0, False)
    assert (room.step(960, 1000), room.crowded) == (30, True)


def test_new_map_that_stays_smaller_is_judged_like_any_other_after_a_while() -> None:
    """A mesh may shrink to less than half while Cilium is down; at first, that a map does not grow says nothing."""
    room = Room()
    room.step(975, 1000)
    room.begin()
    for _ in range(FILLING_MOST):
        room.step(300, 1000)
    assert room.left(1000) == 675
    room.step(301, 1000)
    assert room.left(1000) == 674, "it grows"
    room.step(300, 1000)
    assert room.left(1000) == 650


def test_some_room_is_left_whatever_the_last_map_held() -> None:
    """Cilium's next entry must fit."""
    room = Room()
    room.step(1000, 1000)
    room.begin()
    room.step(900, 1000)
    assert (room.step(981, 1000), room.crowded) == (51, True)


def test_count_comes_before_the_map_can_be_full() -> None:
    """Rarely while there is room, at once in the last stretch of a map that fills up."""
    room = Room()
    assert room.pause(512_000, 0) == ROOM_EVERY_S
    room.step(400_000, 512_000)
    assert room.pause(512_000, 0) == pytest.approx(17.28)
    room.step(500_000, 512_000)
    assert room.pause(512_000, 0) == ROOM_TIGHT_S
    room.begin()
    room.step(480_000, 512_000)
    assert room.pause(512_000, 0) == pytest.approx(4)
    room.step(500_000, 512_000)
    assert room.pause(512_000, 0) == 0


def test_what_we_add_brings_the_next_count_forward_and_ends_where_the_map_is_crowded() -> None:
    """The map is Cilium's beyond that, however many of our entries come between two counts."""
    room = Room()
    room.step(400_000, 512_000)
    assert room.left(512_000) == 86_400
    assert room.pause(512_000, 40_000) == pytest.approx(9.28)
    assert room.pause(512_000, 80_000) == ROOM_TIGHT_S
    room.begin()
    room.step(500_000, 512_000)
    room.begin()
    assert room.left(512_000) == 500_000, "as many as the last map held"
