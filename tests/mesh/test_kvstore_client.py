"""Reads, listings and writes against a real etcd."""

from __future__ import annotations

import gc
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import KvstoreError
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import EtcdConfig, parse_config
from lazymesh.kvstore.requests import Reads
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from tests.support.etcd import EtcdServer, EtcdSettings, eventually, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from lazymesh.kvstore.model import Page


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    """Yield an empty etcd."""
    with EtcdServer() as server:
        yield server


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[EtcdClient]:
    """Yield a client of that etcd."""
    async with EtcdClient(config_of(etcd.url)) as client:
        yield client


def config_of(*urls: str) -> EtcdConfig:
    """Return the configuration with these endpoints."""
    return parse_config(f"endpoints: {list(urls)}", "test.yaml")


async def test_batch_of_128_keys_is_read_at_one_revision_with_its_gaps(client: EtcdClient) -> None:
    """Every third key exists; the order is that of the question."""
    keys = [b"ip/%d" % number for number in range(128)]
    revision = await client.write_many([(key, b"v" + key) for key in keys[::3]])
    result = await client.read_many(keys, 5)
    assert result.revision == revision
    assert [value and value.value for value in result.values] == [
        b"v" + key if number % 3 == 0 else None for number, key in enumerate(keys)
    ]
    assert result.values[0] is not None
    assert result.values[0].mod_revision == revision


async def test_single_key_is_read_written_and_deleted(client: EtcdClient) -> None:
    """A batch of one is a plain read; a missing key is None."""
    assert await client.get(b"a") is None
    revision = await client.put(b"a", b"1")
    found = await client.get(b"a")
    assert found is not None
    assert (found.value, found.mod_revision) == (b"1", revision)
    assert await client.delete(b"a") == 1
    assert await client.delete(b"a") == 0
    assert await client.get(b"a") is None


async def test_write_batch_puts_and_deletes_at_one_revision(client: EtcdClient) -> None:
    """All of it, or nothing."""
    await client.put(b"old", b"1")
    revision = await client.write_many([(b"new", b"2"), (b"old", None)])
    result = await client.read_many([b"new", b"old"])
    assert result.values[1] is None
    assert result.values[0] is not None
    assert result.values[0].mod_revision == revision
    with pytest.raises(KvstoreError, match="duplicate key") as caught:
        await client.write_many([(b"new", b"2"), (b"new", None)])
    assert caught.value.kind == "protocol"


async def test_listing_is_of_one_revision_though_keys_change_between_pages(client: EtcdClient) -> None:
    """What is written, deleted or added after the first page is not in it."""
    keys = [b"p/%02d" % number for number in range(25)]
    revision = await client.write_many([(key, b"old") for key in keys])
    await client.put(b"q", b"beside")
    pages: list[Page] = []
    async with aclosing(client.list_prefix(b"p/", page=10)) as listing:
        async for page in listing:
            pages.append(page)
            await client.write_many([(b"p/20", b"new"), (b"p/21", None), (b"p/99", b"added")])
    assert [len(page.items) for page in pages] == [10, 10, 5]
    assert {page.revision for page in pages} == {revision + 1}
    assert [(item.key, item.value) for page in pages for item in page.items] == [
        (key, b"old") for key in keys
    ]


async def test_listing_of_an_empty_prefix_still_tells_the_revision(client: EtcdClient) -> None:
    """There is something to watch from."""
    revision = await client.put(b"q", b"beside")
    pages = [page async for page in client.list_prefix(b"p/")]
    assert [(page.revision, page.items) for page in pages] == [(revision, [])]
    assert await client.get_prefix(b"p/") == []


async def test_listing_overtaken_by_compaction_fails_instead_of_mixing_revisions(
    client: EtcdClient, etcd: EtcdServer
) -> None:
    """Whoever lists starts over."""
    await client.write_many([(b"p/%d" % number, b"v") for number in range(3)])
    async with aclosing(client.list_prefix(b"p/", page=2)) as listing:
        await anext(listing)
        etcd.compact(await client.put(b"p/0", b"new"))
        with pytest.raises(KvstoreError, match=r"cannot list p/\*: .*compacted"):
            await anext(listing)


