"""From where watches resume: never past what was not delivered whole, never behind what was reported."""

from __future__ import annotations

import pytest

from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore.model import Change
from lazymesh.kvstore.resume import ALL_WATCHES, Changed, Ended, Live, WatchTable


class Deaf:
    """A listener that the table must not call."""


def table_with(*keys: bytes, start: int = 10) -> WatchTable:
    """Return a table on a fresh stream on which the server has taken up a watch for each key."""
    table = WatchTable()
    for key in keys:
        table.add(key, Deaf(), start, prefix=False)  # type: ignore[arg-type]
    for request in table.start_stream():
        table.digest(response(request.create_request.watch_id, revision=start, created=True))
    return table


def response(watch_id: int, revision: int, *events: pb.Event, **fields: object) -> pb.WatchResponse:
    """Return a response as etcd sends it."""
    header = pb.ResponseHeader(revision=revision)
    return pb.WatchResponse(header=header, watch_id=watch_id, events=events, **fields)  # type: ignore[arg-type]


def put(key: bytes, revision: int) -> pb.Event:
    """Return the event of one key written."""
    return pb.Event(type=pb.Event.PUT, kv=pb.KeyValue(key=key, value=b"v", mod_revision=revision))


def resumed_at(table: WatchTable) -> list[int]:
    """Return the start revisions that the next stream would ask for."""
    return [request.create_request.start_revision for request in table.start_stream()]


def test_resumes_behind_the_last_event_not_behind_the_header() -> None:
    """A watch that is catching up is told the store's revision, which is ahead of its own."""
    table = table_with(b"a")
    assert table.digest(response(1, 50, put(b"a", 12), put(b"a", 13))) == Changed(
        table.watches[1], [Change(b"a", b"v", 12), Change(b"a", b"v", 13)]
    )
    assert resumed_at(table) == [14]


def test_fragments_are_delivered_together_or_not_at_all() -> None:
    """A stream that breaks between two fragments leaves the watch where it was."""
    table = table_with(b"a")
    assert table.digest(response(1, 20, put(b"a", 20), fragment=True)) is None
    assert resumed_at(table) == [10]
    assert table.digest(response(1, 20, put(b"a", 20), fragment=True)) is None
    delivered = table.digest(response(1, 20, put(b"b", 20)))
    assert isinstance(delivered, Changed)
    assert [change.key for change in delivered.changes] == [b"a", b"b"]
    assert resumed_at(table) == [21]


def test_delete_event_has_no_value() -> None:
    """None tells a deletion from an empty value."""
    table = table_with(b"a")
    gone = pb.Event(type=pb.Event.DELETE, kv=pb.KeyValue(key=b"a", mod_revision=11))
    assert table.digest(response(1, 11, gone)) == Changed(table.watches[1], [Change(b"a", None, 11)])


def test_progress_of_one_watch_moves_that_one() -> None:
    """A quiet key must not be resumed at a revision compacted long ago."""
    table = table_with(b"a", b"b")
    assert table.digest(response(1, 70)) is None
    assert resumed_at(table) == [71, 10]


def test_progress_of_all_moves_those_that_were_there_when_it_was_asked_for() -> None:
    """A watch added after the question may be catching up behind the reported revision."""
    table = table_with(b"a")
    table.progress_request()
    late = table.add(b"b", Deaf(), 30, prefix=False)  # type: ignore[arg-type]
    table.create_request(late)
    assert table.digest(response(ALL_WATCHES, 90)) is None
    assert resumed_at(table) == [91, 30]


def test_progress_never_moves_a_watch_back() -> None:
    """A watch may start ahead of the store."""
    table = table_with(b"a", start=100)
    table.digest(response(1, 60))
    assert resumed_at(table) == [100]


def test_watch_from_now_on_is_resumed_from_when_it_was_taken_up() -> None:
    """Revision 0 means now once, and not again after each reconnect."""
    table = table_with(b"a", start=0)
    table.clear()
    watch = table.add(b"b", Deaf(), 0, prefix=False)  # type: ignore[arg-type]
    table.create_request(watch)
    assert table.digest(response(watch.watch_id, 40, created=True)) == Live(watch, 40)
    assert resumed_at(table) == [41]


