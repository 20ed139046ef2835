"""One connection at a time: endpoints in turn, failures told at once, replaced stores noticed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.backoff import BackoffLimits
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.config import Endpoint, EtcdConfig
from lazymesh.kvstore.model import Connected, Disconnected
from lazymesh.kvstore.supervisor import Options, Supervisor
from tests.support.etcd import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from lazymesh.kvstore.model import ClientEvent

A, B = Endpoint("http", "a", 1), Endpoint("http", "b", 2)


class FakeConnection:
    """As much of a connection as the supervisor sees."""

    def __init__(self, endpoint: Endpoint, cluster_id: int, revision: int) -> None:
        self.endpoint, self.cluster_id, self.revision = endpoint, cluster_id, revision
        self.version = "3.4.23"
        self.heard_at = asyncio.get_running_loop().time()
        self.failure: KvstoreError | None = None
        self.on_down: Callable[[KvstoreError], None] | None = None
        self.hangs = False
        self.pings = 0
        self.closed = False
        self.agreed: int | None = revision
        """The revision that its cluster has; None: it is cut off from the others."""

    def fail(self, error: KvstoreError) -> None:
        """Go down."""
        self.failure = error
        if self.on_down:
            self.on_down(error)

    def check_up(self) -> None:
        """Raise why it is down."""
        if self.failure is not None:
            raise self.failure

    def check_channel(self) -> None:
        """Its channel is fine as long as nobody fails it."""

    async def ping(self, timeout_s: float) -> None:
        """Answer, unless the server hangs."""
        self.pings += 1
        if self.hangs:
            raise KvstoreError("no answer", "timeout")
        self.heard_at = asyncio.get_running_loop().time()

    async def catch_up(self) -> None:
        """Learn what the others have."""
        if self.agreed is None:
            raise KvstoreError("no leader", "timeout")
        self.revision = self.agreed

    async def close(self) -> None:
        """Take note."""
        self.closed = True


class FakeNet:
    """Endpoints by host: each the connection's store (cluster id, revision), or None while it is dead."""

    def __init__(self, **stores: tuple[int, int] | None) -> None:
        self.stores = stores
        self.dialled: list[str] = []
        self.leaving: set[str] = set()
        """Hosts that say with their first answer that they leave."""
        self.agreed: dict[str, int | None] = {}
        """What members learn from the others, where that is not what they have."""
        self.connections: list[FakeConnection] = []

    async def dial(self, endpoint: Endpoint, config: EtcdConfig, transport: object) -> FakeConnection:
        """Stand in for connection.dial."""
        await asyncio.sleep(0)
        self.dialled.append(endpoint.host)
        store = self.stores[endpoint.host]
        if store is None:
            raise KvstoreError(f"{endpoint} is dead")
        connection = FakeConnection(endpoint, *store)
        connection.agreed = self.agreed.get(endpoint.host, connection.revision)
        if endpoint.host in self.leaving:
            connection.fail(KvstoreError("the server leaves"))
        self.connections.append(connection)
        return connection


@asynccontextmanager
async def supervised(net: FakeNet, **options: float) -> AsyncIterator[tuple[Supervisor, list[ClientEvent]]]:
    """Run a supervisor over the fake net, with back-off too short to notice."""
    quick = Options(backoff=BackoffLimits(0.001, 0.001), **options)  # type: ignore[arg-type]
    supervisor = Supervisor(EtcdConfig((A, B)), quick, net.dial)  # type: ignore[arg-type]
    events: list[ClientEvent] = []
    supervisor.listeners.append(events.append)
    task = asyncio.create_task(supervisor.run())
    try:
        async with asyncio.timeout(5):
            yield supervisor, events
    finally:
        task.cancel()


async def test_server_that_leaves_with_its_first_answer_is_no_connection() -> None:
    """Nobody would be told of its end, which has been: whoever uses it would fail without end."""
    net = FakeNet(a=(7, 100), b=(7, 100))
    net.leaving = {"a"}
    async with supervised(net) as (supervisor, events):
        assert (await supervisor.connection(1)).endpoint is B
        assert net.connections[0].closed
        assert [type(event) for event in events] == [Connected]
        net.leaving = {"a", "b"}
        net.connections[1].fail(KvstoreError("it leaves, too"))
        await eventually(lambda: len(net.dialled) > 5)
        assert supervisor.present is None
        with pytest.raises(KvstoreError, match="the server leaves"):
            await supervisor.connection(1)


