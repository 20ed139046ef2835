"""Entries that the kernel writes for the agent, many at once: as if each had been written by two system calls."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymesh.core.model import Entry, Reason
from lazymesh.datapath import abi, programs
from lazymesh.datapath.installer import Installer
from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.datapath.journal import Journal, Writer
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.pins import JOURNAL_SPARE, SHARE_OF_MAP, expected_layouts
from tests.datapath.conftest import IPCACHE_SIZE
from tests.support.installs import installs_of
from tests.support.packets import NODE_B, pod_of_b

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lazymesh.core.events import Install
    from lazymesh.core.model import Address
    from lazymesh.datapath.journal import Line
    from tests.datapath.conftest import Bench

    Wanted = Sequence[tuple[Address, Entry, int]]
    InstallWay = Callable[[Installer, Wanted], list[Reason | None]]

NOEXIST = pytest.mark.needs("BPF_NOEXIST")

ENDPOINTS = (NODE_B.address(4), NODE_B.address(6), None)
ENTRIES = [
    Entry(131_073 + n, each, n, {4: 2, 16: 6}.get(len(each or b""), 0)) for n, each in enumerate(ENDPOINTS)
]
THEIRS = Entry(140_000, NODE_B.address(4), 0, 2)
PODS = [
    pod_of_b(ten + number).address(version)
    for ten in range(0, 100, 10)
    for version in (4, 6)
    for number in range(10)
]
"""Ten of IPv4, ten of IPv6, and so on."""
RUNS = [n // 5 if n < 100 else n // 15 for n in range(len(PODS))]
"""Which share an Install: first neighbours of one family only, then of both."""
MANY = [(address, ENTRIES[run % 3], 2 + run % 2) for address, run in zip(PODS, RUNS, strict=True)]


def installer_of(bench: Bench, writer: Writer | None = None) -> Installer:
    """Return an installer that writes in this way, or in that of this kernel's bench."""
    return Installer([bench.ipcache], bench.datapath.journal, True, writer=writer or bench.datapath.writer)


def together(installer: Installer, some: Wanted) -> list[Reason | None]:
    """Install all with one call."""
    return installer.install_many(installs_of(some))


def alone(installer: Installer, some: Wanted) -> list[Reason | None]:
    """Install each with a call of its own, as after a lone miss."""
    return [reason for each in some for reason in installer.install_many(installs_of([each]))]


WAYS = pytest.mark.parametrize("install", [together, alone])


def contents(*maps: Map) -> list[dict[bytes, bytes]]:
    """Return all bytes of maps."""
    return [dict(each.items()) for each in maps]


@WAYS
def test_many_are_written_as_one_by_one(bench: Bench, install: InstallWay) -> None:
    """Byte for byte, in both maps: IPv4 and IPv6, entries of three kinds, in more than one run of the program."""
    assert len(MANY) > 2 * abi.INSTALL_MOST
    ours = [bench.maps[name] for name in ("lm_ipcache", "lm_owned")]
    assert install(installer_of(bench), MANY) == [None] * len(MANY)
    written = contents(*ours)
    bench.wipe()
    other = Installer([bench.ipcache], bench.datapath.journal, True)
    assert [other.install(*each) for each in MANY] == [None] * len(MANY)
    assert contents(*ours) == written
    assert all(map(len, written))


@NOEXIST
@WAYS
def test_theirs_in_the_middle_are_left_alone_and_have_no_line(bench: Bench, install: InstallWay) -> None:
    """As found by the kernel, in the moment of the write; all others are installed."""
    taken = [PODS[0], PODS[abi.INSTALL_MOST - 1], PODS[abi.INSTALL_MOST], PODS[-1]]
    bench.maps["lm_ipcache"].update_many([(abi.pack_address_key(a), abi.pack_entry(THEIRS)) for a in taken])
    reasons = install(installer_of(bench), MANY)
    assert {address for (address, *_), reason in zip(MANY, reasons, strict=True) if reason} == set(taken)
    assert {reason for reason in reasons if reason} == {Reason.NOT_OURS}
    assert {address for address, _ in bench.datapath.journal.items()} == set(PODS) - set(taken)
    assert [bench.ipcache.lookup(address) for address in taken] == [THEIRS] * len(taken)


@WAYS
def test_full_journal_ends_it_for_those_without_room_alone(bench: Bench, install: InstallWay) -> None:
    """And what has no line has no entry."""
    room = 70
    lines = [(number.to_bytes(24, "big"), bytes(56)) for number in range(bench.datapath.journal.size - room)]
    bench.maps["lm_owned"].update_many(lines)
    told: list[None] = []
    installer = installer_of(bench)
    installer.on_full = lambda: told.append(None)
    assert install(installer, MANY) == [None] * room + [Reason.MAP_FULL] * (len(MANY) - room)
    assert told
    assert len(dict(bench.maps["lm_ipcache"].items())) == room


