"""One function for each decoder of bytes that others write: only the documented error, and what must hold otherwise.

Each takes any bytes at all, and raises when the decoder breaks its word. ``scripts/fuzz`` looks for such bytes, led by
the coverage of our code; what it has found interesting is kept in ``corpus/`` and replayed by the unit tests. A target
keeps no state, so that a file alone says what went wrong.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from google.protobuf.message import DecodeError
from hpack import Encoder

from lazymesh.core import keys
from lazymesh.core.clusters import ClusterInfo, MeshState
from lazymesh.core.identities import check_identity, check_labels, identity_range
from lazymesh.core.model import EntryFlag, Space
from lazymesh.core.policy import PolicyEngine, with_any_source
from lazymesh.core.policyfile import parse_policy
from lazymesh.core.records import (
    BadRecord,
    RecordError,
    decode_cluster_config,
    decode_identity,
    decode_node,
    decode_pair,
    entry_of,
)
from lazymesh.datapath import abi
from lazymesh.errors import KvstoreError, SettingsError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import requests, rpc, wire
from lazymesh.kvstore.certificate import certificate_facts
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.resume import Changed, WatchTable
from lazymesh.kvstore.wire import Exchange, ProtocolError, Wire, request_head
from lazymesh.roles.control import ControlServer, read_request
from lazymesh.roles.holder import frame_of
from tests.support.misses import signal_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lazymesh.kvstore.channel import Code

ADDRESSES = (bytes((10, 2, 0, 5)), bytes.fromhex("fd000002000000000000000000000005"))
POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: one}
spec:
  endpointSelector: {}
  egress:
    - toEndpoints:
        - matchLabels: {app: web, "k8s:tier": x}
          matchExpressions: [{key: env, operator: NotIn, values: [a]}, {key: b, operator: Exists}]
    - toEntities: [world]
"""
_POLICY = parse_policy(POLICY, "policy")


# --- records in etcd ----------------------------------------------------------------------------------------------


def pair(data: bytes) -> None:
    """Check an address's record: what is believed is what a plain JSON reader finds too, and fits into the map."""
    for address in ADDRESSES:
        record = decode_pair(data, address)
        if isinstance(record, BadRecord):
            continue
        plain = json.loads(data.decode(errors="replace"))
        assert (plain["ID"], plain["IP"]) == (record.identity, keys.address_text(address))
        assert len(record.host_ip) in (4, 16)
        assert any(record.host_ip)
        entry = entry_of(record)
        assert abi.unpack_entry(abi.pack_entry(entry)) == entry
        assert entry_of(record, {record.host_ip}).tunnel_endpoint is None
        written = {"IP": plain["IP"], "ID": record.identity, "HostIP": keys.address_text(record.host_ip)}
        written |= {"Key": record.encrypt_key, "SyncScope": record.scope}
        assert decode_pair(json.dumps(written).encode(), address) == record


def node(data: bytes) -> None:
    """Check a node's record: its CIDRs are canonical, and a table that takes it in and out again is as before."""
    try:
        record = decode_node(data, "b")
    except RecordError:
        return
    state = MeshState(1)
    state.join(ClusterInfo("b", record.cluster_id, identity_range(2, 255), ((Space.PUSHED,),)))
    before = state.table()
    refused = state.upsert_node(record)
    assert refused is None or not list(state.table().mesh_cidrs())
    for network, owner in state.table().mesh_cidrs():
        assert network in record.pod_cidrs
        assert owner == record.cluster_id
        assert abi.unpack_key(abi.pack_network_key(network)) == (network, 0)
        assert state.table().owners(network[-1].packed) == ("b",)
    state.delete_node("b", record.name)
    assert list(state.table().mesh_cidrs()) == list(before.mesh_cidrs()) == []


def identity(data: bytes) -> None:
    """Check an identity's labels: written back they are the same, and the policy can judge them."""
    try:
        labels = decode_identity(data)
    except RecordError:
        return
    text = "".join(f"{key}={value};" for key, value in labels.items())
    assert decode_identity(text.encode()) == labels
    refusal = check_labels(labels, "b")
    assert refusal is not None or with_any_source(labels)["any:io.cilium.k8s.policy.cluster"] == "b"
    engine = PolicyEngine(_POLICY)
    engine.upsert(131_073, labels)
    engine.remove(131_073)
    assert engine.current() == PolicyEngine(_POLICY).current()