async def test_next_endpoint_is_tried_in_the_same_round() -> None:
    """A caller waits for the whole round: the first endpoint's death is not its business."""
    net = FakeNet(a=None, b=(7, 100))
    async with supervised(net) as (supervisor, events):
        connection = await supervisor.connection(1)
        assert connection.endpoint == B
        assert net.dialled == ["a", "b"]
        assert events == [Connected("http://b:2", 7, 100, reset=False)]
        assert supervisor.info.last_error == "http://a:1 is dead"


async def test_caller_learns_at_once_when_all_endpoints_are_dead() -> None:
    """During back-off nobody waits for a timeout to learn what is known already."""
    net = FakeNet(a=None, b=None)
    async with supervised(net) as (supervisor, _):
        with pytest.raises(KvstoreError, match="b:2 is dead"):
            await supervisor.connection(60)


async def test_lost_connection_is_told_and_the_next_endpoint_takes_over() -> None:
    """Its store has another cluster id, so everything known is void."""
    net = FakeNet(a=(7, 100), b=(8, 900))
    async with supervised(net) as (supervisor, events):
        first = await supervisor.wait_connected()
        error = KvstoreError("lost")
        first.fail(error)
        second = await supervisor.wait_connected()
        assert second.endpoint == B
        assert events[1:] == [Disconnected(error), Connected("http://b:2", 8, 900, reset=True)]
        assert (supervisor.epoch, supervisor.info.revision, supervisor.info.reconnects) == (1, 900, 1)


@pytest.mark.parametrize(("revision", "reset"), [(99, True), (100, False), (101, False)])
async def test_same_cluster_id_with_a_lower_revision_is_another_store(revision: int, reset: bool) -> None:
    """An etcd recreated with the same token keeps its cluster id, but not its history."""
    net = FakeNet(a=(7, 100), b=(7, revision))
    async with supervised(net) as (supervisor, events):
        (await supervisor.wait_connected()).fail(KvstoreError("lost"))
        await supervisor.wait_connected()
        last = events[-1]
        assert isinstance(last, Connected)
        assert last.reset is reset


async def test_member_that_is_behind_catches_up_and_is_no_other_store() -> None:
    """It slept while the others went on: what it would answer from its own state is older than what we know."""
    net = FakeNet(a=(7, 100), b=(7, 60))
    net.agreed["b"] = 101
    async with supervised(net) as (supervisor, events):
        (await supervisor.wait_connected()).fail(KvstoreError("lost"))
        await supervisor.wait_connected()
        assert events[-1] == Connected("http://b:2", 7, 101, reset=False)


async def test_member_that_is_behind_and_cut_off_is_not_believed() -> None:
    """Another one is asked; it would tell records that were true once."""
    net = FakeNet(a=(7, 100), b=(7, 60))
    net.agreed["b"] = None
    async with supervised(net) as (supervisor, events):
        (await supervisor.wait_connected()).fail(KvstoreError("lost"))
        assert (await supervisor.wait_connected()).endpoint == A
        assert net.dialled[:3] == ["a", "b", "a"]
        assert net.connections[1].closed
        assert events[-1] == Connected("http://a:1", 7, 100, reset=False)


async def test_silent_server_is_asked_and_given_up_when_it_does_not_answer() -> None:
    """A stopped process keeps its connections open; only asking tells."""
    net = FakeNet(a=(7, 100), b=(8, 1))
    async with supervised(net, silence_s=0.01) as (supervisor, events):
        await supervisor.wait_connected()
        first = net.connections[0]
        await eventually(lambda: first.pings >= 2)
        assert supervisor.info.endpoint == "http://a:1"
        first.hangs = True
        await eventually(lambda: len(events) >= 2)
        assert isinstance(events[1], Disconnected)
        assert events[1].error.kind == "timeout"


async def test_suspicion_has_the_server_asked_without_waiting_for_silence() -> None:
    """A timed-out read must not need another quarter of a minute to be believed."""
    net = FakeNet(a=(7, 100), b=(7, 100))
    async with supervised(net, silence_s=1000) as (supervisor, _):
        connection = await supervisor.wait_connected()
        supervisor.suspect(connection)
        await eventually(lambda: net.connections[0].pings)
        assert net.connections[0].failure is None