@pytest.mark.parametrize("answered_id", [ALL_WATCHES, 2], ids=["etcd 3.5", "etcd 3.4"])
def test_refusal_finds_its_watch_by_the_order_of_creation(answered_id: int) -> None:
    """Newer etcds do not say which creation they refuse."""
    table = WatchTable()
    for key in (b"a", b"b", b"c"):
        table.add(key, Deaf(), 5, prefix=False)  # type: ignore[arg-type]
    table.start_stream()
    table.digest(response(1, 5, created=True))
    refusal = response(
        answered_id, 5, created=True, canceled=True, cancel_reason="etcdserver: permission denied"
    )
    ended = table.digest(refusal)
    assert isinstance(ended, Ended)
    assert (ended.watch.key, ended.refused, ended.compacted) == (b"b", True, False)
    assert set(table.watches) == {1, 3}
    assert isinstance(table.digest(response(3, 5, created=True)), Live)


def test_compacted_watch_ends() -> None:
    """Its missing revisions cannot be had any more."""
    table = table_with(b"a")
    ended = table.digest(response(1, 80, canceled=True, compact_revision=60))
    assert isinstance(ended, Ended)
    assert ended.compacted
    assert resumed_at(table) == []


def test_events_of_a_removed_watch_are_ignored() -> None:
    """They were on their way when it was removed."""
    table = table_with(b"a")
    assert table.remove(1)
    assert table.digest(response(1, 20, put(b"a", 20))) is None
    assert not table.remove(1)


def test_prefix_watch_asks_for_its_range_and_key_watch_for_the_key() -> None:
    """Both want fragments and progress reports."""
    table = WatchTable()
    for prefix in (True, False):
        table.add(b"p/", Deaf(), 5, prefix=prefix)  # type: ignore[arg-type]
    wide, narrow = (request.create_request for request in table.start_stream())
    assert (wide.range_end, narrow.range_end) == (b"p0", b"")
    assert all((create.fragment, create.progress_notify) == (True, True) for create in (wide, narrow))


def test_fragments_without_end_are_given_up() -> None:
    """A server that never ends a response would fill the memory; the watch ends, and the server is to be told."""
    table = table_with(b"a", b"b")
    large = pb.Event(kv=pb.KeyValue(key=b"a", value=bytes(1 << 20), mod_revision=20))
    ends = [table.digest(response(1, 20, large, fragment=True)) for _ in range(40)]
    (ended,) = [end for end in ends if end is not None]
    assert isinstance(ended, Ended)
    assert ended.ours
    assert ended.reason == "a response without end"
    assert list(table.watches) == [2]
    assert table.digest(response(2, 21, large, fragment=True)) is None


def test_fragments_of_nothing_are_no_change() -> None:
    """Nobody sends that, and nobody is told."""
    table = table_with(b"a")
    assert table.digest(response(1, 20, fragment=True)) is None
    assert table.digest(response(1, 20)) is None


def test_report_of_one_stream_moves_no_watch_of_the_next() -> None:
    """The marks begin anew there: a watch that was added since would skip what it was never told."""
    table = WatchTable()
    first = table.add(b"a", Deaf(), 5, prefix=False)  # type: ignore[arg-type]
    table.start_stream()
    table.progress_request()
    table.digest(pb.WatchResponse(header=pb.ResponseHeader(revision=50), watch_id=-1))
    later = table.add(b"b", Deaf(), 10, prefix=False)  # type: ignore[arg-type]
    table.start_stream()
    assert (first.next_revision, later.next_revision) == (51, 10)
    table.remove(first.watch_id)
    another = table.add(b"c", Deaf(), 10, prefix=False)  # type: ignore[arg-type]
    table.create_request(another)
    table.start_stream()
    assert another.next_revision == 10


def test_revision_beyond_the_last_is_not_asked_for() -> None:
    """A store may say that it is at the last one there is; the next has no bytes."""
    table = WatchTable()
    table.add(b"a", Deaf(), 1 << 63, prefix=True)  # type: ignore[arg-type]
    (request,) = table.start_stream()
    assert request.create_request.start_revision == (1 << 63) - 1