def cluster_config(data: bytes) -> None:
    """Check a cluster's description: what is believed has a range of identities, which its members keep to."""
    try:
        config = decode_cluster_config(data)
    except RecordError:
        return
    of = identity_range(config.cluster_id, config.max_connected_clusters)
    for number in (of.first, of.last):
        assert check_identity(number, of) is None
    for number in (0, 2, 255, of.first - 1, of.last + 1, 1 << 24 | of.first):
        assert check_identity(number, of) is not None


def etcd_keys(data: bytes) -> None:
    """Check the names in keys: any bytes may stand below a prefix."""
    for cached in (False, True):
        prefix = keys.identities_prefix(cached, "b")
        for key in (data, prefix + data):
            number = keys.identity_of_key(key, prefix)
            assert number is None or key == prefix + str(number).encode()
        prefix = keys.nodes_prefix(cached, "b")
        for key in (data, prefix + data):
            name = keys.node_of_key(key, prefix)
            assert name is None or key == prefix + name.encode()


# --- files --------------------------------------------------------------------------------------------------------


def policy_file(data: bytes) -> None:
    """Check a policy: it is understood, or refused with its line."""
    try:
        policy = parse_policy(data.decode(errors="replace"), "policy")
    except SettingsError as error:
        _one_line(str(error), "policy:")
        return
    engine = PolicyEngine(policy)
    engine.upsert(131_073, {"k8s:app": "web"})
    for direction in engine.enforced:
        engine.verdict(direction, 131_073)


def etcd_config(data: bytes) -> None:
    """Check an etcd client file: places to dial that have a name in words and a target, or one line."""
    try:
        config = parse_config(data.decode(errors="replace"), "file")
    except SettingsError as error:
        _one_line(str(error), "file:")
        return
    assert config.endpoints
    for endpoint in config.endpoints:
        assert endpoint.scheme == ("https" if config.tls else "http")
        assert 0 <= endpoint.port < 1 << 16
        assert endpoint.target.split(":")[0] in ("dns", "ipv4", "ipv6")
        str(endpoint)


def certificate(data: bytes) -> None:
    """Check a client certificate, as it stands in the file or with its DER in our hands."""
    body = base64.encodebytes(data)
    for pem in (data, b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"):
        facts = certificate_facts(pem)
        if facts is not None:
            facts.common_name.encode()
            assert facts.not_after.utcoffset() is not None


def _one_line(text: str, start: str) -> None:
    assert text.startswith(start)
    assert len(text.splitlines()) == 1, text


# --- etcd's connection --------------------------------------------------------------------------------------------

_HEAD = request_head("http", "b:2379", "/etcdserverpb.KV/Range", (), 5_000)
_HELLO = bytes.fromhex("000000040000000000")
_MOST = 4_096
"""Bytes of a message that the connection takes."""


@dataclass(frozen=True)
class _Heard:
    """What a connection made of a server's bytes."""

    messages: list[tuple[int, bytes]]
    ends: list[tuple[int, Code, str]]
    sent: bytes
    error: str | None


class _Heeding(Exchange, eq=False, kw_only=True):
    """A call that writes down what comes of it."""

    number: int
    messages: list[tuple[int, bytes]]
    ends: list[tuple[int, Code, str]]

    def on_message(self, message: bytes) -> None:
        self.messages.append((self.number, message))

    def on_end(self, code: Code, details: str) -> None:
        self.ends.append((self.number, code, details))


def _hear(pieces: Iterable[bytes]) -> _Heard:
    """Feed a connection with two calls under way, as native.py does: what was not taken comes again, with more."""
    messages: list[tuple[int, bytes]] = []
    ends: list[tuple[int, Code, str]] = []
    connection = Wire(_MOST)
    for number in range(3):
        heeding = _Heeding(number=number, messages=messages, ends=ends)
        connection.begin(heeding, _HEAD, b"question" if number < 2 else None)
    connection.out.clear()
    error, rest = None, b""
    try:
        for piece in pieces:
            rest += piece
            rest = rest[connection.feed(memoryview(rest)) :]
    except ProtocolError as broken:
        error = str(broken)
    sent = b"".join(connection.out + connection.pongs)
    connection.fail(wire.Code.UNAVAILABLE, "the end")
    assert sorted(number for number, _, _ in ends) == [0, 1, 2], "each call ends once"
    assert all(len(message) <= _MOST for _, message in messages)
    assert len(rest) <= wire.FRAME_SIZE + 9 or error is not None
    return _Heard(messages, ends, sent, error)


def http2(data: bytes) -> None:
    """Check a server's frames: the pieces in which they come change nothing, and little in calls forth little."""
    raw, cut = data[1:], data[0] if data else 0
    stream = raw if cut & 1 else _HELLO + raw
    whole = _hear([stream])
    size = 1 + (cut >> 1)
    assert _hear(stream[at : at + size] for at in range(0, len(stream), size)) == whole
    assert len(whole.sent) <= 100 + 13 * len(stream)


def hpack(data: bytes) -> None:
    """Check a header block: read twice it says the same, or is refused."""
    blocks = data.split(b"\xff\xfe\xfd")
    frames = [_frame(wire.HEADERS, wire.END_HEADERS, 1, block[: wire.FRAME_SIZE]) for block in blocks]
    _hear([_HELLO, *frames])
    one = _frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, blocks[0][: wire.FRAME_SIZE])
    first = _hear([_HELLO, one])
    again = _hear([_HELLO, _frame(wire.HEADERS, wire.END_HEADERS, 5, blocks[0][: wire.FRAME_SIZE]), one])
    if first.error is None and blocks[0][:1] not in _RESIZES and again.error is None:
        assert first.ends[0] in again.ends


