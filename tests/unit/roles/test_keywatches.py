"""Keys that are followed, and the ranges that are watched for them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lazymesh.core.keys import ip_key
from lazymesh.core.model import Space, parse_address
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Change, WatchLoss
from lazymesh.roles.keywatches import KeyWatches, neighbourhood

if TYPE_CHECKING:
    from lazymesh.kvstore.model import WatchListener

KEYS = [b"p/10.2.0.1", b"p/10.2.0.22", b"p/10.2.0.255", b"p/10.2.1.1"]


class Server:
    """A store's watches, each as far as it was told, and the whole history."""

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
        self.told: dict[bytes, list[int]] = defaultdict(list)
        self.followed: dict[bytes, int] = {}
        self.lost: list[WatchLoss] = []
        self.watches = KeyWatches(self.server, self.on_change, self.lost.append)

    def on_change(self, change: Change) -> None:
        """Take note of a change; it may come twice."""
        assert change.key in self.followed, "nobody asked"
        self.told[change.key].append(change.mod_revision)

    @rule(key=st.sampled_from(KEYS))
    def write(self, key: bytes) -> None:
        """Somebody changes a key."""
        self.server.write(key)

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1), behind=st.integers(0, 3))
    def follow(self, keys: set[bytes], behind: int) -> None:
        """Keys were read a while ago."""
        after = max(0, len(self.server.history) - behind)
        fresh = sorted(keys - self.followed.keys())
        self.followed |= dict.fromkeys(fresh, after)
        self.watches.follow(fresh, after)

    @rule(key=st.sampled_from(KEYS))
    def unfollow(self, key: bytes) -> None:
        """Nobody asks any more."""
        self.watches.unfollow(key)
        self.followed.pop(key, None)
        self.told.pop(key, None)

    @rule(which=st.integers(0, 9), most=st.integers(1, 3))
    def tell(self, which: int, most: int) -> None:
        """The store tells something."""
        ids = sorted(self.server.watches)
        if ids:
            self.server.tell(ids[which % len(ids)], most)

    @rule(which=st.integers(0, 9))
    def lose(self, which: int) -> None:
        """The store ends a watch."""
        ids = sorted(self.server.watches)
        if ids:
            prefix, listener, _ = self.server.watches.pop(ids[which % len(ids)])
            for key in [key for key in self.followed if key.startswith(prefix)]:
                del self.followed[key]
            listener.on_lost(0, WatchLoss("compacted", KvstoreError("x")))
            assert self.lost.pop().kind == "compacted"
            assert not self.lost

    @invariant()
    def one_watch_for_each_range(self) -> None:
        """And none without keys."""
        ranges = {neighbourhood(key) for key in self.followed}
        assert sorted(prefix for prefix, _, _ in self.server.watches.values()) == sorted(ranges)
        assert (len(self.watches), self.watches.ranges) == (len(self.followed), len(ranges))

    def teardown(self) -> None:
        """In the end every change since a key was read has been told."""
        for watch_id in list(self.server.watches):
            self.server.tell(watch_id, len(self.server.history))
        for key, after in self.followed.items():
            since = {each.mod_revision for each in self.server.history[after:] if each.key == key}
            assert since <= set(self.told[key])
        self.watches.clear()
        assert not self.server.watches


TestKeyWatches = World.TestCase


@pytest.mark.parametrize(
    ("address", "prefix"),
    [
        ("10.2.0.1", b"10.2.0."),
        ("10.2.0.255", b"10.2.0."),
        ("fd00::1ab", b"fd00::1"),
        ("fd00::100", b"fd00::1"),
        ("fd00::ab", b"fd00::"),
        ("fd00::", b"fd00::"),
        ("fd00:1:2:3:4:5:6:77", b"fd00:1:2:3:4:5:6:"),
    ],
)
@pytest.mark.parametrize("space", Space)
def test_neighbourhood_is_that_of_a_nodes_pods(address: str, prefix: bytes, space: Space) -> None:
    """A /24 of IPv4, a /120 of IPv6; whatever it is, it holds the key itself."""
    key = ip_key(space, parse_address(address), "b.c:d")
    assert neighbourhood(key).rpartition(b"/")[2] == prefix
    assert key.startswith(neighbourhood(key))
