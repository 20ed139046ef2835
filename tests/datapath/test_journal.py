"""Which entries are ours, on a real map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Entry
from lazymesh.datapath import abi
from lazymesh.datapath.journal import Journal
from lazymesh.datapath.libbpf import MAP_TYPE_HASH, Map
from lazymesh.errors import DatapathError, MapFullError
from tests.datapath.conftest import key_of
from tests.support.packets import NODE_B, POD_B1, POD_B2, pod_of_b

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.datapath.conftest import Bench

ENTRY = Entry(131_073, NODE_B.address(4), 0, 2)
OTHER = Entry(131_074, NODE_B.address(4), 3, 2)
B1, B2 = POD_B1.address(4), POD_B2.address(4)


class TestJournal:
    """Which entries are ours."""

    def test_line_comes_back_as_it_was_written(self, bench: Bench) -> None:
        """Written, replaced, struck out; twice does no harm."""
        journal = bench.datapath.journal
        first, second = abi.OwnedEntry(ENTRY, ENTRY, 2), abi.OwnedEntry(OTHER, ENTRY, 3)
        for address in (B1, POD_B1.address(6)):
            journal.write(address, first)
            journal.write(address, second)
        assert dict(journal.items()) == {B1: second, POD_B1.address(6): second}
        assert journal.read(B1) == second
        assert journal.read(B2) is None
        for _ in range(2):
            journal.remove(B1)
        assert dict(journal.items()) == {POD_B1.address(6): second}

    def test_more_lines_than_a_batch_come_back(self, make_map: Callable[..., Map]) -> None:
        """A restarted agent adopts them all."""
        journal = Journal(make_map(MAP_TYPE_HASH, 24, 56, size=5_000, flags=0))
        line = abi.OwnedEntry(ENTRY, ENTRY, 2)
        for number in range(5_000):
            journal.write(pod_of_b(number).address(4), line)
        assert dict(journal.items()) == {pod_of_b(n).address(4): line for n in range(5_000)}

    def test_foreign_keys_are_passed_over(self, bench: Bench) -> None:
        """A prefix, or a key with another cluster id, is not a line of ours."""
        value = abi.pack_owned(abi.OwnedEntry(ENTRY, ENTRY, 2))
        bench.maps["lm_owned"].update(key_of("10.2.0.0/24"), value)
        bench.maps["lm_owned"].update(bytes(abi.IpcacheKey(prefixlen=64, cluster_id=1, family=1)), value)
        assert list(bench.datapath.journal.items()) == []

    def test_full_journal_says_so(self, make_map: Callable[..., Map]) -> None:
        """Before anything is written to the ipcache."""
        journal = Journal(make_map(MAP_TYPE_HASH, 24, 56, size=1, flags=0))
        line = abi.OwnedEntry(ENTRY, ENTRY, 2)
        journal.write(B1, line)
        journal.write(B1, line)
        with pytest.raises(MapFullError, match="the ownership journal is full"):
            journal.write(B2, line)

    def test_refused_writes_are_one_line(self, make_map: Callable[..., Map]) -> None:
        """A descriptor that is gone stands for every other failure."""
        raw = make_map(MAP_TYPE_HASH, 24, 56)
        journal = Journal(raw)
        raw.close()
        with pytest.raises(DatapathError, match="cannot write to the ownership journal: Bad file"):
            journal.write(B1, abi.OwnedEntry(ENTRY, ENTRY, 2))
        with pytest.raises(DatapathError, match="cannot delete from the ownership journal: Bad file"):
            journal.remove(B1)
