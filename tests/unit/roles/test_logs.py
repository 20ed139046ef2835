"""Logs that do not flood, and that stop nobody."""

from __future__ import annotations

import os

from lazymesh.roles.logs import LogSink, OncePer


def test_key_speaks_once_in_its_period() -> None:
    """Each key for itself."""
    once = OncePer(60)
    assert [once("a", 0), once("a", 1), once("b", 1), once("a", 59), once("a", 60)] == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_memory_is_bounded_and_recovers() -> None:
    """A flood of new keys is silenced; once old ones are over, new ones speak."""
    once = OncePer(60, keys=2)
    assert [once(key, 0) for key in "abc"] == [True, True, False]
    assert once.full
    assert once("c", 61)
    assert not once.full


def test_being_turned_away_costs_next_to_nothing() -> None:
    """A hundred thousand of them must not keep anybody else waiting."""
    once = OncePer(600, keys=1_000)
    assert sum(once(number, number / 1e6) for number in range(1_000)) == 1_000
    looked_at = once._until
    assert not any(once(number, 1.0) for number in range(1_000, 50_000))
    assert once._until.keys() == looked_at.keys()
    seen = id(once._until)
    assert not once("another", 2.0)
    assert id(once._until) == seen, "nobody has looked through all of them again"


def test_line_is_written_whole() -> None:
    """However long it is."""
    reader, writer = os.pipe()
    sink = LogSink(writer)
    sink.write("é" * 5_000 + "\n")
    sink.flush()
    assert os.read(reader, 20_000) == "é".encode() * 5_000 + b"\n"
    assert sink.lost == 0
    os.close(reader)
    sink.write("to nobody\n")
    assert sink.lost == 1
    os.close(writer)


def test_full_disk_loses_lines() -> None:
    """Each is counted, and raises nothing."""
    with open("/dev/full", "wb") as full:  # noqa: PTH123 (a file descriptor is wanted)
        sink = LogSink(full.fileno())
        for _ in range(3):
            sink.write("a line\n")
        assert sink.lost == 3


def test_pipe_that_is_not_read_loses_lines_and_waits_for_nobody() -> None:
    """Once there is room again, lines come through again."""
    reader, writer = os.pipe()
    sink = LogSink(writer)
    while not sink.lost:
        sink.write("x" * 4_095 + "\n")
    os.read(reader, 1 << 20)
    sink.write("heard\n")
    assert os.read(reader, 100) == b"heard\n"
    assert sink.lost == 1
    os.close(reader)
    os.close(writer)
