"""One cluster's link, with a store of a dict."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from lazymesh.core import events, keys
from lazymesh.core.model import Space, parse_address
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.model import Change, ClientInfo, Connected, KeyValue, ReadResult, Values, WatchLoss
from lazymesh.roles import link as module
from lazymesh.roles.link import ClusterLink, LinkConfig
from tests.support.etcd import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.kvstore.requests import Reads

IP = parse_address("10.2.0.5")
READ = events.Read("b", (Space.PUSHED, Space.PULL_ONLY), (IP,))
KEYS = [b"cilium/state/ip/v1/default/10.2.0.5", b"cilium/state/ip/v1/ondemand/10.2.0.5"]


class FakeWatches(dict[int, Any]):
    """Watches by id."""

    def add(self, key: bytes, listener: object, start: int, **_: object) -> int:
        """Remember one."""
        self[len(self) + 1] = (key, listener, start)
        return len(self)

    def remove(self, watch_id: int) -> None:
        """Forget one."""
        self.pop(watch_id, None)


class FakeClient:
    """A store of a dict; ``error`` fails every read."""

    def __init__(self, _config: object, _options: object) -> None:
        self.data: dict[bytes, bytes] = {}
        self.error: KvstoreError | None = None
        self.watches = FakeWatches()
        self.asked: Reads | None = None
        self.epoch = 0
        self.last_error: str | None = None
        self.on_crash: object = None

    @property
    def info(self) -> ClientInfo:
        """Say whether it is reached: while ``last_error`` is set, it is not."""
        endpoint = None if self.last_error else "http://x:1"
        return ClientInfo(endpoint, 7, 7, 0, self.last_error)

    def read_soon(self, reads: Reads, timeout: float, on_done: Any) -> None:
        """Read, and answer a moment later."""
        self.asked = reads
        within = [prefix + name for one in reads.whole for name in one.names for prefix in one.prefixes]
        values = Values(7, tuple(map(self.data.get, [*within, *reads.keys])))
        asyncio.get_running_loop().call_soon(on_done, self.error or values)

    async def read_many(self, keys: Sequence[bytes], _timeout: float = 0) -> ReadResult:
        """Read."""
        if self.error:
            raise self.error
        return self._read(keys)

    def _read(self, keys: Sequence[bytes]) -> ReadResult:
        found = [KeyValue(key, self.data[key], 3, 0) if key in self.data else None for key in keys]
        return ReadResult(7, found)

    async def get(self, key: bytes) -> KeyValue | None:
        """Read one."""
        return (await self.read_many([key])).values[0]

    def add_listener(self, listener: object) -> None:
        """Nobody is told."""

    def remove_listener(self, listener: object) -> None:
        """Nobody was told."""

    async def wait_connected(self) -> None:
        """Never be, so that nobody lists anything."""
        await asyncio.Event().wait()

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""


class Observer:
    """Remembers events; refuses clusters if told to."""

    def __init__(self) -> None:
        self.told: list[events.Event] = []
        self.refusal: str | None = None

    def on_event(self, event: events.Event) -> None:
        """Remember."""
        self.told.append(event)

    def on_config(self, *_: object) -> str | None:
        """Judge."""
        return self.refusal

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


class Stage:
    """A link, its store and its observer."""

    def __init__(self) -> None:
        self.observer = Observer()
        config = LinkConfig("b", parse_config("endpoints: ['http://x:1']", "b"))
        self.link = ClusterLink(config, cast("Any", self.observer))
        self.store = cast("FakeClient", self.link.client)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A link that was not started."""
    monkeypatch.setattr(module, "EtcdClient", FakeClient)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    return Stage()


async def settle() -> None:
    """Let tasks run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_read_is_answered_with_every_key(stage: Stage) -> None:
    """Absent keys too, all at the read's revision."""
    stage.store.data[KEYS[1]] = b"{}"
    stage.link.read(READ)
    await settle()
    (answer,) = stage.observer.told
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
    stage.link.read(events.Read("b", READ.spaces, tuple(pods), (2, 3)))
    await settle()
    assert stage.store.asked is not None
    assert stage.store.asked.prefixes == [
        default + b"10.2.0.", ondemand + b"10.2.0.", default + b"10.2.1.", ondemand + b"10.2.1.",
    ]  # fmt: skip
    assert stage.store.asked.keys == [default + b"10.2.2.5", ondemand + b"10.2.2.5"]
    (answer,) = stage.observer.told
    assert isinstance(answer, events.Answered)
    assert answer.addresses == tuple(pods)
    assert answer.values == (None, None, None, b"{6}", b"{5}", None, None, None, None, None, None, b"{2.5}")