@pytest.mark.parametrize("by_program", [True, False])
def test_journal_has_room_for_an_earlier_life_and_a_full_budget(bench: Bench, by_program: bool) -> None:
    """What that has left beyond our budget goes as the resolver says so, when entries of this life may have come."""
    budget = IPCACHE_SIZE // SHARE_OF_MAP
    writer = bench.datapath.writer if by_program else None
    for life in range(2):
        installer = Installer([bench.ipcache], bench.datapath.journal, True, writer=writer)
        assert len(list(installer.adopt())) == life * budget
        pods = [bytes([10, 2 + life, *divmod(number, 256)]) for number in range(budget)]
        for at in range(0, budget, 200):
            some = [(address, ENTRIES[0], 2) for address in pods[at : at + 200]]
            assert installer.install_many(installs_of(some)) == [None] * 200
    assert bench.datapath.journal.size - 2 * budget == JOURNAL_SPARE


@WAYS
def test_full_ipcache_leaves_no_line(bench: Bench, install: InstallWay) -> None:
    """What was written for the entry is taken back."""
    room = 70
    taken = [
        (abi.pack_address_key((0xC000_0000 + n).to_bytes(4)), bytes(24)) for n in range(IPCACHE_SIZE - room)
    ]
    bench.maps["lm_ipcache"].update_many(taken)
    reasons = install(installer_of(bench), MANY)
    assert reasons == [None] * room + [Reason.MAP_FULL] * (len(MANY) - room)
    assert {address for address, _ in bench.datapath.journal.items()} == set(PODS[:room])


def test_kernel_that_does_not_run_it_is_asked_one_by_one(bench: Bench) -> None:
    """A descriptor that is not a program stands for every refusal."""
    nothing = os.open("/dev/null", os.O_RDONLY)
    try:
        assert Writer(nothing).write(installs_of(MANY)) == [None] * len(MANY)
        assert installer_of(bench, Writer(nothing)).install_many(installs_of(MANY)) == [None] * len(MANY)
    finally:
        os.close(nothing)


@pytest.mark.parametrize("ran", [0, 70, len(MANY)])
def test_run_that_ends_in_an_error_is_looked_at(bench: Bench, ran: int) -> None:
    """A kernel may report EINTR after all is done: what was written is ours, with its line, and the rest is written."""

    class Interrupted(Writer):
        def write(self, _installs: Iterable[Install]) -> list[bool | None]:
            super().write(installs_of(MANY[:ran]))
            return [None] * len(MANY)

    installer = installer_of(bench, Interrupted(bench.datapath.writer.program))
    assert installer.install_many(installs_of(MANY)) == [None] * len(MANY)
    assert dict(bench.datapath.journal.items()).keys() == set(PODS)
    assert all(installer.evict(address) for address in PODS)
    assert contents(bench.maps["lm_ipcache"], bench.maps["lm_owned"]) == [{}, {}]


@NOEXIST
def test_theirs_that_equals_ours_is_not_taken_for_it_after_an_error(bench: Bench) -> None:
    """It has no line of ours."""
    for address, entry, _ in MANY[:10]:
        bench.maps["lm_ipcache"].update(abi.pack_address_key(address), abi.pack_entry(entry))
    reasons = installer_of(bench, Writer(-1)).install_many(installs_of(MANY[:20]))
    assert reasons == [Reason.NOT_OURS] * 10 + [None] * 10


@pytest.mark.parametrize(
    ("shared", "count", "used"), [(False, 60, True), (False, 3, False), (True, 60, False)]
)
def test_writer_is_for_many_and_for_a_map_of_our_own(
    bench: Bench, shared: bool, count: int, used: bool
) -> None:
    """It writes no tag, and for a few there is nothing to be gained."""
    asked: list[int] = []

    class Spy(Writer):
        def write(self, installs: Iterable[Install]) -> list[bool | None]:
            written = super().write(installs)
            asked.append(len(written))
            return written

    tag = 0x6D6C if shared else 0
    ipcache = IpcacheMap(bench.maps["lm_ipcache"], Path("/the/ipcache"), tag)
    spy = Spy(bench.datapath.writer.program)
    installer = Installer([ipcache], bench.datapath.journal, True, shared=shared, writer=spy)
    assert installer.install_many(installs_of(MANY[:count])) == [None] * count
    assert asked == [count] * used
    assert len(list(ipcache.tagged())) == count


