"""Both channels keep the same contract with a real etcd: the native one, and the one that grpcio carries."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import requests, rpc
from lazymesh.kvstore.channel import Code, RpcError, UnaryCall
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.connection import make_channel
from lazymesh.kvstore.model import Values
from lazymesh.kvstore.requests import WHOLE_MOST, Reads, Whole
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import KINDS, Transport, read_tls_files
from tests.support.etcd import Authority, EtcdServer, EtcdSettings, cilium_roles, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from lazymesh.kvstore.channel import Channel
    from lazymesh.kvstore.config import EtcdConfig


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    """Yield one etcd for those tests that do not break it."""
    with EtcdServer() as server:
        yield server


@asynccontextmanager
async def opened(kind: str, config: EtcdConfig) -> AsyncIterator[Channel]:
    """Yield an open channel."""
    transport = Transport(kind=kind, max_message_bytes=64 << 20)
    channel = make_channel(
        config.endpoints[0], config, read_tls_files(config) if config.tls else None, transport
    )
    await channel.open(5)
    try:
        yield channel
    finally:
        await channel.close()


def config_of(server: EtcdServer) -> EtcdConfig:
    """Return the configuration of a server in the clear."""
    return parse_config(f"endpoints: ['{server.url}']", "test")


def ask(
    channel: Channel, method: rpc.Method, request: object, timeout_s: float = 5
) -> asyncio.Future[bytes | RpcError]:
    """Make a call, as a future."""
    future: asyncio.Future[bytes | RpcError] = asyncio.get_running_loop().create_future()
    channel.call(UnaryCall(method.path, method.encode(request), (), timeout_s), future.set_result)
    return future


async def response(channel: Channel, method: rpc.Method, request: object) -> object:
    """Make a call that must end well."""
    outcome = await ask(channel, method, request)
    assert isinstance(outcome, bytes), outcome
    return method.decode(outcome)


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_small_and_large_come_back_whole(etcd: EtcdServer, kind: str) -> None:
    """A megabyte there is more than the server's first window, 40 MB back more than ours."""
    async with opened(kind, config_of(etcd)) as channel:
        for number in range(40):
            put = pb.PutRequest(key=b"large/%d" % number, value=bytes([number]) * (1 << 20))
            await response(channel, rpc.PUT, put)
        page = await response(channel, rpc.RANGE, requests.read_page(b"large/", None, 0, 0))
        assert {kv.key: kv.value[:1] * len(kv.value) for kv in page.kvs} == {
            b"large/%d" % number: bytes([number]) * (1 << 20) for number in range(40)
        }
        answers = await asyncio.gather(
            *(response(channel, rpc.RANGE, requests.read_one(b"large/%d" % (n % 40))) for n in range(200))
        )
        assert [one.kvs[0].key for one in answers] == [b"large/%d" % (n % 40) for n in range(200)]
        await response(channel, rpc.DELETE_RANGE, pb.DeleteRangeRequest(key=b"large/", range_end=b"large0"))


@pytest.mark.parametrize("kind", KINDS)
async def test_refusals_carry_code_and_words(etcd: EtcdServer, kind: str) -> None:
    """Of etcd, and of gRPC itself."""
    async with opened(kind, config_of(etcd)) as channel:
        empty = await ask(channel, rpc.PUT, pb.PutRequest())
        assert isinstance(empty, RpcError)
        assert (empty.code, empty.details) == (Code.INVALID_ARGUMENT, "etcdserver: key is not provided")
        unknown = rpc.Method("/etcdserverpb.KV/Nothing", pb.PutRequest.SerializeToString, rpc.PUT.decode)
        nothing = await ask(channel, unknown, pb.PutRequest())
        assert isinstance(nothing, RpcError)
        assert nothing.code is Code.UNIMPLEMENTED


@pytest.mark.parametrize("kind", KINDS)
async def test_stream_lives_beside_calls_and_ends_when_it_is_left(etcd: EtcdServer, kind: str) -> None:
    """A watch that sees what calls write."""
    async with opened(kind, config_of(etcd)) as channel:
        outbox = rpc.Outbox(
            pb.WatchRequest(create_request=pb.WatchCreateRequest(key=b"w", watch_id=7)),
        )
        encoded = (request.SerializeToString() async for request in outbox)
        async with aclosing(channel.stream(rpc.WATCH.path, encoded, ())) as responses:
            assert pb.WatchResponse.FromString(await anext(responses)).created
            for number in range(3):
                await response(channel, rpc.PUT, pb.PutRequest(key=b"w", value=b"%d" % number))
                event = pb.WatchResponse.FromString(await anext(responses)).events[0]
                assert event.kv.value == b"%d" % number
        outbox.close()
        assert await response(channel, rpc.STATUS, pb.StatusRequest())


@pytest.mark.parametrize("kind", KINDS)
async def test_frozen_server_costs_the_deadline_and_a_given_up_call_is_told_nothing(kind: str) -> None:
    """Nothing else ends such a call."""
    with EtcdServer() as server:
        async with opened(kind, config_of(server)) as channel:
            await response(channel, rpc.STATUS, pb.StatusRequest())
            server.freeze()
            told: list[object] = []
            message = rpc.STATUS.encode(pb.StatusRequest())
            give_up = channel.call(UnaryCall(rpc.STATUS.path, message, (), 0.2), told.append)
            late = ask(channel, rpc.STATUS, pb.StatusRequest(), 0.2)
            give_up()
            outcome = await late
            assert isinstance(outcome, RpcError)
            assert outcome.code is Code.DEADLINE_EXCEEDED
            await asyncio.sleep(0.1)
            assert told == []
            server.thaw()


