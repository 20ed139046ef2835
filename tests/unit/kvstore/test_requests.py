"""Requests and answers: ranges, batches in order, pages behind the last key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import requests
from lazymesh.kvstore.model import KeyValue
from lazymesh.kvstore.requests import Reads, Whole


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"cilium/state/", b"cilium/state0"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"", b"\0")],
    ids=["text", "ends in 255", "nothing is greater", "everything"],
)
def test_end_of_a_prefix_is_the_next_key_that_lacks_it(prefix: bytes, end: bytes) -> None:
    """A zero byte means to etcd that the range has no end."""
    assert requests.prefix_end(prefix) == end


@given(prefix=st.binary(min_size=1, max_size=6), rest=st.binary(max_size=4))
def test_range_of_a_prefix_holds_every_key_that_has_it(prefix: bytes, rest: bytes) -> None:
    """No key with the prefix lies at or behind the end of its range."""
    end = requests.prefix_end(prefix)
    assert end == b"\0" or prefix + rest < end
    assert end == b"\0" or not end.startswith(prefix)


def test_batch_asks_for_each_key_without_consensus_and_answers_in_order() -> None:
    """All reads are serializable, and a missing key keeps its place."""
    request = requests.read_batch([b"a", b"b"])
    assert [op.request_range.key for op in request.success] == [b"a", b"b"]
    assert all(op.request_range.serializable for op in request.success)
    found = pb.RangeResponse(kvs=[pb.KeyValue(key=b"b", value=b"v", mod_revision=7, lease=3)])
    answer = pb.TxnResponse(
        header=pb.ResponseHeader(revision=9),
        responses=[pb.ResponseOp(response_range=pb.RangeResponse()), pb.ResponseOp(response_range=found)],
    )
    result = requests.read_result(answer, 2)
    assert result.revision == 9
    assert result.values == [None, KeyValue(b"b", b"v", 7, 3)]


def test_next_page_begins_behind_the_last_key_at_the_same_revision() -> None:
    """The smallest key behind another is that key and a zero byte."""
    first = requests.read_page(b"p/", None, 0, 100)
    assert (first.key, first.range_end, first.revision) == (b"p/", b"p0", 0)
    second = requests.read_page(b"p/", b"p/9", 12, 100)
    assert (second.key, second.range_end, second.revision) == (b"p/9\0", b"p0", 12)


def test_write_batch_deletes_where_there_is_no_value() -> None:
    """An empty value is a value, None is a deletion; the lease goes to what is put."""
    put, empty, delete = requests.write_batch([(b"a", b"1"), (b"b", b""), (b"c", None)], lease=5).success
    assert (put.request_put.key, put.request_put.value, put.request_put.lease) == (b"a", b"1", 5)
    assert empty.WhichOneof("request") == "request_put"
    assert delete.request_delete_range.key == b"c"


@given(keys=st.lists(st.binary(min_size=1, max_size=130), min_size=1, max_size=5))
def test_reads_are_encoded_as_the_library_would(keys: list[bytes]) -> None:
    """Byte for byte, for keys short and long."""
    assert requests.encode_reads(Reads(keys)) == requests.read_batch(keys).SerializeToString()


@given(prefixes=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4))
def test_reads_of_prefixes_are_encoded_as_the_library_would(prefixes: list[bytes]) -> None:
    """Byte for byte, for lengths that take one byte and two."""
    pages = [requests.read_page(prefix, None, 0, requests.WHOLE_MOST) for prefix in prefixes]
    expected = pb.TxnRequest(success=[pb.RequestOp(request_range=page) for page in pages])
    assert requests.encode_reads(Reads([], [Whole(prefixes, [b"1"])])) == expected.SerializeToString()


def test_prefixes_are_read_before_keys_and_answered_key_by_key() -> None:
    """Only what is wanted of a prefix is told, in the order in which it is wanted."""
    reads = Reads([b"x/1"], [Whole([b"p/1.", b"q/1."], [b"2", b"9"]), Whole([b"p/2."], [b"5"])])
    request = pb.TxnRequest.FromString(requests.encode_reads(reads))
    p, q, other, single = [op.request_range for op in request.success]
    assert [(p.key, p.range_end), (q.key, q.range_end)] == [(b"p/1.", b"p/1/"), (b"q/1.", b"q/1/")]
    assert other.key == b"p/2."
    assert p.serializable
    assert q.limit == requests.WHOLE_MOST
    assert (single.key, single.range_end) == (b"x/1", b"")
    found = [pb.KeyValue(key=b"p/1.1", value=b"other"), pb.KeyValue(key=b"p/1.9", value=b"wanted")]
    also = [pb.KeyValue(key=b"p/2.5", value=b"also"), pb.KeyValue(key=b"p/2.9", value=b"other")]
    answer = of_ranges(
        pb.RangeResponse(kvs=found),
        pb.RangeResponse(),
        pb.RangeResponse(kvs=also),
        pb.RangeResponse(kvs=[pb.KeyValue(value=b"x")]),
    )
    assert requests.values_of(answer, reads).values == (None, None, b"wanted", None, b"also", b"x")


def test_prefix_with_too_much_below_it_is_no_answer() -> None:
    """What is beyond the limit would look as if it did not exist."""
    reads = Reads([], [Whole([b"p/1."], [b"2"])])
    crowd = [pb.KeyValue(key=b"p/1.2")] * (requests.WHOLE_MOST + 1)
    for answer in (pb.RangeResponse(more=True), pb.RangeResponse(kvs=crowd)):
        with pytest.raises(KvstoreError, match=r"more than 256 keys below p/1\.\*") as refused:
            requests.values_of(of_ranges(answer), reads)
        assert refused.value.kind == "exhausted"


def of_ranges(*answers: pb.RangeResponse) -> pb.TxnResponse:
    """Return a transaction's answer."""
    return pb.TxnResponse(responses=[pb.ResponseOp(response_range=one) for one in answers])


def test_answers_to_other_questions_are_refused() -> None:
    """A server that answers two reads with one answer says nothing that could be told apart."""
    with pytest.raises(KvstoreError, match="1 answers to 2 reads") as refused:
        requests.read_result(pb.TxnResponse(responses=[pb.ResponseOp()]), 2)
    assert refused.value.kind == "protocol"


@pytest.mark.parametrize("keys", [[], [b"p/1"], [b"p/0", b"p/1"]])
def test_listing_that_does_not_go_on_is_refused(keys: list[bytes]) -> None:
    """Else it would go on for ever."""
    page = pb.RangeResponse(kvs=[pb.KeyValue(key=key) for key in keys], more=True)
    with pytest.raises(KvstoreError, match="without progress"):
        requests.next_page(page, b"p/1")


def test_listing_goes_on_behind_its_last_key() -> None:
    """And ends where the server says so."""
    page = pb.RangeResponse(kvs=[pb.KeyValue(key=b"p/1"), pb.KeyValue(key=b"p/2")], more=True)
    assert requests.next_page(page, None) == b"p/2"
    assert requests.next_page(pb.RangeResponse(), b"p/2") is None
