"""Leases: kept alive past their time, replaced when lost."""

from __future__ import annotations

import asyncio
import random

from lazymesh.core.backoff import Backoff, BackoffLimits
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.lease import LeaseKeeper
from lazymesh.kvstore.supervisor import Options
from tests.support.etcd import EtcdServer, eventually

QUICK = BackoffLimits(0.05, 0.1)


async def test_lease_is_kept_alive_and_a_lost_one_is_replaced() -> None:
    """The writer learns of each new lease, by which it knows that its keys are gone."""
    leases: list[int] = []
    with EtcdServer() as etcd:
        config = parse_config(f"endpoints: ['{etcd.url}']", "b")
        async with EtcdClient(config, Options(backoff=QUICK)) as client:
            keeper = LeaseKeeper(client, 1, leases.append, Backoff(QUICK, random.random))
            task = asyncio.create_task(keeper.run())
            await eventually(lambda: leases)
            await client.put(b"a", b"1", lease=leases[0])
            renewed = asyncio.get_running_loop().time() + 2.5
            await eventually(lambda: asyncio.get_running_loop().time() > renewed)
            found = await client.get(b"a")
            assert found is not None
            assert found.lease == leases[0] == keeper.lease
            await client.revoke_lease(leases[0])
            assert await client.get(b"a") is None
            await eventually(lambda: len(leases) == 2)
            await asyncio.to_thread(etcd.wipe)
            await eventually(lambda: len(leases) == 3)
            task.cancel()


async def test_lease_that_is_not_renewed_takes_its_keys_along() -> None:
    """An expired lease answers a renewal with no time left."""
    with EtcdServer() as etcd:
        async with EtcdClient(parse_config(f"endpoints: ['{etcd.url}']", "b")) as client:
            lease = await client.grant_lease(1)
            await client.put(b"a", b"1", lease=lease)
            assert await client.renew_lease(lease) >= 1
            await client.revoke_lease(lease)
            assert await client.renew_lease(lease) == 0
            assert await client.get(b"a") is None