@pytest.mark.parametrize("kind", KINDS)
async def test_killed_server_fails_calls_and_streams_and_the_channel_is_lost(kind: str) -> None:
    """For good: whoever wants another connection makes another channel."""
    with EtcdServer() as server:
        async with opened(kind, config_of(server)) as channel:
            outbox = rpc.Outbox(pb.WatchRequest(create_request=pb.WatchCreateRequest(key=b"w")))
            encoded = (request.SerializeToString() async for request in outbox)
            async with aclosing(channel.stream(rpc.WATCH.path, encoded, ())) as responses:
                await anext(responses)
                assert channel.lost is None
                server.freeze()
                call = ask(channel, rpc.STATUS, pb.StatusRequest())
                await asyncio.sleep(0.05)
                server.kill()
                outcome = await call
                assert isinstance(outcome, RpcError)
                assert outcome.code is Code.UNAVAILABLE
                with pytest.raises(RpcError):
                    await anext(responses)
            outbox.close()
            await eventually(lambda: channel.lost)


@pytest.mark.parametrize("kind", KINDS)
async def test_certificates_say_who_we_are(kind: str, tmp_path: object) -> None:
    """TLS with a client certificate, whose common name is the user; and its limits."""
    authority = Authority(tmp_path / "ca")  # type: ignore[operator]
    with EtcdServer(EtcdSettings(tls=authority)) as server:
        server.enable_auth(cilium_roles("b"))
        pair = authority.issue("remote")
        files = f"trusted-ca-file: {authority.cert}\ncert-file: {pair.cert}\nkey-file: {pair.key}"
        async with opened(kind, parse_config(f"endpoints: ['{server.url}']\n{files}", "test")) as channel:
            await response(channel, rpc.RANGE, requests.read_one(b"cilium/state/x"))
            refused = await ask(channel, rpc.RANGE, requests.read_one(b"cilium/cache/x"))
            assert isinstance(refused, RpcError)
            assert refused.code is Code.PERMISSION_DENIED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["while dialling", "under way"])
async def test_read_is_answered_even_if_the_client_is_closed(kind: str, moment: str) -> None:
    """The resolver counts on an answer to everything that it asks."""
    told: list[Values | KvstoreError] = []
    with EtcdServer() as server:
        async with EtcdClient(config_of(server), Options(transport=Transport(kind=kind))) as client:
            if moment == "under way":
                await client.wait_connected()
                server.freeze()
            client.read_soon(Reads([b"a", b"b"]), 5, told.append)
            if moment == "under way":
                await asyncio.sleep(0.05)
        server.thaw()
        await eventually(lambda: told)
    assert len(told) == 1
    assert isinstance(told[0], KvstoreError)


@pytest.mark.parametrize("kind", KINDS)
async def test_read_soon_reads_what_read_many_does(etcd: EtcdServer, kind: str) -> None:
    """One key or several, there or not."""
    async with EtcdClient(config_of(etcd), Options(transport=Transport(kind=kind))) as client:
        await client.put(b"soon", b"1")
        for keys in ([b"soon"], [b"soon", b"never"]):
            told: list[Values | KvstoreError] = []
            client.read_soon(Reads(keys), 5, told.append)
            await eventually(lambda told=told: told)
            there = await client.read_many(keys)
            assert told == [Values(there.revision, tuple(pair and pair.value for pair in there.values))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("there", "single"), [(True, 2), (False, 2), (True, 1), (True, 0)])
async def test_prefixes_are_read_whole_in_the_same_transaction(
    etcd: EtcdServer, kind: str, there: bool, single: int
) -> None:
    """Not what begins alike in another group; and as well when the connection is still to be made."""
    keys = [b"whole/10.2.1.%d" % number for number in range(256)]
    async with EtcdClient(config_of(etcd), Options(transport=Transport(kind=kind))) as client:
        await client.write_many([(key, key) for key in [b"whole/10.2.10.7", *keys[:100]]])
    async with EtcdClient(config_of(etcd), Options(transport=Transport(kind=kind))) as client:
        if there:
            await client.wait_connected()
        told: list[Values | KvstoreError] = []
        apart = [b"whole/10.2.10.7", b"whole/10.2.10.8"][:single]
        reads = Reads(apart, [Whole([b"whole/10.2.1."], [b"101", b"99", b"0"])])
        client.read_soon(reads, 5, told.append)
        await eventually(lambda: told)
        (answer,) = told
        assert isinstance(answer, Values)
        assert answer.values == (None, keys[99], keys[0], b"whole/10.2.10.7", None)[: 3 + single]


@pytest.mark.parametrize("kind", KINDS)
async def test_prefix_with_too_much_below_it_is_refused(etcd: EtcdServer, kind: str) -> None:
    """By number, and by size."""
    many = [(b"many/%d" % number, b"") for number in range(WHOLE_MOST + 1)]
    large = [(b"large/%d" % number, bytes(1_000_000)) for number in range(20)]
    async with EtcdClient(config_of(etcd), Options(transport=Transport(kind=kind))) as client:
        for at in range(0, len(many), 128):
            await client.write_many(many[at : at + 128])
        for pair in large:
            await client.write_many([pair])
        for prefix in (b"many/", b"large/"):
            told: list[Values | KvstoreError] = []
            client.read_soon(Reads([], [Whole([prefix], [b"1"])]), 5, told.append)
            await eventually(lambda told=told: told)
            assert isinstance(told[0], KvstoreError)
            assert told[0].kind == "exhausted"
