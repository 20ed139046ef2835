"""A model of clusters' etcds for plays of the resolver: history, lagging caches, and what was told to whom.

Plain data without time or I/O; when something is executed, delivered or lost is decided by the test.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazymesh.core.events import Answered, KeyState, Read
from lazymesh.core.model import Space
from tests.support.playbook import DIRECT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazymesh.core.model import Address

Key = tuple[bytes, Space]


@dataclass
class Store:
    """One etcd: its whole history, and how much of it the resolver has been told, key by key."""

    revision: int = 0
    history: list[KeyState] = field(default_factory=list)
    told: dict[Key, int] = field(default_factory=dict)

    def write(self, address: Address, space: Space, value: bytes | None) -> None:
        """Put or delete a key; deleting what is not there is no event."""
        if value is not None or self.value(address, space) is not None:
            self.revision += 1
            self.history.append(KeyState(address, space, value, self.revision))

    def of(self, address: Address, space: Space) -> list[KeyState]:
        """Return the events of one key."""
        return [state for state in self.history if (state.address, state.space) == (address, space)]

    def value(self, address: Address, space: Space, at: int | None = None) -> bytes | None:
        """Return what a key held at a revision, by default now."""
        values = [state.value for state in self.of(address, space) if at is None or state.as_of <= at]
        return values[-1] if values else None

    def snapshot(self, read: Read) -> tuple[KeyState, ...]:
        """Execute a read."""
        return tuple(
            KeyState(a, s, self.value(a, s), self.revision)
            for a, s in itertools.product(read.addresses, read.spaces)
        )

    def tell(self, states: Iterable[KeyState]) -> None:
        """Note what is about to be delivered."""
        for state in states:
            key = (state.address, state.space)
            self.told[key] = max(self.told.get(key, -1), state.as_of)

    def recent(self, address: Address, spaces: Iterable[Space]) -> set[bytes]:
        """Return what the keys held at, or since, the last time they were told of."""
        values = set()
        for space in spaces:
            told = self.told.get((address, space))
            if told is not None:
                values.add(self.value(address, space, told))
                values |= {state.value for state in self.of(address, space) if state.as_of > told}
        return values - {None}


@dataclass
class Cluster:
    """One cluster's stores, and where the shell stands with it."""

    name: str
    owner: Store = field(default_factory=Store)
    cache: Store = field(default_factory=Store)
    mirrored: int = 0
    joined: bool = True
    ready: bool = False
    reads: list[Read] = field(default_factory=list)
    executed: list[tuple[Store, Answered]] = field(default_factory=list)
    watches: dict[Key, tuple[Store, int]] = field(default_factory=dict)

    def store(self, space: Space) -> Store:
        """Return the store that holds the space's keys."""
        return self.cache if space is Space.CACHED else self.owner

    def mirror(self) -> None:
        """Copy the owner's next event into the cache; the pull-only space is not mirrored."""
        if self.mirrored < len(self.owner.history):
            state = self.owner.history[self.mirrored]
            self.mirrored += 1
            if state.space is Space.PUSHED:
                self.cache.write(state.address, Space.CACHED, state.value)

    def replace(self) -> None:
        """Start with new stores, which hold what the old ones did, and revisions that begin anew."""
        old, self.owner, self.cache, self.mirrored = self.owner, Store(), Store(), 0
        for address, space in itertools.product(sorted({s.address for s in old.history}), DIRECT):
            self.owner.write(address, space, old.value(address, space))

    def pending(self) -> list[tuple[Key, KeyState]]:
        """Return the watch events that are due, one for each key."""
        due = []
        for key, (store, after) in self.watches.items():
            if store is self.store(key[1]):
                due += [(key, state) for state in store.of(*key) if state.as_of > after][:1]
        return due