async def test_too_much_in_a_neighbourhood_is_told_as_such(stage: Stage) -> None:
    """The resolver then reads its addresses apart."""
    stage.store.error = KvstoreError("too much", "exhausted")
    stage.link.read(events.Read("b", READ.spaces, (IP,), (1,)))
    await settle()
    assert stage.observer.told == [events.ReadFailed("b", (IP,), "exhausted", whole=True)]


async def test_failed_read_is_answered_and_shown_until_one_succeeds(stage: Stage) -> None:
    """A refused one looks no different from outside, so status says why."""
    stage.store.error = KvstoreError("user 'remote' may not read it", "permission")
    stage.link.read(READ)
    await settle()
    assert stage.observer.told == [events.ReadFailed("b", (IP,), "permission")]
    assert stage.link.read_problem == "user 'remote' may not read it"
    stage.store.error = None
    stage.link.read(READ)
    await settle()
    assert stage.link.read_problem is None


async def test_failed_read_is_told_no_more_after_a_while(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a quiet node no other may come for hours, and nothing is wrong meanwhile."""
    monkeypatch.setattr(module, "READ_PROBLEM_S", 0.05)
    stage.store.error = KvstoreError("no answer in 5 s", "timeout")
    stage.link.read(READ)
    await settle()
    assert stage.link.read_problem == "no answer in 5 s"
    await eventually(lambda: stage.link.read_problem is None)


async def test_exception_of_ours_ends_the_link_and_not_the_watches(stage: Stage) -> None:
    """The hub that calls is shared by all watches of the store."""

    def fail(_event: events.Event) -> None:
        raise RuntimeError("a bug")

    running = asyncio.create_task(stage.link.run())
    await settle()
    stage.observer.on_event = fail  # type: ignore[method-assign]
    stage.link.watch(events.Watch("b", READ.spaces, READ.addresses, 7))
    stage.store.watches[1][1].on_changes(1, [Change(KEYS[0], b"{}", 8)])
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(running, 2)


async def test_lost_key_watches_are_collected_into_one_reset(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that was replaced tells so itself."""
    monkeypatch.setattr(module, "REWATCH_S", 0.01)
    addresses = tuple(parse_address(f"10.2.{number}.1") for number in range(3))
    stage.link.watch(events.Watch("b", (Space.PUSHED,), addresses, 7))
    assert (stage.link.watched_keys, stage.link.watched_ranges) == (3, 3)
    assert stage.store.watches[1][2] == 8, "from the revision after the read"
    for number in (1, 2):
        stage.store.watches.pop(number)[1].on_lost(number, WatchLoss("compacted", KvstoreError("x")))
    await eventually(lambda: stage.observer.told)
    await settle()
    assert stage.observer.told == [events.StoreReset("b")]
    assert (stage.link.watched_keys, stage.store.watches) == (0, {})


async def test_change_of_a_watched_key_is_told_until_it_is_watched_no_more(stage: Stage) -> None:
    """A neighbour's is not."""
    stage.link.watch(events.Watch("b", READ.spaces, READ.addresses, 7))
    (_, listener, _) = stage.store.watches[2]
    changes = [Change(KEYS[1], None, 8), Change(KEYS[1] + b"5", b"{}", 9)]
    listener.on_changes(2, changes)
    assert stage.observer.told == [events.Changed("b", events.KeyState(IP, Space.PULL_ONLY, None, 8))]
    stage.link.unwatch(IP)
    assert stage.store.watches == {}


@pytest.mark.parametrize(
    ("config", "state", "words"),
    [
        (None, "incomplete", "no cluster-config"),
        (b"{", "refused", "malformed"),
        (b'{"id":2}', "refused", "not welcome"),
        (b'{"id":2,"capabilities":{"syncedCanaries":true}}', "incomplete", "no cilium/synced/b/"),
    ],
)
async def test_store_is_believed_only_when_it_is_complete(
    stage: Stage, config: bytes | None, state: str, words: str
) -> None:
    """Until then the link says what it waits for."""
    if words == "not welcome":
        stage.observer.refusal = words
    if config is not None:
        stage.store.data[b"cilium/cluster-config/b"] = config
    assert await stage.link._complete() is None
    assert (stage.link.state, stage.link.tried) == (state, True)
    assert words in (stage.link.problem or "")


class Followed:
    """A prefix that is followed."""

    def __len__(self) -> int:
        return 1


async def test_prefix_that_is_listed_again_makes_the_cluster_ready_again(stage: Stage) -> None:
    """The other one's watch is as live as before, and tells nothing."""
    link = stage.link
    link.nodes_prefix, link.identities_prefix = b"nodes/", b"ids/"
    link._followers = cast("Any", [Followed(), Followed()])
    link.on_prefix_synced(b"nodes/")
    assert link.state != "ready"
    link.on_prefix_synced(b"ids/")
    assert link.state == "ready"
    link.on_prefix_silent(b"nodes/", KvstoreError("the watch is compacted"))
    assert (link.state, link.problem) == ("silent", "the watch is compacted")
    link.on_prefix_synced(b"nodes/")
    assert (link.state, link.problem) == ("ready", None)


@pytest.mark.parametrize(
    ("value", "stale"),
    [
        (b'{"id":2,"capabilities":{"maxConnectedClusters":255}}', False),
        (b'{"capabilities": {"maxConnectedClusters": 255}, "id": 2}', False),
        (b'{"id":3,"capabilities":{"maxConnectedClusters":255}}', True),
        (b"{", True),
        (None, False),
    ],
    ids=["again", "in other words", "another id", "malformed", "gone"],
)
async def test_cluster_that_describes_itself_differently_is_begun_anew(
    stage: Stage, value: bytes | None, stale: bool
) -> None:
    """A kvstoremesh writes the key in place, every few minutes, and when it has changed."""
    key = keys.cluster_config_key("b")
    stage.store.data[key] = b'{"id":2,"capabilities":{"maxConnectedClusters":255}}'
    described = await stage.link._complete()
    assert described is not None
    following = asyncio.create_task(stage.link._follow(*described))
    await settle()
    stage.link.state = "ready"
    ((watched, listener, start),) = [each for each in stage.store.watches.values() if each[0] == key]
    assert (watched, start) == (key, 8)
    listener.on_changes(1, [Change(key, value, 8)])
    assert stage.link._stale.is_set() is stale
    if stale:
        await asyncio.wait_for(following, 1)
        # Until it is judged anew, which may be a refusal, nothing is resolved by what it was.
        assert stage.link.state == "silent"
        assert stage.observer.told == [events.StoreReset("b")]
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert not stage.store.watches


class Owned(Stage):
    """A link to a local cache, with the owner's store apart."""

    def __init__(self) -> None:
        self.observer = Observer()
        config = parse_config("endpoints: ['http://x:1']", "b")
        self.link = ClusterLink(LinkConfig("b", config, config), cast("Any", self.observer))
        self.store = cast("FakeClient", self.link.client)
        self.owner = cast("FakeClient", self.link._remote)

    def describe(self) -> None:
        """Let the owner's store be complete."""
        key = keys.cluster_config_key("b")
        self.owner.data[key] = b'{"id":2,"capabilities":{"maxConnectedClusters":255}}'


@pytest.fixture
def owned(stage: Stage) -> Owned:
    """Such a link that was not started."""
    return Owned()


async def test_owners_store_is_believed_only_when_it_is_complete(owned: Owned) -> None:
    """One that has just come back empty would have every entry taken out that the cache does not have."""
    owned.link._await_owner(cast("Any", owned.owner), again=False)
    owned.link.read(READ)
    await settle()
    assert owned.observer.told == [events.ReadFailed("b", (IP,), "owner")]
    assert owned.link.owner_problem == "no cluster-config in its store yet"
    owned.link.read(events.Read("b", (Space.CACHED,), (IP,)))
    owned.describe()
    await eventually(lambda: owned.link._owner_complete)
    assert owned.link.owner_problem is None
    owned.link.read(READ)
    await settle()
    assert [type(event) for event in owned.observer.told[1:]] == [events.Answered, events.Answered]


@pytest.mark.parametrize(
    ("error", "config", "problem"),
    [
        (KvstoreError("no such host"), None, "no such host"),
        (KvstoreError("user 'x' may not read it", "permission"), None, "user 'x' may not read it"),
        (None, b"{", "its cluster-config is malformed"),
        (None, b'{"id":2,"capabilities":{"syncedCanaries":true}}', "no cilium/synced/b/"),
    ],
)
async def test_owners_store_that_is_not_followed_says_why(
    owned: Owned, error: KvstoreError | None, config: bytes | None, problem: str
) -> None:
    """Once in the log, however often it is looked at; a read that fails for it has nothing to add."""
    owned.owner.error = error
    if config is not None:
        owned.owner.data[keys.cluster_config_key("b")] = config
    with capture_logs() as logs:
        owned.link._await_owner(cast("Any", owned.owner), again=False)
        await eventually(lambda: problem in (owned.link.owner_problem or ""))
        owned.link.read(READ)
        await asyncio.sleep(0.05)
        owned.owner.error = None
        owned.describe()
        await eventually(lambda: owned.link.owner_problem is None)
        await eventually(lambda: not owned.link._tasks)
    assert owned.observer.told == [events.ReadFailed("b", (IP,), "owner")]
    assert owned.link.read_problem is None
    assert [each["event"] for each in logs] == [
        "the owner's store is not followed",
        "the owner's store is followed",
    ]
    assert problem in logs[0]["problem"]


async def test_owners_store_that_goes_says_why_it_does_not_come_back(owned: Owned) -> None:
    """The latest reason: by now its name may be gone, too. Without one there is nothing to tell."""
    owned.describe()
    owned.link._await_owner(cast("Any", owned.owner), again=False)
    await eventually(lambda: owned.link._owner_complete)
    for error in ("the connection was lost", "no such host"):
        owned.owner.last_error = error
        assert owned.link.owner_problem == error
    owned.owner.error = KvstoreError("no such host")
    owned.link.read(READ)
    await settle()
    assert owned.observer.told == [events.ReadFailed("b", (IP,), "owner")]
    assert owned.link.read_problem is None
    owned.owner.last_error = None
    assert owned.link.owner_problem is None
    owned.link.read(READ)
    await settle()
    assert owned.observer.told[1:] == [events.ReadFailed("b", (IP,), "unavailable")]
    assert owned.link.read_problem == "no such host"
    assert Stage().link.owner_problem is None


@pytest.mark.parametrize("cached", [True, False])
async def test_owner_that_cannot_be_asked_at_all_is_as_good_as_down(stage: Stage, cached: bool) -> None:
    """Behind a cache, which would else deny that the owner has what it has not; a store that is no cache is asked."""
    primary = parse_config("endpoints: ['http://x:1']", "b")
    link = ClusterLink(LinkConfig("b", primary, remote_error="not YAML"), cast("Any", stage.observer))
    spaces: list[tuple[tuple[Space, ...], ...]] = []
    stage.observer.on_config = lambda *told: spaces.append(told[2])  # type: ignore[method-assign, func-returns-value]
    description = {"id": 2, "capabilities": {"maxConnectedClusters": 255, "cached": cached}}
    cast("FakeClient", link.client).data[keys.cluster_config_key("b")] = json.dumps(description).encode()
    assert await link._complete() is not None
    assert spaces == [((Space.CACHED,), *module.DIRECT) if cached else module.DIRECT]
    link.read(READ)
    await settle()
    (event,) = stage.observer.told
    assert event == (
        events.ReadFailed("b", (IP,), "owner")
        if cached
        else events.Answered("b", READ.spaces, READ.addresses, (None, None), 7)
    )
    assert (link.owner_problem, link.read_problem) == ("not YAML", None)


async def test_owners_store_that_is_replaced_again_and_again_is_asked_by_one(owned: Owned) -> None:
    """And everything is read once more when it is complete, however often that took."""
    for _ in range(4):
        owned.link._on_remote_event(Connected("e", 7, 1, reset=True))
    assert len(owned.link._tasks) == 1
    owned.describe()
    await eventually(lambda: not owned.link._tasks)
    assert owned.observer.told == [events.StoreReset("b")]


async def test_each_loss_of_key_watches_has_everything_read_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one moment together; what is told of a replaced store comes by itself."""
    monkeypatch.setattr(module, "REWATCH_S", 0.01)
    stage.link.state = "ready"
    error = KvstoreError("x")
    stage.link._on_keys_lost(WatchLoss("reset", error))
    await asyncio.sleep(0.03)
    assert stage.observer.told == []
    again = [events.StoreReset("b"), events.ClusterReady("b")]
    for _ in range(2):
        stage.link._on_keys_lost(WatchLoss("compacted", error))
        stage.link._on_keys_lost(WatchLoss("compacted", error))
        await eventually(lambda: stage.observer.told == again)
        stage.observer.told.clear()
        await asyncio.sleep(0.03)
        assert stage.observer.told == []
