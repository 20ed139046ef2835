"""Builds etcd's request messages and converts its responses: pure functions, no channel."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore.model import KeyValue, ReadResult, Values

if TYPE_CHECKING:
    from collections.abc import Sequence


def prefix_end(prefix: bytes) -> bytes:
    """Return the end of the range that holds all keys with this prefix."""
    stem = prefix.rstrip(b"\xff")
    # Nothing is greater than 0xff...: to etcd, a zero byte as the end means "to the very end".
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def read_one(key: bytes) -> pb.RangeRequest:
    """Ask for one key from the answering member's own state, without a round of consensus."""
    return pb.RangeRequest(key=key, serializable=True)


def read_agreed() -> pb.RangeRequest:
    """Ask for nothing in particular, but after a round of consensus."""
    return pb.RangeRequest(key=b"\0", count_only=True)


def read_batch(keys: Sequence[bytes]) -> pb.TxnRequest:
    """Ask for several keys at one revision."""
    return pb.TxnRequest(success=[pb.RequestOp(request_range=read_one(key)) for key in keys])


WHOLE_MOST = 256
"""Most keys below a prefix that is read as a range: a /24 has as many addresses."""


class Whole(NamedTuple):
    """Keys with common prefixes, which are read as ranges."""

    prefixes: Sequence[bytes]
    """All keys below each of these are read."""
    names: Sequence[bytes]
    """Of those, the keys with these names after the prefix are wanted."""


class Reads(Struct, frozen=True):
    """What one transaction reads."""

    keys: Sequence[bytes]
    """Each of these is read by itself."""
    whole: Sequence[Whole] = ()
    """Their values come first, name by name in the order of the prefixes, then those of ``keys``."""

    @property
    def prefixes(self) -> list[bytes]:
        """The prefixes that are read as ranges, in the order of the request."""
        return [prefix for one in self.whole for prefix in one.prefixes]


def encode_reads(reads: Reads) -> bytes:
    """Return the bytes of a transaction, built without protobuf objects for its keys: those take ten times as long."""
    keys = reads.keys
    if max(map(len, keys), default=0) > _SHORT:
        single = read_batch(keys).SerializeToString()
    else:
        parts: list[bytes] = []
        for key in keys:
            parts += (_READ_OF[len(key)], key, _SERIALIZABLE)
        single = b"".join(parts)
    if not reads.whole:
        return single
    prefixes = reads.prefixes
    ranges = [_field(0x0A, prefix) + _field(0x12, prefix_end(prefix)) + _LIMITED for prefix in prefixes]
    return b"".join([_field(0x12, _field(0x0A, one)) for one in ranges]) + single


def _field(tag: int, content: bytes) -> bytes:
    """Return a field of a message, with its tag and its length, which is below 16 KiB."""
    size = len(content)
    head = (tag, size) if size < 0x80 else (tag, size & 0x7F | 0x80, size >> 7)
    return bytes(head) + content


_SHORT = 100
"""Longest key for which the lengths of all enclosing messages fit into one byte."""
_READ_OF = [bytes((0x12, size + 6, 0x0A, size + 4, 0x0A, size)) for size in range(_SHORT + 1)]
"""By the key's size: TxnRequest.success, RequestOp.request_range, RangeRequest.key, each with its length."""
_SERIALIZABLE = pb.RangeRequest(serializable=True).SerializeToString()
_LIMITED = pb.RangeRequest(limit=WHOLE_MOST, serializable=True).SerializeToString()


def read_page(prefix: bytes, after: bytes | None, revision: int, limit: int) -> pb.RangeRequest:
    """Ask for up to ``limit`` keys of the prefix after the key ``after``; revision 0 is the current one."""
    return pb.RangeRequest(
        key=prefix if after is None else after + b"\0",
        range_end=prefix_end(prefix),
        limit=limit,
        revision=revision,
        serializable=True,
    )


def write_batch(writes: Sequence[tuple[bytes, bytes | None]], lease: int) -> pb.TxnRequest:
    """Put keys, or delete those with value None, all at one revision."""
    return pb.TxnRequest(success=[_write(key, value, lease) for key, value in writes])


def _write(key: bytes, value: bytes | None, lease: int) -> pb.RequestOp:
    if value is None:
        return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def one_of(response: pb.RangeResponse) -> KeyValue | None:
    """Return the only key-value of a single-key answer, None if the key does not exist."""
    return key_value(response.kvs[0]) if response.kvs else None


def read_result(response: pb.RangeResponse | pb.TxnResponse, asked: int) -> ReadResult:
    """Return the answer to :func:`read_one` or :func:`read_batch`; KvstoreError (protocol) if the number differs."""
    if isinstance(response, pb.RangeResponse):
        return ReadResult(response.header.revision, [one_of(response)])
    if len(response.responses) != asked:
        raise _odd(f"{len(response.responses)} answers to {asked} reads")
    return ReadResult(response.header.revision, [one_of(op.response_range) for op in response.responses])


def values_of(response: pb.RangeResponse | pb.TxnResponse, reads: Reads) -> Values:
    """Return the values of the wanted names in the ranges, then those of the keys.

    KvstoreError: protocol, if the number of answers differs; exhausted, if there are too many keys below a prefix.
    """
    if isinstance(response, pb.RangeResponse):
        return Values(response.header.revision, (response.kvs[0].value if response.kvs else None,))
    answers: Sequence[pb.ResponseOp] = response.responses
    asked = (len(reads.prefixes) if reads.whole else 0) + len(reads.keys)
    if len(answers) != asked:
        raise _odd(f"{len(answers)} answers to {asked} reads")
    values: list[bytes | None] = []
    left = iter(answers)
    for prefixes, names in reads.whole:
        below = [_below(prefix, next(left).response_range) for prefix in prefixes]
        values += chain.from_iterable(zip(*[map(found.get, names) for found in below], strict=True))
    for op in left:
        kvs = op.response_range.kvs
        values.append(kvs[0].value if kvs else None)
    return Values(response.header.revision, tuple(values))


def _below(prefix: bytes, answer: pb.RangeResponse) -> dict[bytes, bytes]:
    """Return the values below a prefix, by name."""
    if answer.more or len(answer.kvs) > WHOLE_MOST:  # the server need not honour the limit
        below = prefix.decode(errors="replace")
        raise KvstoreError(f"there are more than {WHOLE_MOST} keys below {below}*", "exhausted")
    cut = len(prefix)
    return {kv.key[cut:]: kv.value for kv in answer.kvs}


def next_page(answer: pb.RangeResponse, after: bytes | None) -> bytes | None:
    """Return the key after which the next page begins, None after the last page.

    KvstoreError (protocol) if the server claims that more follows, but the page makes no progress.
    """
    if not answer.more:
        return None
    if not answer.kvs or (after is not None and answer.kvs[-1].key <= after):
        raise _odd("a listing without progress")
    return answer.kvs[-1].key


def _odd(what: str) -> KvstoreError:
    return KvstoreError(f"etcd sent {what}: etcd 3.4 or later should not answer like this", "protocol")


def key_value(kv: pb.KeyValue) -> KeyValue:
    """Convert etcd's key-value message."""
    return KeyValue(kv.key, kv.value, kv.mod_revision, kv.lease)
