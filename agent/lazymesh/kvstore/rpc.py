"""etcd's gRPC methods: paths, encoders and decoders; and the queue that feeds a stream."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from msgspec import Struct

from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import requests

if TYPE_CHECKING:
    from collections.abc import Callable


class Answer(Protocol):
    """The field that all of etcd's responses have in common."""

    header: pb.ResponseHeader


Item = TypeVar("Item")
Request_contra = TypeVar("Request_contra", contravariant=True)
Response = TypeVar("Response", bound=Answer)


@dataclass(frozen=True, slots=True)
class Method(Generic[Request_contra, Response]):
    """One method: its path, the encoder of its requests, the decoder of its responses."""

    path: str
    encode: Callable[[Request_contra], bytes]
    decode: Callable[[bytes], Response]


class Call(Struct, Generic[Request_contra, Response], frozen=True):
    """One call of a method with one request and one response."""

    method: Method[Request_contra, Response]
    request: Request_contra
    timeout_s: float
    what: Callable[[], str]
    """Says what could not be done, for an error message."""


class Outbox(Generic[Item]):
    """The requests of one stream, in the order they are put in.

    The sender may be waiting for the next request when the stream breaks, so every ending must close the outbox.
    """

    def __init__(self, *requests: Item) -> None:
        self._queue: asyncio.Queue[Item | None] = asyncio.Queue()
        for request in requests:
            self.put(request)

    def put(self, request: Item) -> None:
        """Send one more."""
        self._queue.put_nowait(request)

    def close(self) -> None:
        """Send no more."""
        self._queue.put_nowait(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        request = await self._queue.get()
        if request is None:
            raise StopAsyncIteration
        return request


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest.SerializeToString, pb.RangeResponse.FromString)
PUT = Method("/etcdserverpb.KV/Put", pb.PutRequest.SerializeToString, pb.PutResponse.FromString)
DELETE_RANGE = Method(
    "/etcdserverpb.KV/DeleteRange", pb.DeleteRangeRequest.SerializeToString, pb.DeleteRangeResponse.FromString
)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest.SerializeToString, pb.TxnResponse.FromString)
READ_MANY = Method(TXN.path, requests.encode_reads, TXN.decode)
"""A transaction of reads; its request is a ``requests.Reads``."""
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString)
LEASE_GRANT = Method(
    "/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest.SerializeToString, pb.LeaseGrantResponse.FromString
)
LEASE_REVOKE = Method(
    "/etcdserverpb.Lease/LeaseRevoke",
    pb.LeaseRevokeRequest.SerializeToString,
    pb.LeaseRevokeResponse.FromString,
)
LEASE_KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive",
    pb.LeaseKeepAliveRequest.SerializeToString,
    pb.LeaseKeepAliveResponse.FromString,
)
STATUS = Method(
    "/etcdserverpb.Maintenance/Status", pb.StatusRequest.SerializeToString, pb.StatusResponse.FromString
)
AUTHENTICATE = Method(
    "/etcdserverpb.Auth/Authenticate",
    pb.AuthenticateRequest.SerializeToString,
    pb.AuthenticateResponse.FromString,
)
