"""Servers that stop, hang or are replaced, seen by a client that wants to be told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.backoff import BackoffLimits
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.connection import dial
from lazymesh.kvstore.model import Connected, Disconnected
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from tests.support.etcd import EtcdCluster, EtcdServer, Role, eventually

if TYPE_CHECKING:
    from lazymesh.kvstore.model import ClientEvent

QUICK = Options(
    transport=Transport(dial_timeout_s=1),
    backoff=BackoffLimits(0.05, 0.2),
    silence_s=0.3,
    probe_timeout_s=0.5,
)


async def test_stopped_process_is_noticed_in_bounded_time_and_found_again() -> None:
    """SIGSTOP leaves every connection open and answers nothing."""
    events: list[ClientEvent] = []
    with EtcdServer() as etcd:
        async with EtcdClient(parse_config(f"endpoints: ['{etcd.url}']", "b"), QUICK) as client:
            client.add_listener(events.append)
            await client.wait_connected()
            etcd.freeze()
            await eventually(lambda: any(isinstance(event, Disconnected) for event in events), 3)
            lost = next(event for event in events if isinstance(event, Disconnected))
            assert lost.error.kind == "timeout"
            etcd.thaw()
            await client.wait_connected()
            assert isinstance(events[-1], Connected)
            assert not events[-1].reset


async def test_read_from_a_stopped_process_ends_with_its_own_timeout() -> None:
    """The miss path does not wait for the watchdog."""
    with EtcdServer() as etcd:
        async with EtcdClient(parse_config(f"endpoints: ['{etcd.url}']", "b")) as client:
            await client.wait_connected()
            etcd.freeze()
            async with asyncio.timeout(3):
                with pytest.raises(KvstoreError, match="cannot read a and 1 more") as caught:
                    await client.read_many([b"a", b"b"], 0.2)
            assert caught.value.kind == "timeout"


@pytest.mark.parametrize(
    "token", ["another", None], ids=["another cluster id", "same cluster id, lower revision"]
)
async def test_emptied_store_behind_the_same_address_is_a_reset(token: str | None) -> None:
    """Revisions of the store before mean nothing, whether the cluster id gives it away or not."""
    events: list[ClientEvent] = []
    with EtcdServer() as etcd:
        async with EtcdClient(parse_config(f"endpoints: ['{etcd.url}']", "b"), QUICK) as client:
            client.add_listener(events.append)
            for _ in range(5):
                await client.put(b"a", b"1")
            before = client.info.cluster_id
            await asyncio.to_thread(etcd.wipe, token)
            await eventually(lambda: client.epoch == 1)
            assert isinstance(events[-1], Connected)
            assert events[-1].reset
            assert (client.info.cluster_id == before) is (token is None)
            assert client.info.revision < 5


async def test_member_catches_up_with_the_others_or_says_that_it_cannot() -> None:
    """Whoever may read nothing may ask too; without a majority nobody knows what is true by now."""
    role = Role("remote", ("cilium/state/",), password="pw")
    with EtcdCluster() as etcd:
        etcd.enable_auth([role], root_password="rootpw")
        text = f"endpoints: ['{etcd.urls[0]}']\nusername: remote\npassword: pw"
        config = parse_config(text, "c")
        connection = await dial(config.endpoints[0], config, Transport(dial_timeout_s=2))
        try:
            revision = await asyncio.to_thread(etcd.put, "cilium/state/a", "1")
            await connection.catch_up()
            assert connection.revision == revision
            for member in etcd.members[1:]:
                member.freeze()
            with pytest.raises(KvstoreError) as caught:
                await connection.catch_up()
            assert caught.value.kind in ("timeout", "unavailable")
            for member in etcd.members[1:]:
                member.thaw()
        finally:
            await connection.close()


async def test_clean_restart_with_the_same_data_is_no_reset() -> None:
    """Kubernetes restarts pods; a store with a disk goes on where it was."""
    events: list[ClientEvent] = []
    with EtcdServer() as etcd:
        async with EtcdClient(parse_config(f"endpoints: ['{etcd.url}']", "b"), QUICK) as client:
            client.add_listener(events.append)
            revision = await client.put(b"a", b"1")
            await asyncio.to_thread(etcd.stop)
            await eventually(lambda: client.info.endpoint is None)
            await asyncio.to_thread(etcd.start)
            await eventually(lambda: client.info.endpoint)
            assert [type(event) for event in events] == [Connected, Disconnected, Connected]
            assert client.epoch == 0
            assert client.info.revision == revision
