"""The bookkeeping of many watches on one stream: what to request, what has arrived, where to resume.

Pure: messages in, deliveries out. hub.py has the stream and tells the listeners.

The revision at which a watch resumes must never be wrong: it is the one after the last revision that was delivered
*completely*. The events of one response may arrive in fragments, so they are held back until the last fragment.
Progress reports move a watch forward although its key has not changed, otherwise its revision could be compacted after
a quiet night. A report for all watches covers those that the server had when it was asked, so it is kept together with
that moment, as a mark in the sequence of created watches.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore.model import Change
from lazymesh.kvstore.requests import prefix_end

if TYPE_CHECKING:
    from lazymesh.kvstore.model import WatchListener

MOST_PENDING = 32 << 20
"""Most bytes of fragments held back for one watch; beyond that its keys are read again, page by page."""
ALL_WATCHES = -1
"""The watch id of a report for all watches, and of a refused creation."""


@dataclass(slots=True)
class Watch:
    """One key or prefix being watched."""

    watch_id: int
    key: bytes
    prefix: bool
    next_revision: int
    """The first revision not delivered yet; 0: the next one, until the server says which that is."""
    listener: WatchListener
    mark: int = 0
    """Its position in the sequence of watches created on the current stream; 0: not requested on it yet."""
    pending: list[Change] = field(default_factory=list)
    """Fragments of a response that is not complete."""
    pending_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Live:
    """The server has started the watch."""

    watch: Watch
    revision: int


@dataclass(frozen=True, slots=True)
class Changed:
    """Complete revisions have arrived for a watch."""

    watch: Watch
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class Ended:
    """A watch has ended; it is no longer in the table."""

    watch: Watch
    reason: str
    compacted: bool = False
    refused: bool = False
    """The server never started it."""
    ours: bool = False
    """We ended it; the server does not know yet."""


Delivery = Live | Changed | Ended


_LAST_REVISION = (1 << 63) - 1
"""A store may claim to be there already; the next revision would not fit into an int64."""


class WatchTable:
    """All watches of one hub. We choose the watch ids (etcd accepts that since 3.4) and never reuse one."""

    def __init__(self) -> None:
        self.watches: dict[int, Watch] = {}
        self._last_id = 0
        self._awaiting: deque[int] = deque()
        """Ids in the order of their creation requests: a refusal carries no id, but comes in order."""
        self._marks = 0
        self._asked_at = 0
        self._floor: tuple[int, int] = (0, 0)
        """(mark, revision) of the last report for all watches of this stream."""

    def add(self, key: bytes, listener: WatchListener, start_revision: int, *, prefix: bool) -> Watch:
        """Add a new watch; :meth:`create_request` requests it from the server."""
        self._last_id += 1
        watch = Watch(self._last_id, key, prefix, min(start_revision, _LAST_REVISION), listener)
        self.watches[watch.watch_id] = watch
        return watch

    def restore(self, watch: Watch) -> None:
        """Add a watch that the server has ended once more, to be requested on the next stream."""
        self.watches[watch.watch_id] = watch

    def remove(self, watch_id: int) -> Watch | None:
        """Remove and return a watch; None if there is none."""
        return self.watches.pop(watch_id, None)

    def clear(self) -> list[Watch]:
        """Remove and return all watches."""
        watches = list(self.watches.values())
        self.watches.clear()
        return watches

    def start_stream(self) -> list[pb.WatchRequest]:
        """Forget the previous stream, and return the requests that resume every watch on a new one."""
        mark, revision = self._floor
        for watch in self.watches.values():
            if 0 < watch.mark <= mark:
                watch.next_revision = max(watch.next_revision, revision + 1)
            watch.mark = 0
            watch.pending, watch.pending_bytes = [], 0
        self._awaiting.clear()
        self._marks = self._asked_at = 0
        self._floor = (0, 0)
        return [self.create_request(watch) for watch in self.watches.values()]

    def create_request(self, watch: Watch) -> pb.WatchRequest:
        """Return the request for one watch; it must be sent, and in the order of these calls."""
        self._marks += 1
        watch.mark = self._marks
        self._awaiting.append(watch.watch_id)
        create = pb.WatchCreateRequest(
            key=watch.key,
            range_end=prefix_end(watch.key) if watch.prefix else b"",
            start_revision=watch.next_revision,
            watch_id=watch.watch_id,
            progress_notify=True,
            fragment=True,
        )
        return pb.WatchRequest(create_request=create)

    def progress_request(self) -> pb.WatchRequest:
        """Return the request for a report for all watches; the previous one must have been answered or given up."""
        self._asked_at = self._marks
        return pb.WatchRequest(progress_request=pb.WatchProgressRequest())

    def digest(self, response: pb.WatchResponse) -> Delivery | None:
        """Take one response of the stream; return what to tell its listener, if anything."""
        watch_id = response.watch_id
        if response.created:
            watch_id = self._created(watch_id)
        elif watch_id == ALL_WATCHES:
            self._floor = (self._asked_at, response.header.revision)
            return None
        watch = self.watches.get(watch_id)
        if watch is None:
            # We have removed it in the meantime.
            return None
        if response.canceled:
            del self.watches[watch_id]
            return Ended(watch, response.cancel_reason, response.compact_revision > 0, response.created)
        if response.created:
            # Without a start revision the watch begins after the store's current one.
            watch.next_revision = watch.next_revision or response.header.revision + 1
            return Live(watch, response.header.revision)
        if watch.pending_bytes + response.ByteSize() > MOST_PENDING:
            del self.watches[watch_id]
            return Ended(watch, "a response without end", ours=True)
        return _advance(watch, response)

    def _created(self, watch_id: int) -> int:
        expected = self._awaiting.popleft() if self._awaiting else ALL_WATCHES
        return expected if watch_id == ALL_WATCHES else watch_id


def _advance(watch: Watch, response: pb.WatchResponse) -> Changed | None:
    if not response.events and not response.fragment and not watch.pending:
        watch.next_revision = max(watch.next_revision, response.header.revision + 1)
        return None
    watch.pending += [_change(event) for event in response.events]
    if response.fragment:
        watch.pending_bytes += response.ByteSize()
        return None
    changes, watch.pending, watch.pending_bytes = watch.pending, [], 0
    if not changes:  # fragments of nothing
        return None
    # Not the header's revision: a watch that is catching up has not reached it yet.
    watch.next_revision = max(watch.next_revision, changes[-1].mod_revision + 1)
    return Changed(watch, changes)


def _change(event: pb.Event) -> Change:
    kv = event.kv
    return Change(kv.key, None if event.type == pb.Event.DELETE else kv.value, kv.mod_revision)
