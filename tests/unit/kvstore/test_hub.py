"""Which servers' reports on all watches may move them along, and servers that end every stream at once."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core.backoff import BackoffLimits
from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import hub as hub_module
from lazymesh.kvstore.hub import TAKE_UP_S, WatchHub, reports_are_ordered
from lazymesh.kvstore.resume import MOST_PENDING, Ended
from lazymesh.kvstore.supervisor import Options
from lazymesh.tasks import PIECE
from tests.support.etcd import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Sequence

    from lazymesh.kvstore.model import Change, WatchLoss


@pytest.mark.parametrize(
    ("version", "ordered"),
    [
        ("3.4.23", False),
        ("3.4.25", True),
        ("3.5.0", False),
        ("3.5.7", False),
        ("3.5.8", True),
        ("3.5.21", True),
        ("3.6.0-rc.1", True),
        ("", False),
    ],
)
def test_report_on_all_watches_is_believed_from_the_fixed_versions_on(version: str, ordered: bool) -> None:
    """Before, it overtakes events (etcd issue 15220)."""
    assert reports_are_ordered(version) is ordered


class Refusing:
    """A connection on which a stream ends as soon as it is opened: with an error, or by a refusal of the token."""

    version, login, login_at = "3.4.23", (), None

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.streams = 0
        self.peer: Any = None

    async def stream(self, _method: object, _requests: object, _what: object) -> AsyncGenerator[Any, None]:
        """End it."""
        self.streams += 1
        if self.fails:
            raise KvstoreError("it leaves")
        yield pb.WatchResponse(watch_id=1, created=True, canceled=True, cancel_reason="invalid auth token")

    async def renew_login(self, _login: object) -> None:
        """Get a token that is no better."""

    def fail(self, error: KvstoreError) -> None:
        """Be down already."""


class Scripted:
    """A connection whose streams say what the test puts in, and keep what they are asked."""

    version, login, login_at = "3.4.23", (), None

    def __init__(self) -> None:
        self.peer: Any = None
        self.failed: list[str] = []
        self.asked: list[list[pb.WatchRequest]] = []
        self.says: asyncio.Queue[pb.WatchResponse | None] = asyncio.Queue()

    async def stream(
        self, _method: object, requests: AsyncIterable[pb.WatchRequest], _what: object
    ) -> AsyncGenerator[Any, None]:
        """Run one; None ends it."""
        asked: list[pb.WatchRequest] = []
        self.asked.append(asked)

        async def take() -> None:
            async for request in requests:
                asked.append(request)  # noqa: PERF401 (they come one by one)

        taking = asyncio.create_task(take())
        try:
            while (response := await self.says.get()) is not None:
                yield response
        finally:
            taking.cancel()
        raise KvstoreError("it leaves")

    def fail(self, error: KvstoreError) -> None:
        """Be down."""
        self.failed.append(str(error))

    async def told(self, response: pb.WatchResponse | None = None) -> None:
        """Say something, and let it be heard."""
        if response is not None:
            self.says.put_nowait(response)
        for _ in range(20):
            await asyncio.sleep(0)


class Told:
    """A listener that writes down what it is told, and does something at the first changes."""

    def __init__(self, at_changes: Callable[[], None] = lambda: None) -> None:
        self.changes: list[bytes] = []
        self.lost: list[str] = []
        self.at_changes = at_changes

    def on_live(self, watch_id: int, revision: int) -> None:
        """It is."""

    def on_changes(self, watch_id: int, changes: Sequence[Change]) -> None:
        """Write them down."""
        self.changes += [change.key for change in changes]
        self.at_changes()

    def on_lost(self, watch_id: int, loss: WatchLoss) -> None:
        """Write it down."""
        self.lost.append(loss.kind)


@asynccontextmanager
async def hub_of(connection: Scripted, first: Told | None = None, **options: Any) -> AsyncIterator[WatchHub]:
    """Run a hub with one watch, whose id is 1 and which is asked for."""

    class Supervisor:
        listeners: list[object] = []  # noqa: RUF012 (a stand-in)

        async def wait_connected(self) -> Scripted:
            return connection

    hub = WatchHub(cast("Any", Supervisor()), Options(jitter=lambda: 1.0, **options))
    hub.add(b"a", first or Told(), 5)
    running = asyncio.create_task(hub.run())
    await connection.told()
    try:
        yield hub
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def created(watch_id: int) -> pb.WatchResponse:
    """Return the word that a watch is taken up."""
    return pb.WatchResponse(watch_id=watch_id, created=True, header=pb.ResponseHeader(revision=4))


class NoPeer(SimpleNamespace):
    """Says errors as a peer would."""

    def error(self, *words: str) -> KvstoreError:
        """Return one."""
        return KvstoreError(" ".join(words))


def events(watch_id: int, count: int, value: bytes = b"", *, fragment: bool = False) -> pb.WatchResponse:
    """Return changes of so many keys."""
    changed = [
        pb.Event(kv=pb.KeyValue(key=b"%03d" % number, value=value, mod_revision=5)) for number in range(count)
    ]
    return pb.WatchResponse(watch_id=watch_id, events=changed, fragment=fragment)


def cancelled(connection: Scripted) -> list[int]:
    """Return the watches that the server was asked to end, on the last stream."""
    requests = connection.asked[-1]
    return [each.cancel_request.watch_id for each in requests if each.HasField("cancel_request")]


def asked_for(connection: Scripted) -> list[bytes]:
    """Return the keys that were asked for on the last stream."""
    return [each.create_request.key for each in connection.asked[-1] if each.HasField("create_request")]


async def test_watch_that_is_removed_is_ended_at_the_server_if_it_was_asked_for() -> None:
    """Else the server would go on telling; and what was removed within the moment is not asked for at all."""
    connection = Scripted()
    async with hub_of(connection) as hub:
        fresh = hub.add(b"b", Told(), 5)
        kept = hub.add(b"c", Told(), 5)
        hub.remove(fresh)
        hub.remove(1)
        hub.remove(99)
        await asyncio.sleep(2 * TAKE_UP_S)
        assert asked_for(connection) == [b"a", b"c"]
        assert cancelled(connection) == [1]
        hub.remove(kept)
        await connection.told()
        assert cancelled(connection) == [1, kept]


async def test_watches_that_are_added_while_there_is_no_stream_wait_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of them are asked for once."""
    connection = Scripted()
    async with hub_of(connection, backoff=BackoffLimits(4 * TAKE_UP_S, 1.0)) as hub:
        connection.says.put_nowait(None)
        await connection.told()
        hub.add(b"b", Told(), 5)
        hub.remove(1)
        await asyncio.sleep(2 * TAKE_UP_S)
        assert len(connection.asked) == 1
        assert connection.failed == ["it leaves"]
        await eventually(lambda: len(connection.asked) > 1)
        await asyncio.sleep(2 * TAKE_UP_S)
        assert asked_for(connection) == [b"b"]
    assert caplog.records == []