_RESIZES = {bytes([first]) for first in range(0x20, 0x40)}


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def etcd_answers(data: bytes) -> None:
    """Check the answers to reads and listings: as many as were asked for, or a typed failure."""
    for method, asked in ((rpc.RANGE, 1), (rpc.TXN, 2)):
        try:
            answer = method.decode(data)
        except DecodeError:
            continue
        with contextlib.suppress(KvstoreError):
            assert len(requests.read_result(answer, asked).values) == asked
    with contextlib.suppress(DecodeError, KvstoreError):
        after = requests.next_page(rpc.RANGE.decode(data), b"a")
        assert after is None or after > b"a"


class _Listener:
    """Takes what a watch is told."""

    def on_live(self, _watch_id: int, _revision: int) -> None:
        """Nothing."""

    def on_changes(self, _watch_id: int, _changes: object) -> None:
        """Nothing."""

    def on_lost(self, _watch_id: int, _loss: object) -> None:
        """Nothing."""


def etcd_watch(data: bytes) -> None:
    """Check the responses on a stream of watches: revisions never go back, and what is held has a bound."""
    table = WatchTable()
    for key in (b"a", b"b", b"c"):
        table.add(key, _Listener(), 7, prefix=key == b"c")
    table.start_stream()
    while data:
        size, data = int.from_bytes(data[:2], "big"), data[2:]
        raw, data = data[:size], data[size:]
        try:
            response = rpc.WATCH.decode(raw)
        except DecodeError:
            continue
        before = {number: watch.next_revision for number, watch in table.watches.items()}
        told = table.digest(response)
        assert not isinstance(told, Changed) or told.changes
        for number, watch in table.watches.items():
            assert watch.next_revision >= before[number]
    assert len(table.start_stream()) == len(table.watches)


# --- the kernel, and the agent's socket ---------------------------------------------------------------------------


def signals(data: bytes) -> None:
    """Check a perf record: a miss of one address, or nothing."""
    signal = signal_of(data)
    if signal is not None:
        assert len(signal.address) in (4, 16)
        family = abi.FAMILY_IPV4 if len(signal.address) == 4 else abi.FAMILY_IPV6
        head = struct.pack("=IBBHI", 3, family, signal.direction, signal.cluster_id, signal.ifindex)
        raw = head + signal.address.ljust(16, b"\0") + bytes(4) + struct.pack("=Q", signal.ktime_ns)
        assert signal_of(raw) == signal


