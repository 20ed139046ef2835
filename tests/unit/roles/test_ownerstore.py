"""A cluster's own store behind a cache, and what reads make of its state."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from lazymesh.core import events, keys
from lazymesh.core.model import Space, parse_address
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Connected
from lazymesh.roles import ownerstore as module
from lazymesh.roles.addressreads import AddressReads
from lazymesh.roles.ownerstore import OwnerStore
from tests.support.etcd import eventually
from tests.support.fakestore import FakeClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

IP = parse_address("10.2.0.5")
READ = events.Read("b", (Space.PUSHED, Space.PULL_ONLY), (IP,))


class Owned:
    """A local cache, with the owner's store apart."""

    def __init__(self) -> None:
        self.told: list[events.Event] = []
        self.replaced = 0
        self.etcd = FakeClient()
        self.store = OwnerStore("b", cast("Any", self.etcd), None, self.on_replaced)
        self.reads = AddressReads("b", cast("Any", FakeClient()), self.store, self.told.append, lambda: None)
        self.running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch over the store."""
        self.running = asyncio.create_task(self.store.run())

    def on_replaced(self) -> None:
        """Count."""
        self.replaced += 1

    def describe(self) -> None:
        """Let the owner's store be complete."""
        key = keys.cluster_config_key("b")
        self.etcd.data[key] = b'{"id":2,"capabilities":{"maxConnectedClusters":255}}'


@pytest.fixture
async def owned(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Owned]:
    """Return one that is not watched over yet."""
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    made = Owned()
    yield made
    if made.running is not None:
        assert not made.running.done()
        made.running.cancel()
        await asyncio.gather(made.running, return_exceptions=True)


async def settle() -> None:
    """Let tasks run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_owners_store_is_trusted_only_when_it_is_complete(owned: Owned) -> None:
    """One that has just come back empty would have every entry removed that the cache does not hold."""
    owned.start()
    owned.reads.read(READ)
    await settle()
    assert owned.told == [events.ReadFailed("b", (IP,), "owner")]
    assert owned.store.problem == "no cluster-config in its store yet"
    owned.reads.read(events.Read("b", (Space.CACHED,), (IP,)))
    owned.describe()
    await eventually(lambda: owned.store.complete)
    assert owned.store.problem is None
    owned.reads.read(READ)
    await settle()
    assert [type(event) for event in owned.told[1:]] == [events.Answered, events.Answered]


@pytest.mark.parametrize(
    ("error", "config", "problem"),
    [
        (KvstoreError("no such host"), None, "no such host"),
        (KvstoreError("user 'x' may not read it", "permission"), None, "user 'x' may not read it"),
        (None, b"{", "its cluster-config is malformed"),
        (None, b'{"id":2,"capabilities":{"syncedCanaries":true}}', "no cilium/synced/b/"),
    ],
)
async def test_owners_store_that_is_not_watched_says_why(
    owned: Owned, error: KvstoreError | None, config: bytes | None, problem: str
) -> None:
    """Once in the log, however often it is checked; a read that fails because of it adds nothing."""
    owned.etcd.error = error
    if config is not None:
        owned.etcd.data[keys.cluster_config_key("b")] = config
    with capture_logs() as logs:
        owned.start()
        await eventually(lambda: problem in (owned.store.problem or ""))
        owned.reads.read(READ)
        await asyncio.sleep(0.05)
        owned.etcd.error = None
        owned.describe()
        await eventually(lambda: owned.store.problem is None)
    assert owned.told == [events.ReadFailed("b", (IP,), "owner")]
    assert owned.reads.problem is None
    assert [each["event"] for each in logs] == [
        "not watching the cluster's own etcd",
        "watching the cluster's own etcd",
    ]
    assert problem in logs[0]["problem"]


async def test_owners_store_that_is_lost_says_why_it_does_not_come_back(owned: Owned) -> None:
    """The latest reason: by now its name may be gone, too. Without such a store there is no problem."""
    owned.describe()
    owned.start()
    await eventually(lambda: owned.store.complete)
    for error in ("the connection was lost", "no such host"):
        owned.etcd.last_error = error
        assert owned.store.problem == error
    owned.etcd.error = KvstoreError("no such host")
    owned.reads.read(READ)
    await settle()
    assert owned.told == [events.ReadFailed("b", (IP,), "owner")]
    assert owned.reads.problem is None
    owned.etcd.last_error = None
    assert owned.store.problem is None
    owned.reads.read(READ)
    await settle()
    assert owned.told[1:] == [events.ReadFailed("b", (IP,), "unavailable")]
    assert owned.reads.problem == "no such host"
    assert OwnerStore("b", None, None, lambda: None).problem is None


async def test_owners_store_that_is_replaced_again_and_again_is_reported_once(owned: Owned) -> None:
    """When it is complete, however often that took."""
    owned.describe()
    owned.start()
    await eventually(lambda: owned.store.complete)
    owned.etcd.data.clear()
    for _ in range(4):
        owned.store._on_event(Connected("e", 7, 1, reset=True))
    assert not owned.store.complete
    await asyncio.sleep(0.05)
    assert owned.replaced == 0
    owned.describe()
    await eventually(lambda: owned.store.complete)
    await asyncio.sleep(0.05)
    assert owned.replaced == 1