async def test_watch_that_is_removed_while_its_changes_are_told_hears_no_more_of_them() -> None:
    """There may be thousands: they are told piece by piece."""
    connection = Scripted()
    async with hub_of(connection) as hub:
        told = Told()
        number = hub.add(b"b", told, 5, prefix=True)
        told.at_changes = lambda: hub.remove(number)
        await asyncio.sleep(2 * TAKE_UP_S)
        await connection.told(created(1))
        await connection.told(created(number))
        await connection.told(events(number, 3 * PIECE))
        assert told.changes == [b"000"]


async def test_key_that_goes_and_comes_among_many_is_told_as_it_is_in_the_end() -> None:
    """In pieces it would be gone for a moment; of a few, all are told."""
    connection = Scripted()
    async with hub_of(connection) as hub:
        told = Told()
        number = hub.add(b"b", told, 5, prefix=True)
        await asyncio.sleep(2 * TAKE_UP_S)
        await connection.told(created(1))
        await connection.told(created(number))
        for count, most in ((PIECE // 2, PIECE), (PIECE, PIECE)):
            twice = events(number, count)
            twice.MergeFrom(pb.WatchResponse(events=twice.events))
            await connection.told(twice)
            assert len(told.changes) == most
            told.changes.clear()


@pytest.mark.parametrize(
    ("reason", "refused", "age_s", "stale"),
    [
        ("permission denied", True, 11, True),
        ("permission denied", True, 9, False),
        ("permission denied", True, None, False),
        ("invalid auth token", True, 0, True),
        ("revision of auth store is old", True, 0, True),
        ("etcdserver: no leader", False, 11, False),
        ("invalid auth token", False, 11, False),
    ],
)
async def test_refusal_is_taken_for_what_it_says_while_the_token_is_young(
    reason: str, refused: bool, age_s: float | None, stale: bool
) -> None:
    """Etcd 3.4 says the same of an expired one; what was taken up once was not refused."""
    async with hub_of(Scripted()) as hub:
        ended = Ended(cast("Any", None), reason, refused=refused)
        login_at = None if age_s is None else time.monotonic() - age_s
        assert hub._token_may_be_stale(ended, login_at) is stale


@pytest.mark.parametrize(
    ("reason", "taken_up", "kind"),
    [
        ("etcdserver: permission denied", False, "permission"),
        ("etcdserver: duplicate watch ID", False, "cancelled"),
        ("etcdserver: permission denied", True, "cancelled"),
    ],
)
async def test_loss_is_told_by_its_kind(reason: str, taken_up: bool, kind: str) -> None:
    """Only a creation is refused for want of permission."""
    connection = Scripted()
    connection.peer = NoPeer()
    told = Told()
    async with hub_of(connection, told):
        if taken_up:
            await connection.told(created(1))
        await connection.told(
            pb.WatchResponse(watch_id=1, created=not taken_up, canceled=True, cancel_reason=reason)
        )
        assert told.lost == [kind]


async def test_server_whose_reports_overtake_events_is_not_asked_for_any() -> None:
    """What is not asked for on all watches comes for each of them, in order."""
    connection = Scripted()
    async with hub_of(connection, progress_s=0.001):
        await asyncio.sleep(0.02)
        assert not any(each.HasField("progress_request") for each in connection.asked[0])


async def test_watch_whose_response_has_no_end_is_ended_by_us() -> None:
    """It is read anew, and the server has to be told; not so of one that the server itself has ended."""
    connection = Scripted()
    connection.peer = NoPeer()
    async with hub_of(connection) as hub:
        told = Told()
        number = hub.add(b"b", told, 5, prefix=True)
        await asyncio.sleep(2 * TAKE_UP_S)
        await connection.told(created(1))
        await connection.told(created(number))
        for _ in range(3):
            await connection.told(events(number, 2, bytes(MOST_PENDING // 5), fragment=True))
        assert (told.lost, cancelled(connection)) == (["cancelled"], [number])
        await connection.told(pb.WatchResponse(watch_id=1, canceled=True))
        assert (len(hub), cancelled(connection)) == (0, [number])


async def test_stream_that_has_ended_asks_for_no_more_reports() -> None:
    """Each has its own clock, which ends with it."""
    connection = Scripted()
    connection.version = "3.5.21"
    async with hub_of(connection, progress_s=0.005, backoff=BackoffLimits(0.001, 0.001)):
        connection.says.put_nowait(None)
        await eventually(lambda: len(connection.asked) > 1 and len(connection.asked[1]) >= 3)
        assert connection.asked[1][-1].HasField("progress_request")
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert names.count("etcd watch progress") == 1


async def test_stream_that_lasted_starts_the_pauses_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed long ago is no reason to wait."""
    connection, now, pauses = Scripted(), [0.0], []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        if seconds >= 0.25:
            pauses.append(seconds)
        await sleep(0)

    async with hub_of(connection):
        monkeypatch.setattr(hub_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(asyncio, "sleep", pause)
        for lasted in (0.0, 0.0, 4.9, 5.0, 0.0, 0.0):
            now[0] += lasted
            connection.says.put_nowait(None)
            await connection.told()
    assert pauses == [0.25, 0.5, 1.0, 0.25, 0.5]


@pytest.mark.parametrize("fails", [True, False], ids=["error", "refusal"])
async def test_server_that_ends_each_stream_at_once_is_not_asked_without_end(fails: bool) -> None:
    """The event loop would belong to that one store, or half a processor."""
    connection = Refusing(fails=fails)

    class Supervisor:
        listeners: list[object] = []  # noqa: RUF012 (a stand-in)

        async def wait_connected(self) -> Refusing:
            return connection

    hub = WatchHub(cast("Any", Supervisor()), Options(jitter=lambda: 1.0))
    hub.add(b"a", cast("Any", None), 5)
    running = asyncio.create_task(hub.run())
    await asyncio.sleep(0.9)
    assert not running.done()
    assert 2 <= connection.streams <= 3, "the second comes after 0.25 s, the third after half a second more"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