def journal(data: bytes) -> None:
    """Check elements of maps: any bytes may stand in them; what they say, written back, says the same."""
    raw = data[:104].ljust(104, b"\0")
    key, owned = raw[:24], raw[24:80]
    line = abi.unpack_owned(owned)
    assert abi.unpack_owned(abi.pack_owned(line)) == line
    with contextlib.suppress(ValueError):
        network, cluster_id = abi.unpack_key(key)
        again = abi.pack_network_key(network)
        assert abi.unpack_key(again) == (network, 0)
        address = abi.address_of_key(key)
        full = network.prefixlen == network.max_prefixlen and cluster_id == 0
        assert address == (network.network_address.packed if full else None)
    entry, small = abi.unpack_entry(raw[80:]), abi.unpack_entry(raw[80:92])
    assert abi.unpack_entry(abi.pack_entry(entry)) == entry
    kept = msgspec.structs.replace(small, flags=small.flags & EntryFlag.SKIP_TUNNEL)
    assert abi.unpack_entry(abi.pack_entry_v1(small)) == kept
    assert len(abi.address_of_dedup_key(raw[:20])) in (4, 16)


_SLOTS = 4


def hold_headers(data: bytes) -> None:
    """Check what is read from the TAP: a parked packet that its slot knows, or a stray."""
    size = ctypes.sizeof(abi.Slot) * _SLOTS
    slots = (abi.Slot * _SLOTS).from_buffer_copy(data[:size].ljust(size, b"\0"))
    for frame in (data[size:], data[size : size + 10] + b"\0" * 10 + data[size + 10 :]):
        found = frame_of(frame, slots)
        if found is not None:
            assert found.slot < _SLOTS
            assert len(found.address) == 17
            assert found.data == frame


_RUNNER = asyncio.Runner()


def control_requests(data: bytes) -> None:
    """Check what somebody asks the agent: an answer in JSON, one line, whatever it was."""
    _RUNNER.run(_ask(data))


