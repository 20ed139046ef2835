"""How the node is asked about Cilium; its answers are tested in the mesh tier."""

from __future__ import annotations

import asyncio
import errno
from itertools import pairwise
from typing import Any

import pytest
from pyroute2 import NetlinkError

from lazymesh.datapath import cilium as module
from lazymesh.datapath.cilium import NodeView
from lazymesh.datapath.hooks import Attachment
from lazymesh.datapath.interfaces import InterfaceSelection
from lazymesh.datapath.programs import ProgramDescription
from lazymesh.errors import DatapathError

ALL = InterfaceSelection(("+",))
NOTHING: frozenset[int] = frozenset()


async def refuse(*_: object) -> Any:
    """Fail as a netlink socket does that has no room for the answer."""
    raise NetlinkError(errno.ENOBUFS)


async def test_kernel_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DatapathError, which callers that retry expect."""
    monkeypatch.setattr(module, "tcx_attachments", lambda _index: [])
    monkeypatch.setattr(module, "clsact_attachments", refuse)
    async with NodeView(ALL) as node:
        with pytest.raises(DatapathError, match="cannot ask the kernel"):
            await node.ipcaches()


async def test_filters_are_not_asked_for_where_cilium_is_on_tcx(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hundreds of interfaces that is what a look costs."""
    monkeypatch.setattr(
        module, "tcx_attachments", lambda _index: [Attachment("tcx", "cil_from_container", 7)]
    )
    monkeypatch.setattr(module, "clsact_attachments", refuse)
    monkeypatch.setattr(module, "_ipcaches_behind", lambda number, _: frozenset({number + 1}))
    async with NodeView(ALL) as node:
        assert await node.ipcaches() == {8}
        assert node.tcx_in_use


class Kernel:
    """Programs and maps as the test says: of each program its maps, of each map whether it is one, and its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, endpoints: list[int]) -> None:
        self.programs: dict[int, tuple[int, ...]] = {}
        self.maps: dict[int, tuple[bool, tuple[int, ...]]] = {}
        self.asked: list[str] = []
        theirs = [Attachment("tcx", "cil_from_container", number) for number in endpoints]
        monkeypatch.setattr(NodeView, "_selected", lambda _: [(number, "lxc") for number in endpoints])
        monkeypatch.setattr(module, "tcx_attachments", lambda index: [theirs[endpoints.index(index)]])
        monkeypatch.setattr(module.programs, "describe_program", self.describe)
        monkeypatch.setattr(module, "_look_into", self.look_into)

    def describe(self, number: int) -> ProgramDescription:
        """Return a program's maps."""
        self.asked.append(f"program {number}")
        return ProgramDescription("cil_from_container", self.programs[number])

    def look_into(self, map_id: int) -> tuple[bool, tuple[int, ...]]:
        """Return what a map is."""
        self.asked.append(f"map {map_id}")
        return self.maps[map_id]


async def test_program_is_asked_about_until_it_leads_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an endpoint is set up its array of tail calls is empty; after that nothing changes."""
    kernel = Kernel(monkeypatch, [1])
    kernel.programs, kernel.maps = {1: (10,), 2: (20,)}, {10: (False, ()), 20: (True, ())}
    async with NodeView(ALL) as node:
        assert await node.ipcaches() == NOTHING
        kernel.maps[10] = False, (2,)
        assert await node.ipcaches() == {20}
        kernel.asked.clear()
        assert await node.ipcaches() == {20}
        assert kernel.asked == []


async def test_many_new_programs_are_walked_with_pauses_and_each_map_is_looked_into_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty endpoints with 35 tail calls of twenty maps each kept the event loop for a fifth of a second."""
    kernel = Kernel(monkeypatch, [1, 2, 3])
    kernel.programs = {1: (10, 20), 2: (10, 20), 3: (10, 20), 4: (10, 20, 30), 5: (10, 20, 30)}
    kernel.maps = {10: (False, (4, 5)), 20: (True, ()), 30: (False, ())}
    loop = asyncio.get_running_loop()

    def turn() -> None:
        kernel.asked.append("a turn of the loop")
        loop.call_soon(turn)

    loop.call_soon(turn)
    async with NodeView(ALL) as node:
        await asyncio.sleep(0)
        kernel.asked.clear()
        assert await node.ipcaches() == {20}
    assert sorted(each for each in kernel.asked if each.startswith("map")) == ["map 10", "map 20", "map 30"]
    walked = [kernel.asked.index(f"program {number}") for number in (1, 2, 3)]
    for one, next_one in pairwise(walked):
        assert "a turn of the loop" in kernel.asked[one:next_one]
