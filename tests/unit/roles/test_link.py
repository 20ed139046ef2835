"""One cluster's link, with a store of a dict."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from lazymesh.core import events, keys
from lazymesh.core.model import Space, parse_address
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.model import Change, Connected, WatchLoss
from lazymesh.roles import addressreads
from lazymesh.roles import link as module
from lazymesh.roles.link import ClusterLink, LinkConfig
from tests.support.etcd import eventually
from tests.support.fakestore import FakeClient

IP = parse_address("10.2.0.5")
READ = events.Read("b", (Space.PUSHED, Space.PULL_ONLY), (IP,))
KEY = b"cilium/state/ip/v1/default/10.2.0.5"


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


async def test_exception_of_ours_ends_the_link_and_not_the_watches(stage: Stage) -> None:
    """The hub that calls is shared by all watches of the store."""

    def fail(_event: events.Event) -> None:
        raise RuntimeError("a bug")

    running = asyncio.create_task(stage.link.run())
    await settle()
    stage.observer.on_event = fail  # type: ignore[method-assign]
    stage.link.watch(events.Watch("b", READ.spaces, READ.addresses, 7))
    stage.store.watches[1][1].on_changes(1, [Change(KEY, b"{}", 8)])
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(running, 2)


async def test_lost_key_watches_are_collected_into_one_reset(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replaced store is reported by its client."""
    monkeypatch.setattr(addressreads, "REWATCH_S", 0.01)
    addresses = tuple(parse_address(f"10.2.{number}.1") for number in range(3))
    stage.link.watch(events.Watch("b", (Space.PUSHED,), addresses, 7))
    assert (stage.link.addresses.watched_keys, stage.link.addresses.watched_ranges) == (3, 3)
    assert stage.store.watches[1][2] == 8, "from the revision after the read"
    for number in (1, 2):
        stage.store.watches.pop(number)[1].on_lost(number, WatchLoss("compacted", KvstoreError("x")))
    await eventually(lambda: stage.observer.told)
    await settle()
    assert stage.observer.told == [events.StoreReset("b")]
    assert (stage.link.addresses.watched_keys, stage.store.watches) == (0, {})


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
    """The other one's watch is as live as before, and reports nothing."""
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
async def test_cluster_that_describes_itself_differently_is_started_over(
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
        # Until it is judged again, and perhaps refused, nothing is resolved by the old description.
        assert stage.link.state == "silent"
        assert stage.observer.told == [events.StoreReset("b")]
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert not stage.store.watches


@pytest.mark.parametrize("cached", [True, False])
async def test_owner_whose_configuration_is_unusable_counts_as_down(stage: Stage, cached: bool) -> None:
    """Behind a cache, which cannot tell what the owner does not have; a store that is not a cache is read."""
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
    assert (link.owner.problem, link.addresses.problem) == ("not YAML", None)


async def test_owners_store_that_is_replaced_has_everything_read_again(stage: Stage) -> None:
    """Once it is complete."""
    config = parse_config("endpoints: ['http://x:1']", "b")
    link = ClusterLink(LinkConfig("b", config, config), cast("Any", stage.observer))
    store = cast("FakeClient", link.owner.client)
    store.data[keys.cluster_config_key("b")] = b'{"id":2,"capabilities":{"maxConnectedClusters":255}}'
    running = asyncio.create_task(link.run())
    await eventually(lambda: link.owner.complete)
    link.owner._on_event(Connected("e", 7, 1, reset=True))
    await eventually(lambda: link.owner.complete)
    assert stage.observer.told == [events.StoreReset("b")]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_each_loss_of_key_watches_has_everything_read_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one moment together; a replaced store is reported separately."""
    monkeypatch.setattr(addressreads, "REWATCH_S", 0.01)
    stage.link.state = "ready"
    error = KvstoreError("x")
    stage.link.addresses._on_keys_lost(WatchLoss("reset", error))
    await asyncio.sleep(0.03)
    assert stage.observer.told == []
    again = [events.StoreReset("b"), events.ClusterReady("b")]
    for _ in range(2):
        stage.link.addresses._on_keys_lost(WatchLoss("compacted", error))
        stage.link.addresses._on_keys_lost(WatchLoss("compacted", error))
        await eventually(lambda: stage.observer.told == again)
        stage.observer.told.clear()
        await asyncio.sleep(0.03)
        assert stage.observer.told == []
