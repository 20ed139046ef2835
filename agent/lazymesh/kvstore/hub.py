"""All watches of one store on one gRPC stream, and what happens to them when that stream breaks.

A watch outlives connections: it is resumed where it stopped. It ends, and its listener is told, only when
resuming would be wrong (store replaced, revision compacted) or is refused. resume.py knows the revision to resume
at. Whether the server is alive is left to the supervisor's probe, not to progress requests: etcd leaves those
unanswered while any watch starts ahead of the store's revision, as every watch of an idle store does after a listing.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from lazymesh.core.backoff import Backoff
from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import rpc
from lazymesh.kvstore.model import Connected, WatchLoss
from lazymesh.kvstore.resume import Changed, Ended, Live, WatchTable
from lazymesh.tasks import PIECE, FairShare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.kvstore.connection import Connection
    from lazymesh.kvstore.model import Change, ClientEvent, WatchListener
    from lazymesh.kvstore.resume import Watch
    from lazymesh.kvstore.supervisor import Options, Supervisor


TAKE_UP_S = 0.01
"""New watches are requested this much later, many at once: they start from a known revision, so nothing is missed, and
the server's answers to them do not delay the reads that packets wait for."""


class WatchHub:
    """Adds and removes watches at any time, connected or not."""

    def __init__(self, supervisor: Supervisor, options: Options) -> None:
        self._supervisor = supervisor
        self._options = options
        self._table = WatchTable()
        self._outbox: rpc.Outbox[pb.WatchRequest] | None = None
        """Requests of the current stream, None while there is none."""
        self._fresh: list[Watch] = []
        """Watches that will be requested in a moment."""
        self._wanted = asyncio.Event()
        supervisor.listeners.append(self._on_client_event)

    def __len__(self) -> int:
        return len(self._table.watches)

    def add(self, key: bytes, listener: WatchListener, start_revision: int, *, prefix: bool = False) -> int:
        """Watch a key or prefix from a revision on (0: from now) and return the watch's id."""
        watch = self._table.add(key, listener, start_revision, prefix=prefix)
        if not self._fresh:
            asyncio.get_running_loop().call_later(TAKE_UP_S, self._take_up)
        self._fresh.append(watch)
        self._wanted.set()
        return watch.watch_id

    def remove(self, watch_id: int) -> None:
        """End a watch: its listener hears nothing more. An unknown id is that of a watch lost in the meantime."""
        watch = self._table.remove(watch_id)
        # A watch that was not requested yet never will be.
        if watch and watch.mark and self._outbox:
            self._outbox.put(pb.WatchRequest(cancel_request=pb.WatchCancelRequest(watch_id=watch_id)))

    def _take_up(self) -> None:
        fresh, self._fresh = self._fresh, []
        for watch in fresh:
            # Otherwise it has been removed, or a new stream has already requested it.
            if self._outbox and not watch.mark and watch.watch_id in self._table.watches:
                self._outbox.put(self._table.create_request(watch))

    async def run(self) -> None:
        """Keep the stream until cancelled, from the first watch on."""
        await self._wanted.wait()
        backoff = Backoff(self._options.backoff, self._options.jitter)
        while True:
            connection = await self._supervisor.wait_connected()
            began = time.monotonic()
            try:
                await self._follow(connection)
            except KvstoreError as exc:
                connection.fail(exc)
            if time.monotonic() - began >= self._options.settled_s:
                backoff.reset()
            else:  # a server that ends each stream at once must not be asked in a tight loop
                await asyncio.sleep(backoff.next_s())

    async def _follow(self, connection: Connection) -> None:
        """Run one stream until it breaks (KvstoreError) or must be reopened (return)."""
        outbox = self._outbox = rpc.Outbox(*self._table.start_stream())
        login, login_at = connection.login, connection.login_at
        ticker = asyncio.create_task(self._ask_for_progress(connection, outbox), name="etcd watch progress")
        share = FairShare()
        responses = connection.stream(rpc.WATCH, outbox, lambda: f"keep {len(self)} watches")
        try:
            async with aclosing(responses):
                async for response in responses:
                    delivery = self._table.digest(response)
                    if isinstance(delivery, Ended) and self._token_may_be_stale(delivery, login_at):
                        self._table.restore(delivery.watch)
                        await connection.renew_login(login)
                        return
                    if isinstance(delivery, Changed):
                        await share.work(_in_pieces(delivery.changes), partial(self._tell, delivery.watch))
                    else:
                        self._deliver(delivery, connection)
        finally:
            self._outbox = None
            ticker.cancel()

    def _tell(self, watch: Watch, changes: Sequence[Change]) -> None:
        # Otherwise it was removed, or lost with all others, since the previous piece.
        if self._table.watches.get(watch.watch_id) is watch:
            watch.listener.on_changes(watch.watch_id, changes)

    def _deliver(self, delivery: Live | Ended | None, connection: Connection) -> None:
        match delivery:
            case Live(watch, revision):
                watch.listener.on_live(watch.watch_id, revision)
            case Ended(watch):
                if delivery.ours and self._outbox:
                    cancel = pb.WatchCancelRequest(watch_id=watch.watch_id)
                    self._outbox.put(pb.WatchRequest(cancel_request=cancel))
                watch.listener.on_lost(watch.watch_id, _loss(delivery, connection))

    async def _ask_for_progress(self, connection: Connection, outbox: rpc.Outbox[pb.WatchRequest]) -> None:
        while reports_are_ordered(connection.version):
            await asyncio.sleep(self._options.progress_s)
            outbox.put(self._table.progress_request())

    def _token_may_be_stale(self, ended: Ended, login_at: float | None) -> bool:
        # etcd 3.4 reports an expired token on a watch stream as a mere lack of permission.
        old = login_at is not None and time.monotonic() - login_at > self._options.fresh_login_s
        return ended.refused and (old or "auth token" in ended.reason or "auth store" in ended.reason)

    def _on_client_event(self, event: ClientEvent) -> None:
        if not isinstance(event, Connected) or not event.reset:
            return
        message = (
            f"etcd {event.endpoint}: the store was replaced or went back in time; everything is read again"
        )
        loss = WatchLoss("reset", KvstoreError(message))
        for watch in self._table.clear():
            watch.listener.on_lost(watch.watch_id, loss)


def _in_pieces(changes: list[Change]) -> list[Change]:
    """Return what can be delivered in pieces: each key's last change, lest a replaced key seem deleted meanwhile.

    Of a few all are told: they go together, unless they take long.
    """
    return changes if len(changes) <= PIECE else list({change.key: change for change in changes}.values())


def reports_are_ordered(version: str) -> bool:
    """Return whether the server sends a progress report for all watches after the events that it covers.

    Before 3.4.25 and 3.5.8 it overtakes them (etcd issue 15220), and resuming from it would skip some. The
    periodic reports for single watches have always been in order.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return numbers >= (3, 5, 8) or (3, 4, 25) <= numbers < (3, 5)


def _loss(ended: Ended, connection: Connection) -> WatchLoss:
    watch, reason = ended.watch, ended.reason.removeprefix("etcdserver: ") or "no reason given"
    what = f"watch {watch.key.decode(errors='replace')}{'*' if watch.prefix else ''}"
    if ended.compacted:
        reason = f"revision {watch.next_revision} is compacted"
        return WatchLoss(
            "compacted", connection.peer.error("unavailable", what, reason, "its keys are read again")
        )
    if ended.refused and "permission denied" in reason:
        return WatchLoss("permission", connection.peer.error("permission", what, reason))
    return WatchLoss(
        "cancelled", connection.peer.error("unavailable", what, reason, "its keys are read again")
    )