async def test_first_endpoint_may_be_dead(etcd: EtcdServer) -> None:
    """The first call already gets its answer from the second endpoint."""
    async with EtcdClient(config_of(f"http://127.0.0.1:{free_port()}", etcd.url)) as client:
        assert await client.get(b"a") is None
        assert client.info.endpoint == etcd.url


async def test_dead_store_is_told_at_once_with_its_address() -> None:
    """A refused connection needs no timeout to be believed."""
    url = f"http://127.0.0.1:{free_port()}"
    async with EtcdClient(config_of(url)) as client:
        with pytest.raises(KvstoreError, match=f"^etcd {url}, no user: .*refused") as caught:
            await client.get(b"a", timeout_s=60)
        assert caught.value.kind == "unavailable"
        assert client.info.endpoint is None
        assert "refused" in (client.info.last_error or "")


async def test_info_has_what_status_shows(client: EtcdClient) -> None:
    """Endpoint, store, revision, reconnects, the last error."""
    revision = await client.put(b"a", b"1")
    info = await client.status()
    assert info.endpoint
    assert info.endpoint.startswith("http://127.0.0.1:")
    assert info.cluster_id
    assert info.revision == revision
    assert (info.reconnects, info.last_error) == (0, None)


async def test_etcd_on_an_ipv6_address_is_reached() -> None:
    """Also on servers that listen on nothing else."""
    with EtcdServer(EtcdSettings(address="::1")) as server:
        async with EtcdClient(config_of(server.url)) as client:
            assert await client.get(b"a") is None


@pytest.mark.parametrize("kind", ["native", "grpcio"])
async def test_listing_of_huge_values_comes_in_small_pages(etcd: EtcdServer, kind: str) -> None:
    """No answer takes more memory than the transport's bound; behind the huge ones pages grow again."""
    options = Options(transport=Transport(kind=kind, max_message_bytes=3 << 20))
    async with EtcdClient(config_of(etcd.url), options) as client:
        for number in range(6):
            await client.put(b"p/%03d" % number, bytes(1 << 20))
        for number in range(6, 300, 98):
            await client.write_many([(b"p/%03d" % each, b"small") for each in range(number, number + 98)])
        async with aclosing(client.list_prefix(b"p/", page=100)) as pages:
            sizes = [len(page.items) async for page in pages]
        assert sum(sizes) == 300
        assert max(sizes[:3]) < 3
        assert max(sizes) > 20
        await client.put(b"p/000", bytes((1 << 20) + 100_000))
        large = Options(transport=Transport(kind=kind, max_message_bytes=1 << 20))
        async with EtcdClient(config_of(etcd.url), large) as narrow:
            with pytest.raises(KvstoreError, match="records of a megabyte") as refused:
                await narrow.get_prefix(b"p/")
            assert refused.value.kind == "exhausted"


@pytest.mark.parametrize("kind", ["native", "grpcio"])
async def test_calls_leave_no_garbage_to_be_looked_for(etcd: EtcdServer, kind: str) -> None:
    """An answer's memory is free once the answer is dropped, however rarely Python looks for circles."""
    options = Options(transport=Transport(kind=kind, max_message_bytes=1 << 20))
    async with EtcdClient(config_of(etcd.url), options) as client:
        for number in range(3):
            await client.put(b"p/%d" % number, bytes(600_000))
        told: list[object] = []
        gc.collect()
        gc.disable()
        try:
            assert await client.get(b"p/0")
            client.read_soon(Reads([b"p/1"]), 5, told.append)
            await eventually(lambda: told)
            told.clear()
            assert len(await client.get_prefix(b"p/")) == 3  # in pages, of which the first are refused
            assert gc.collect() < 10
        finally:
            gc.enable()
