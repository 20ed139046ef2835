"""A prefix followed through everything that can happen to its store."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.backoff import Backoff, BackoffLimits
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.follower import PrefixFollower
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from tests.support.etcd import EtcdServer, Role, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lazymesh.errors import KvstoreError
    from lazymesh.kvstore.model import Change

QUICK = Options(transport=Transport(dial_timeout_s=2), backoff=BackoffLimits(0.05, 0.2))


class Mirror:
    """An observer that keeps what it is told, and the order of the milestones."""

    def __init__(self) -> None:
        self.state: dict[bytes, bytes] = {}
        self.changes: list[Change] = []
        self.story: list[str] = []
        self.errors: list[KvstoreError] = []

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Apply them."""
        self.changes += changes
        for change in changes:
            if change.value is None:
                del self.state[change.key]
            else:
                self.state[change.key] = change.value

    def on_synced(self) -> None:
        """Write it down."""
        self.story.append("synced")

    def on_silent(self, error: KvstoreError) -> None:
        """Write it down."""
        self.story.append("silent")
        self.errors.append(error)


@asynccontextmanager
async def mirrored(etcd: EtcdServer, extra: str = "") -> AsyncIterator[tuple[EtcdClient, Mirror]]:
    """Follow p/ of this etcd into a mirror that is in sync when the block begins."""
    mirror = Mirror()
    config = parse_config(f"endpoints: ['{etcd.url}']\n{extra}", "b.yaml")
    async with EtcdClient(config, QUICK) as client:
        backoff = Backoff(BackoffLimits(0.05, 0.2), random.random)
        task = asyncio.create_task(PrefixFollower(client, b"p/", mirror, backoff).run())
        await eventually(lambda: mirror.story)
        yield client, mirror
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_listing_and_changes_come_in_and_other_prefixes_do_not() -> None:
    """Synced is told once all that was there has been told."""
    with EtcdServer() as etcd:
        etcd.put("p/a", "1")
        etcd.put("q", "beside")
        async with mirrored(etcd) as (client, mirror):
            assert mirror.state == {b"p/a": b"1"}
            assert mirror.story == ["synced"]
            await client.write_many([(b"p/b", b"2"), (b"p/a", None), (b"p", b"x")])
            await eventually(lambda: mirror.state == {b"p/b": b"2"})


async def test_outage_is_told_and_missed_changes_follow_without_a_listing() -> None:
    """Nothing that was known already is told again."""
    with EtcdServer() as etcd:
        etcd.put("p/a", "1")
        async with mirrored(etcd) as (_, mirror):
            await asyncio.to_thread(etcd.kill)
            await eventually(lambda: mirror.story == ["synced", "silent"])
            await asyncio.to_thread(etcd.start)
            await asyncio.to_thread(etcd.put, "p/b", "2")
            await eventually(lambda: mirror.state == {b"p/a": b"1", b"p/b": b"2"})
            assert mirror.story == ["synced", "silent", "synced"]
            assert [change.key for change in mirror.changes] == [b"p/a", b"p/b"]


async def test_keys_deleted_before_a_compaction_during_the_outage_are_told_as_deleted() -> None:
    """The delete's event is gone from the store; the difference of two listings has it."""
    with EtcdServer() as etcd:
        for key in ("p/stays", "p/goes", "p/changes"):
            etcd.put(key, "1")
        async with mirrored(etcd) as (client, mirror):
            await asyncio.to_thread(etcd.kill)
            with etcd.elsewhere():
                etcd.delete("p/goes")
                etcd.compact(etcd.put("p/changes", "2"))
            told = len(mirror.changes)
            await asyncio.to_thread(etcd.start)
            await eventually(lambda: mirror.state == {b"p/stays": b"1", b"p/changes": b"2"})
            await eventually(lambda: mirror.story[-1] == "synced")
            assert any("is compacted" in str(error) for error in mirror.errors)
            assert {change.key for change in mirror.changes[told:]} == {b"p/changes", b"p/goes"}
            await client.put(b"p/new", b"3")
            await eventually(lambda: b"p/new" in mirror.state)


@pytest.mark.parametrize(
    "token", ["another", None], ids=["another cluster id", "same cluster id, lower revision"]
)
async def test_mirror_of_an_emptied_store_ends_up_with_what_is_in_the_new_one(token: str | None) -> None:
    """Keys that vanished are told as deleted, though the new store knows nothing of them."""
    with EtcdServer() as etcd:
        for key in ("p/a", "p/b", "p/c"):
            etcd.put(key, "old")
        async with mirrored(etcd) as (_, mirror):
            assert len(mirror.state) == 3
            await asyncio.to_thread(etcd.wipe, token)
            await asyncio.to_thread(etcd.put, "p/b", "new")
            await eventually(lambda: mirror.state == {b"p/b": b"new"})
            await eventually(lambda: mirror.story[-1] == "synced")


async def test_key_with_the_same_revision_in_another_store_is_told_again() -> None:
    """Equal revisions of two stores are a coincidence."""
    with EtcdServer() as etcd:
        etcd.put("p/a", "old")
        async with mirrored(etcd) as (_, mirror):
            await asyncio.to_thread(etcd.kill)
            etcd.wipe("another", start=False)
            with etcd.elsewhere():
                etcd.put("p/a", "new")
            await asyncio.to_thread(etcd.start)
            await eventually(lambda: mirror.state == {b"p/a": b"new"})
            assert mirror.changes[0].mod_revision == mirror.changes[-1].mod_revision


async def test_refused_prefix_is_told_and_followed_once_it_is_granted() -> None:
    """Somebody corrects the role while the agent runs."""
    with EtcdServer() as etcd:
        etcd.put("p/a", "1")
        etcd.enable_auth([Role("remote", ("q/",), password="pw")], root_password="rootpw")
        async with mirrored(etcd, "username: remote\npassword: pw") as (_, mirror):
            assert mirror.story[0] == "silent"
            assert mirror.errors[0].kind == "permission"
            assert "user 'remote': cannot list p/*" in str(mirror.errors[0])
            await asyncio.to_thread(etcd.grant, Role("remote"), "p/", prefix=True)
            await eventually(lambda: mirror.state == {b"p/a": b"1"})
            await eventually(lambda: mirror.story[-1] == "synced")
