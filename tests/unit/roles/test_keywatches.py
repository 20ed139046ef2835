"""Keys that are followed, and the ranges that are watched for them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lazymesh.core.keys import address_text, common_text, neighbours_of
from lazymesh.core.model import parse_address
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Change, WatchLoss
from lazymesh.roles.keywatches import KeyWatches

if TYPE_CHECKING:
    from lazymesh.core.model import Address
    from lazymesh.kvstore.model import WatchListener

ADDRESSES = [parse_address(text) for text in ("10.2.0.1", "10.2.0.22", "10.2.0.255", "10.2.1.1")]


class Server:
    """A store's watches, each with its progress, and the whole history."""

    def __init__(self) -> None:
        self.history: list[Change] = []
        self.watches: dict[int, tuple[bytes, WatchListener, int]] = {}
        self._last = 0

    def add(self, key: bytes, listener: WatchListener, start: int, *, prefix: bool = False) -> int:
        """Begin a watch."""
        assert prefix
        self._last += 1
        self.watches[self._last] = (key, listener, start)
        return self._last

    def remove(self, watch_id: int) -> None:
        """End one."""
        del self.watches[watch_id]

    def write(self, key: bytes) -> None:
        """Change a key."""
        self.history.append(Change(key, b"v", len(self.history) + 1))

    def tell(self, watch_id: int, most: int) -> None:
        """Tell a watch of a few changes at once."""
        prefix, listener, start = self.watches[watch_id]
        due = [each for each in self.history if each.key.startswith(prefix) and each.mod_revision >= start]
        if due[:most]:
            self.watches[watch_id] = (prefix, listener, due[:most][-1].mod_revision + 1)
            listener.on_changes(watch_id, due[:most])


class World(RuleBasedStateMachine):
    """Keys are written, read, followed later than they were read, and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.told: dict[Address, list[int]] = defaultdict(list)
        self.followed: dict[Address, int] = {}
        self.lost: list[WatchLoss] = []
        self.watches = KeyWatches(self.server, b"p/", self.on_change, self.lost.append)

    def on_change(self, address: Address, change: Change) -> None:
        """Take note of a change; it may come twice."""
        assert change.key == key_of(address)
        assert address in self.followed, "not followed"
        self.told[address].append(change.mod_revision)

    @rule(address=st.sampled_from(ADDRESSES))
    def write(self, address: Address) -> None:
        """Somebody changes a key."""
        self.server.write(key_of(address))

    @rule()
    def write_nonsense(self) -> None:
        """A key in the range that does not name an address."""
        self.server.write(b"p/10.2.0.x")

    @rule(addresses=st.sets(st.sampled_from(ADDRESSES), min_size=1), behind=st.integers(0, 3))
    def follow(self, addresses: set[Address], behind: int) -> None:
        """They were read a while ago."""
        after = max(0, len(self.server.history) - behind)
        fresh = sorted(addresses - self.followed.keys())
        self.followed |= dict.fromkeys(fresh, after)
        self.watches.follow(neighbours_of(fresh), after)

    @rule(address=st.sampled_from(ADDRESSES))
    def unfollow(self, address: Address) -> None:
        """Nobody asks any more."""
        self.watches.unfollow(address)
        self.followed.pop(address, None)
        self.told.pop(address, None)

    @rule(which=st.integers(0, 9), most=st.integers(1, 3))
    def tell(self, which: int, most: int) -> None:
        """The store reports something."""
        ids = sorted(self.server.watches)
        if ids:
            self.server.tell(ids[which % len(ids)], most)

    @rule(which=st.integers(0, 9))
    def lose(self, which: int) -> None:
        """The store ends a watch."""
        ids = sorted(self.server.watches)
        if ids:
            prefix, listener, _ = self.server.watches.pop(ids[which % len(ids)])
            for address in [each for each in self.followed if key_of(each).startswith(prefix)]:
                del self.followed[address]
            listener.on_lost(0, WatchLoss("compacted", KvstoreError("x")))
            assert self.lost.pop().kind == "compacted"
            assert not self.lost

    @invariant()
    def one_watch_for_each_range(self) -> None:
        """And none without addresses."""
        ranges = {b"p/" + common_text(address) for address in self.followed}
        assert sorted(prefix for prefix, _, _ in self.server.watches.values()) == sorted(ranges)
        assert (len(self.watches), self.watches.ranges) == (len(self.followed), len(ranges))

    def teardown(self) -> None:
        """In the end every change since an address was read has been reported."""
        for watch_id in list(self.server.watches):
            self.server.tell(watch_id, len(self.server.history))
        for address, after in self.followed.items():
            key = key_of(address)
            since = {each.mod_revision for each in self.server.history[after:] if each.key == key}
            assert since <= set(self.told[address])
        self.watches.clear()
        assert not self.server.watches


def key_of(address: Address) -> bytes:
    """Return an address's key."""
    return b"p/" + address_text(address).encode()


def test_change_reported_before_its_address_was_unfollowed_is_reported_again() -> None:
    """It is followed again by a read that is older than the change, as of a member that is behind."""
    world = World()
    gone, stays = ADDRESSES[:2]
    world.write(gone)
    world.follow({gone, stays}, behind=1)
    world.tell(which=0, most=1)
    world.unfollow(gone)
    world.follow({gone}, behind=1)
    world.one_watch_for_each_range()
    world.teardown()


TestKeyWatches = World.TestCase


def test_change_after_a_read_is_still_to_come() -> None:
    """A range that has seen a change of a key that was not followed does not bring it again."""
    world = World()
    one, other = ADDRESSES[:2]
    world.follow({one}, behind=0)
    world.write(other)
    world.tell(which=0, most=1)
    world.follow({other}, behind=1)
    world.teardown()


def test_range_that_begins_after_a_read_is_watched_again_for_it() -> None:
    """The second address was read before the first one."""
    world = World()
    one, other = ADDRESSES[:2]
    world.write(other)
    world.follow({one}, behind=0)
    world.follow({other}, behind=1)
    world.teardown()


@pytest.mark.parametrize("text", [b"fd00::0:5", b"FD00::5", b"fd00::5%eth0", b"fd00::0005"])
def test_key_in_another_form_is_ignored(text: bytes) -> None:
    """Nor would a read find it, nor Cilium take it."""
    told: list[Address] = []
    watches = KeyWatches(Server(), b"p/", lambda address, _change: told.append(address), lambda _loss: None)
    address = parse_address("fd00::5")
    watches.follow(neighbours_of([address]), 0)
    (one,) = watches._ranges.values()
    one.on_changes(1, [Change(b"p/" + text, b"v", 1)])
    assert told == []
    one.on_changes(1, [Change(key_of(address), b"v", 2)])
    assert told == [address]
