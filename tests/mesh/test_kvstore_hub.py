"""Many watches on one stream, over restarts, compactions and refusals."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from lazymesh.core.backoff import BackoffLimits
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from tests.support.etcd import EtcdServer, EtcdSettings, Role, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lazymesh.kvstore.model import Change, WatchLoss

QUICK = Options(transport=Transport(dial_timeout_s=2), backoff=BackoffLimits(0.05, 0.2), fresh_login_s=0.5)


class Recorder:
    """A listener that writes down all it is told."""

    def __init__(self) -> None:
        self.live: list[int] = []
        self.changes: list[Change] = []
        self.losses: list[tuple[int, WatchLoss]] = []

    def on_live(self, watch_id: int, revision: int) -> None:
        """Write it down."""
        self.live.append(watch_id)

    def on_changes(self, watch_id: int, changes: Sequence[Change]) -> None:
        """Write them down."""
        self.changes += changes

    def on_lost(self, watch_id: int, loss: WatchLoss) -> None:
        """Write it down."""
        self.losses.append((watch_id, loss))

    @property
    def revisions(self) -> list[int]:
        """Return the revisions in the order told."""
        return [change.mod_revision for change in self.changes]


@asynccontextmanager
async def client_of(etcd: EtcdServer, extra: str = "") -> AsyncIterator[EtcdClient]:
    """Run a client of this etcd."""
    async with EtcdClient(parse_config(f"endpoints: ['{etcd.url}']\n{extra}", "b.yaml"), QUICK) as client:
        yield client


async def test_watch_tells_every_change_once_and_in_order_over_a_restart() -> None:
    """Changes from before, during and after the outage; the server is killed between two of them."""
    told = Recorder()
    with EtcdServer() as etcd:
        async with client_of(etcd) as client:
            first = await client.put(b"p/a", b"1")
            client.watches.add(b"p/", told, first, prefix=True)
            await client.delete(b"p/a")
            await eventually(lambda: len(told.changes) == 2)
            await asyncio.to_thread(etcd.kill)
            await eventually(lambda: client.info.endpoint is None)
            await asyncio.to_thread(etcd.start)
            last = 0
            for number in range(20):
                last = await asyncio.to_thread(etcd.put, f"p/{number}", "x")
            await eventually(lambda: told.changes[-1].mod_revision == last)
    assert told.revisions == list(range(first, last + 1))
    assert [change.value for change in told.changes[:3]] == [b"1", None, b"x"]
    assert told.losses == []


async def test_two_thousand_single_key_watches_share_one_stream() -> None:
    """Each hears of its own key, and all of them survive a restart."""
    told = Recorder()
    keys = [b"ip/%04d" % number for number in range(2000)]
    with EtcdServer() as etcd:
        async with client_of(etcd) as client:
            start = await client.put(b"other", b"1") + 1
            ids = {client.watches.add(key, told, start): key for key in keys}
            await eventually(lambda: len(told.live) == 2000)
            for at in range(0, 2000, 100):
                await client.write_many([(key, b"v") for key in keys[at : at + 100]])
            await eventually(lambda: len(told.changes) == 2000)
            assert {change.key for change in told.changes} == set(keys)
            await asyncio.to_thread(etcd.restart)
            await eventually(lambda: len(told.live) == 4000)
            for watch_id in list(ids)[1:]:
                client.watches.remove(watch_id)
            assert len(client.watches) == 1
            await client.write_many([(key, b"w") for key in keys[:3]])
            await eventually(lambda: len(told.changes) > 2000)
            await client.put(keys[0], b"last")
            await eventually(lambda: told.changes[-1].value == b"last")
            assert [change.key for change in told.changes[2000:]] == [keys[0], keys[0]]


async def test_catching_up_on_more_than_one_message_holds_is_in_order_and_complete() -> None:
    """Etcd cuts such a response into fragments, in the middle of revisions if need be."""
    told = Recorder()
    with EtcdServer() as etcd:
        async with client_of(etcd) as client:
            start = await client.put(b"other", b"1") + 1
            for number in range(12):
                await client.write_many([(b"p/%d/%d" % (number, part), b"x" * 300_000) for part in range(4)])
            client.watches.add(b"p/", told, start, prefix=True)
            await eventually(lambda: len(told.changes) == 48)
    assert told.revisions == [start + number for number in range(12) for _ in range(4)]


async def test_watch_whose_revision_is_compacted_is_lost_and_the_others_are_not() -> None:
    """It cannot be made good by waiting; its consumer reads again."""
    told, unharmed = Recorder(), Recorder()
    with EtcdServer() as etcd:
        async with client_of(etcd) as client:
            old = await client.put(b"a", b"1")
            new = await client.put(b"a", b"2")
            etcd.compact(new)
            other = client.watches.add(b"a", unharmed, new + 1)
            lost = client.watches.add(b"a", told, old)
            await eventually(lambda: told.losses)
            assert told.losses[0][0] == lost
            assert told.losses[0][1].kind == "compacted"
            assert f"revision {old} is compacted" in str(told.losses[0][1].error)
            await client.put(b"a", b"3")
            await eventually(lambda: unharmed.changes)
            client.watches.remove(other)


async def test_all_watches_of_a_replaced_store_are_lost_and_new_ones_work() -> None:
    """A resumed watch would wait in silence for a revision of the store before."""
    told = Recorder()
    with EtcdServer() as etcd:
        async with client_of(etcd) as client:
            revision = 0
            for _ in range(5):
                revision = await client.put(b"a", b"1")
            client.watches.add(b"a", told, revision + 1)
            client.watches.add(b"b", told, revision + 1)
            await asyncio.to_thread(etcd.wipe)
            await eventually(lambda: len(told.losses) == 2)
            assert {loss.kind for _, loss in told.losses} == {"reset"}
            newest = client.watches.add(b"a", told, 0)
            await eventually(lambda: newest in told.live)
            await client.put(b"a", b"new")
            await eventually(lambda: told.changes)
            assert told.changes[-1].value == b"new"


async def test_refused_watch_names_key_and_user_and_leaves_the_others_alone() -> None:
    """The refusal comes without an id; it must not be put down to a neighbour."""
    told = Recorder()
    role = Role("remote", ("cilium/state/",), password="pw")
    with EtcdServer() as etcd:
        etcd.enable_auth([role], root_password="rootpw")
        async with client_of(etcd, "username: remote\npassword: pw") as client:
            client.watches.add(b"cilium/state/a", told, 1)
            refused = client.watches.add(b"cilium/cache/", told, 1, prefix=True)
            client.watches.add(b"cilium/state/b", told, 1)
            await eventually(lambda: told.losses and len(told.live) == 2)
            (watch_id, loss), *others = told.losses
            assert (watch_id, loss.kind, others) == (refused, "permission", [])
            assert "user 'remote': cannot watch cilium/cache/*" in str(loss.error)
            await asyncio.to_thread(etcd.put, "cilium/state/b", "1")
            await eventually(lambda: told.changes)


async def test_watch_added_after_the_streams_token_expired_is_taken_up() -> None:
    """Etcd 3.4 calls an expired token on a stream a lack of permission; only a new login tells."""
    told = Recorder()
    role = Role("remote", ("cilium/state/",), password="pw")
    with EtcdServer(EtcdSettings(extra=("--auth-token-ttl=1",))) as etcd:
        etcd.enable_auth([role], root_password="rootpw")
        async with client_of(etcd, "username: remote\npassword: pw") as client:
            client.watches.add(b"cilium/state/a", told, 1)
            await eventually(lambda: told.live)
            await eventually(lambda: "deleted a simple token" in etcd.log, 5)
            client.watches.add(b"cilium/state/b", told, 1)
            await eventually(lambda: len(told.live) >= 3)
            assert told.losses == []
            await asyncio.to_thread(etcd.put, "cilium/state/b", "1")
            await eventually(lambda: told.changes)