@WAYS
def test_what_is_ours_already_is_written_again(
    bench: Bench, install: InstallWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another entry, but never with the line of a new one: after a crash the old entry would be nobody's."""
    installer = installer_of(bench)
    install(installer, MANY[:20])
    lines: list[Line] = []
    monkeypatch.setattr(bench.datapath.journal, "write_many", lines.extend)
    again = [(address, ENTRIES[1], 2) for address, *_ in MANY[:20]]
    assert install(installer, again) == [None] * 20
    assert [bench.ipcache.lookup(address) for address, *_ in again] == [ENTRIES[1]] * 20
    assert installer.added == 20
    assert not lines


@WAYS
def test_what_was_ours_in_an_old_map_only_is_ours_in_the_first_one_then(
    bench: Bench, install: InstallWay
) -> None:
    """And no more counted among those that went with the old one."""
    installer = installer_of(bench)
    installer._beside.update(PODS[:5])
    install(installer, MANY)
    assert not any(installer.is_lost(address) for address in PODS)


def test_without_an_ipcache_of_our_own_nothing_is_written(bench: Bench) -> None:
    """Beside Cilium the programs look into other maps, and this one is not for those."""
    bench.datapath.visible.show([])
    try:
        assert bench.datapath.writer.write(installs_of(MANY)) == [False] * len(MANY)
        assert contents(bench.maps["lm_ipcache"], bench.maps["lm_owned"]) == [{}, {}]
    finally:
        bench.datapath.visible.show([bench.ipcache])


@NOEXIST
def test_a_run_has_as_many_lines_as_both_sides_say(bench: Bench) -> None:
    """The program looks at no more, and not at a part of one; each has its own result."""
    program = bench.datapath.writer.program
    lines = abi.pack_installs(PODS[: abi.INSTALL_MOST + 1], ENTRIES[0], 2)
    full, rest = abi.pack_install_runs(lines)
    line = len(rest) - abi.INSTALL_HEAD
    assert len(full) == abi.INSTALL_HEAD + abi.INSTALL_MOST * line
    verdict, packet = programs.run_program(program, full + lines[-line:])
    assert (verdict, abi.unpack_installed(packet)[:-1]) == (0, [0] * abi.INSTALL_MOST)
    assert packet[-line:] == lines[-line:]
    verdict, packet = programs.run_program(program, full[: abi.INSTALL_HEAD + 3 * line - 1])
    assert (verdict, abi.unpack_installed(packet[: 1 - line])) == (0, [-errno.EEXIST] * 2)


FEW = PODS[5:13]
STEPS = st.one_of(
    st.tuples(
        st.just("install"), st.dictionaries(st.sampled_from(FEW), st.sampled_from(ENTRIES), max_size=8)
    ),
    st.tuples(st.just("evict"), st.sampled_from(FEW)),
    st.tuples(st.sampled_from(["they write", "they delete"]), st.sampled_from(FEW)),
    st.tuples(st.just("restart"), st.none()),
)


@NOEXIST
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=12))
def test_any_history_ends_as_without_it(shared_bench: Bench, steps: list[tuple[str, object]]) -> None:
    """Installs, evictions, foreign writes, restarts: same answers, same bytes."""
    shared_bench.wipe()
    with Twins(shared_bench) as twins:
        for what, argument in steps:
            one, other = (twins.take(side, what, argument) for side in (0, 1))
            assert one == other
        assert contents(*twins.maps[0]) == contents(*twins.maps[1])


class Twins:
    """Two nodes that the same befalls: one with the writer, one without."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        layouts = expected_layouts(IPCACHE_SIZE)
        plain = tuple(Map.create("lm_test", layouts[name]) for name in ("lm_ipcache", "lm_owned"))
        self.maps = [(bench.maps["lm_ipcache"], bench.maps["lm_owned"]), plain]
        self._writers = [bench.datapath.writer, None]
        self._installers = [self._new(0), self._new(1)]

    def __enter__(self) -> Twins:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.maps[1]:
            each.close()

    def _new(self, side: int) -> Installer:
        ipcache, journal = self.maps[side]
        opened = IpcacheMap(ipcache, Path("/the/ipcache"))
        return Installer([opened], Journal(journal), True, writer=self._writers[side])

    def take(self, side: int, what: str, argument: object) -> object:
        """Have one of them go through it; return what it says."""
        installer, ipcache = self._installers[side], self.maps[side][0]
        match what, argument:
            case "install", dict() as entries:
                wanted = installs_of((address, entry, 2) for address, entry in entries.items())
                return installer.install_many(wanted)
            case "evict", bytes() as address:
                return installer.evict(address)
            case "they write", bytes() as address:
                return ipcache.update(abi.pack_address_key(address), abi.pack_entry(THEIRS))
            case "they delete", bytes() as address:
                return ipcache.delete(abi.pack_address_key(address))
        self._installers[side] = self._new(side)
        return sorted(address for address, *_ in self._installers[side].adopt())
