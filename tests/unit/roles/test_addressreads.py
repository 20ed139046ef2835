"""Reads and watches of single addresses, with a store of a dict; losses of watches: in test_link."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from lazymesh.core import events, keys
from lazymesh.core.model import Space, parse_address
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Change
from lazymesh.roles import addressreads as module
from lazymesh.roles.addressreads import AddressReads
from lazymesh.roles.ownerstore import OwnerStore
from tests.support.etcd import eventually
from tests.support.fakestore import FakeClient

IP = parse_address("10.2.0.5")
READ = events.Read("b", (Space.PUSHED, Space.PULL_ONLY), (IP,))
KEYS = [b"cilium/state/ip/v1/default/10.2.0.5", b"cilium/state/ip/v1/ondemand/10.2.0.5"]


class Stage:
    """Reads of one cluster, its store, and the events they lead to."""

    def __init__(self) -> None:
        self.told: list[events.Event] = []
        self.store = FakeClient()
        owner = OwnerStore("b", None, None, lambda: None)
        self.reads = AddressReads("b", cast("Any", self.store), owner, self.told.append, lambda: None)


@pytest.fixture
def stage() -> Stage:
    """Return one without direct access to the owner's store."""
    return Stage()


async def settle() -> None:
    """Let tasks run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_read_is_answered_with_every_key(stage: Stage) -> None:
    """Absent keys too, all at the read's revision."""
    stage.store.data[KEYS[1]] = b"{}"
    stage.reads.read(READ)
    await settle()
    (answer,) = stage.told
    assert answer == events.Answered("b", READ.spaces, READ.addresses, (None, b"{}"), 7)


async def test_neighbours_are_read_by_what_their_keys_begin_with(stage: Stage) -> None:
    """In each space; what is read apart comes after them, in the request and in the answer."""
    pods = [
        parse_address(text)
        for text in ("10.2.0.5", "10.2.0.6", "10.2.1.5", "10.2.1.6", "10.2.1.7", "10.2.2.5")
    ]
    default, ondemand = keys.ip_prefix(Space.PUSHED, "b"), keys.ip_prefix(Space.PULL_ONLY, "b")
    stage.store.data = {
        default + b"10.2.1.5": b"{5}",
        ondemand + b"10.2.2.5": b"{2.5}",
        ondemand + b"10.2.0.6": b"{6}",
    }
    stage.reads.read(events.Read("b", READ.spaces, tuple(pods), (2, 3)))
    await settle()
    assert stage.store.asked is not None
    assert stage.store.asked.prefixes == [
        default + b"10.2.0.", ondemand + b"10.2.0.", default + b"10.2.1.", ondemand + b"10.2.1.",
    ]  # fmt: skip
    assert stage.store.asked.keys == [default + b"10.2.2.5", ondemand + b"10.2.2.5"]
    (answer,) = stage.told
    assert isinstance(answer, events.Answered)
    assert answer.addresses == tuple(pods)
    assert answer.values == (None, None, None, b"{6}", b"{5}", None, None, None, None, None, None, b"{2.5}")


async def test_too_much_in_a_neighbourhood_is_reported_as_such(stage: Stage) -> None:
    """The resolver then reads its addresses apart."""
    stage.store.error = KvstoreError("too much", "exhausted")
    stage.reads.read(events.Read("b", READ.spaces, (IP,), (1,)))
    await settle()
    assert stage.told == [events.ReadFailed("b", (IP,), "exhausted", whole=True)]


async def test_failed_read_is_answered_and_shown_until_one_succeeds(stage: Stage) -> None:
    """A refused one looks no different from outside, so status says why."""
    stage.store.error = KvstoreError("user 'remote' may not read it", "permission")
    stage.reads.read(READ)
    await settle()
    assert stage.told == [events.ReadFailed("b", (IP,), "permission")]
    assert stage.reads.problem == "user 'remote' may not read it"
    stage.store.error = None
    stage.reads.read(READ)
    await settle()
    assert stage.reads.problem is None


async def test_failed_read_is_not_reported_after_a_while(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a quiet node no other may come for hours, and nothing is wrong meanwhile."""
    monkeypatch.setattr(module, "READ_PROBLEM_S", 0.05)
    stage.store.error = KvstoreError("no answer in 5 s", "timeout")
    stage.reads.read(READ)
    await settle()
    assert stage.reads.problem == "no answer in 5 s"
    await eventually(lambda: stage.reads.problem is None)


async def test_change_of_a_watched_key_is_reported_until_it_is_unwatched(stage: Stage) -> None:
    """A neighbour's is not."""
    stage.reads.watch(events.Watch("b", READ.spaces, READ.addresses, 7))
    (_, listener, _) = stage.store.watches[2]
    changes = [Change(KEYS[1], None, 8), Change(KEYS[1] + b"5", b"{}", 9)]
    listener.on_changes(2, changes)
    assert stage.told == [events.Changed("b", events.KeyState(IP, Space.PULL_ONLY, None, 8))]
    stage.reads.unwatch(IP)
    assert stage.store.watches == {}