async def _ask(data: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    request = await read_request(reader)
    assert request is None or isinstance(request, dict)
    if request is not None and request.get("ask") != "misses":
        server = ControlServer(Path("unused"), {"audit": _audit, "on-miss": _on_miss})
        assert "\n" not in json.dumps(await server._answer(request))


def _audit(request: dict[str, Any]) -> dict[str, Any]:
    return {"windows": [], "since": 1e6 - float(request["since"])}


def _on_miss(request: dict[str, Any]) -> dict[str, Any]:
    return {"on_miss": {"pass": 0, "drop": 1, "hold": 2}[request["action"]]}


# --- what to begin with -------------------------------------------------------------------------------------------


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def _pair_seeds() -> list[bytes]:
    usual = {
        "Mask": None,
        "HostIP": "192.168.0.2",
        "ID": 131_073,
        "Key": 3,
        "Metadata": "",
        "K8sPodName": "x",
    }
    return [
        _json(IP="10.2.0.5", **usual),
        _json(IP="fd00:2::5", **usual | {"HostIP": "::ffff:10.0.0.1", "SyncScope": "regional"}),
        _json(IP="10.2.0.5", **usual | {"HostIP": "fc00::1", "syncScope": "global", "Mask": "////AA=="}),
        b'{"IP":"10.2.0.5","ID":NaN,"ID":1e3,"ID":131073,"HostIP":"1.1.1.1","x":[[{"y":"\xff"}]]}',
    ]


def _node_seeds() -> list[bytes]:
    four, six = {"IP": "10.7.0.0", "Mask": "//8AAA=="}, {"IP": "fd00:7::", "Mask": "//////////8AAAAAAAAAAA=="}
    usual = {
        "Name": "n",
        "Cluster": "b",
        "ClusterID": 2,
        "IPAddresses": [{"Type": "InternalIP", "IP": "1.1.1.1"}],
    }
    return [
        _json(**usual, IPv4AllocCIDR=four, IPv6AllocCIDR=six, Labels={"topology.kubernetes.io/region": "r"}),
        _json(
            **usual, IPv4SecondaryAllocCIDRs=[four, four], IPv6SecondaryAllocCIDRs=[six], IPv4AllocCIDR=None
        ),
        _json(**usual, IPv4AllocCIDR={"IP": "0.0.0.0", "Mask": "AAAAAA=="}),
        _json(**usual | {"Cluster": "c"}),
    ]


def _http2_seeds() -> list[bytes]:
    encoder = Encoder()
    head = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    trailers = encoder.encode([("grpc-status", "5"), ("grpc-message", "no%20such")], huffman=False)
    message = _frame(wire.DATA, 0, 1, struct.pack(">BI", 0, 5) + b"hello")
    end = wire.END_HEADERS | wire.END_STREAM
    whole = _frame(wire.HEADERS, wire.END_HEADERS, 1, head) + message + _frame(wire.HEADERS, end, 1, trailers)
    tail = _frame(wire.HEADERS, 0, 5, head[:3]) + _frame(wire.CONTINUATION, wire.END_HEADERS, 5, head[3:])
    small = [
        _frame(wire.SETTINGS, 0, 0, struct.pack(">HIHIHI", 4, 70_000, 5, 20_000, 3, 1)),
        _frame(wire.PING, 0, 0, bytes(8)) + _frame(wire.PING, wire.ACK, 0, bytes(8)),
        _frame(wire.GOAWAY, 0, 0, bytes(3) + b"\1" + bytes(4) + b"bye"),
        _frame(wire.WINDOW_UPDATE, 0, 0, b"\0\0\1\0") + _frame(wire.WINDOW_UPDATE, 0, 1, b"\0\0\1\0"),
        _frame(wire.RST_STREAM, 0, 3, b"\0\0\0\x08"),
        _frame(wire.DATA, wire.PADDED, 5, b"\x03" + struct.pack(">BI", 0, 2) + b"hi" + bytes(3)),
        _frame(wire.HEADERS, wire.PADDED | wire.PRIORITISED | end, 3, b"\1" + bytes(5) + head + b"\0"),
        _frame(wire.PUSH_PROMISE, 0, 1, bytes(4)),
    ]
    return [b"\6" + part for part in (whole, tail, whole + tail, *small, b"".join(small[:4]))]


def _hpack_seeds() -> list[bytes]:
    plain, huffman = Encoder(), Encoder()
    pairs = [(":status", "200"), ("grpc-status", "14"), ("grpc-message", "%e2%82"), ("x", "y" * 200)]
    resized = Encoder()
    resized.header_table_size = 0
    return [
        plain.encode(pairs, huffman=False),
        huffman.encode(pairs),
        resized.encode(pairs),
        b"\xff\xfe\xfd".join((plain.encode(pairs), huffman.encode(pairs[:2]))),
        b"\x3f\xe1\x1f\x88\x40\x01a\x01b\xbe",
    ]


def _answer_seeds() -> list[bytes]:
    header = pb.ResponseHeader(cluster_id=1, revision=9)
    item = pb.KeyValue(key=b"k", value=b"v", mod_revision=7)
    one = pb.RangeResponse(header=header, kvs=[item], more=True, count=1)
    two = pb.TxnResponse(header=header, succeeded=True, responses=[pb.ResponseOp(response_range=one)] * 2)
    empty = pb.RangeResponse(header=header, more=True)
    return [message.SerializeToString() for message in (one, two, empty, pb.TxnResponse(header=header))]


def _watch_seeds() -> list[bytes]:
    header = pb.ResponseHeader(revision=9)
    put = pb.Event(kv=pb.KeyValue(key=b"a", value=b"v", mod_revision=9))
    gone = pb.Event(type=pb.Event.DELETE, kv=pb.KeyValue(key=b"c", mod_revision=12))
    responses = [
        pb.WatchResponse(header=header, watch_id=1, created=True),
        pb.WatchResponse(header=header, watch_id=1, events=[put]),
        pb.WatchResponse(header=header, watch_id=3, events=[put], fragment=True),
        pb.WatchResponse(header=header, watch_id=3, events=[gone]),
        pb.WatchResponse(header=header, watch_id=3, fragment=True),
        pb.WatchResponse(header=header, watch_id=3),
        pb.WatchResponse(header=header, watch_id=-1),
        pb.WatchResponse(header=header, watch_id=-1, created=True, canceled=True, cancel_reason="no"),
        pb.WatchResponse(header=header, watch_id=2, canceled=True, compact_revision=8),
    ]
    raw = [response.SerializeToString() for response in responses]
    framed = [len(one).to_bytes(2, "big") + one for one in raw]
    return [b"".join(framed), b"".join(framed[2:6]), *framed]


CERTIFICATE = bytes.fromhex(
    "308201023081aaa00302010202012a300a06082a8648ce3d040302300c310a30080603550403"
    "0c0163301e170d3236303130313030303030305a170d3336303130313030303030305a301131"
    "0f300d06035504030c0672656d6f74653059301306072a8648ce3d020106082a8648ce3d0301"
)
"""The beginning of a certificate's DER: lengths beyond its end, and the names before it."""


@dataclass(frozen=True)
class Target:
    """One decoder: how to try it, and inputs to begin with."""

    try_one: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    longest: int = 8_192
    """Bytes; less for YAML, whose reader in Python takes its time, ten times as much when it is instrumented."""


_ETCD_FILE = b"""\
endpoints:
- https://b.mesh.cilium.io:2379
- https://[fd00::1]:2379
trusted-ca-file: /ca
cert-file: /crt
key-file: /key
username: u
password: 123
cilium-host-aliases:
- hostname: b.mesh.cilium.io
  ips: [10.0.0.1, "fd00::2"]
"""

TARGETS: dict[str, Target] = {
    "pair": Target(pair, tuple(_pair_seeds())),
    "node": Target(node, tuple(_node_seeds())),
    "identity": Target(
        identity,
        (
            b"k8s:app=web;k8s:io.cilium.k8s.policy.cluster=b;",
            b"any:env=a;k8s:tier=;b:=x;:;\xff",
            b"a:io.cilium.k8s.policy.cluster=a;k8s:io.cilium.k8s.policy.cluster=b;",
        ),
    ),
    "cluster-config": Target(
        cluster_config,
        (
            _json(id=2, capabilities={"syncedCanaries": True, "cached": True, "maxConnectedClusters": 511}),
            b'{"id":256}',
        ),
    ),
    "etcd-keys": Target(etcd_keys, (b"131073", b"node-1", b"0x1", b"cilium/state/identities/v1/id/17")),
    "policy-file": Target(
        policy_file,
        (
            POLICY.encode(),
            POLICY.replace("egress", "ingress").replace("toE", "fromE").encode(),
            b"a: &a [*a]\n--- \n...",
            b'%YAML 1.1\n---\nkind: "\\UFFFFFFFF"',
            b"specs: [&s {endpointSelector: {}, egress: []}, *s]",
        ),
        longest=600,
    ),
    "etcd-config": Target(
        etcd_config,
        (
            _ETCD_FILE,
            b"endpoints: ['b:1']",
            b"endpoints: [http://b:1, 2001-99-99, 0x1f, .inf, ~, !!int '']",
            b"endpoints: ['b:1']\ncilium-host-aliases: 5",
            b"x: " + b"[" * 40,
            b"a: &a [x, x]\nb: &b [*a, *a]\nendpoints: [*b]",
            b"{[a]: b}",
            b'endpoints: ["\\U0010ffff", "\\UFFFFFFFF"]',
            b"%YAML 1.1\n--- {endpoints: [b:1]}",
        ),
        longest=600,
    ),
    "certificate": Target(
        certificate, (CERTIFICATE, b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----")
    ),
    "http2": Target(http2, tuple(_http2_seeds())),
    "hpack": Target(hpack, tuple(_hpack_seeds())),
    "etcd-answers": Target(etcd_answers, tuple(_answer_seeds())),
    "etcd-watch": Target(etcd_watch, tuple(_watch_seeds())),
    "signals": Target(
        signals,
        (
            struct.pack("=IBBHI16sIQ", 3, 1, 0, 2, 7, bytes((10, 2, 0, 5)), 0, 99) + bytes(4),
            struct.pack("=IBBHI16sIQ", 3, 2, 1, 2, 7, ADDRESSES[1], 0, 99),
        ),
    ),
    "journal": Target(
        journal,
        (
            abi.pack_address_key(ADDRESSES[0])
            + struct.pack("=I16sHBB", 131_073, b"\n\0\0\1", 0, 0, 2) * 2
            + bytes(8),
            abi.pack_address_key(ADDRESSES[1]) + struct.pack("=I16sHBB", 131_073, ADDRESSES[1], 0, 0, 6) * 3,
        ),
    ),
    "hold-headers": Target(
        hold_headers, (bytes(abi.Slot(hold=1, family=1, parked_ns=1)) * _SLOTS + bytes(22) + b"\x08\0packet",)
    ),
    "control-requests": Target(
        control_requests,
        (
            b'{"ask": "audit", "since": 60}\n',
            b'{"ask": "on-miss", "action": "hold"}\n',
            b'{"ask": "misses"}\n',
            b'{"ask": "audit", "since": 1e999}\n',
            b'{"ask": "audit", "since": 1%b}\n' % (b"0" * 400),
            b'{"ask": "on-miss", "action": []}\n',
            b"[" * 50,
        ),
    ),
}
