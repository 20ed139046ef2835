"""How the node is asked about Cilium; what it answers there is told by the mesh tier."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from pyroute2 import NetlinkError

from lazymesh.datapath import cilium as module
from lazymesh.datapath.cilium import NodeView
from lazymesh.datapath.hooks import Attachment
from lazymesh.datapath.interfaces import InterfaceSelection
from lazymesh.errors import DatapathError

ALL = InterfaceSelection(("+",))


async def refuse(*_: object) -> Any:
    """Fail as a netlink socket does that has no room for the answer."""
    raise NetlinkError(errno.ENOBUFS)


async def test_kernel_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours, which those who look again and again expect."""
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
    monkeypatch.setattr(module, "_ipcaches_behind", lambda number: frozenset({number + 1}))
    async with NodeView(ALL) as node:
        assert await node.ipcaches() == {8}
        assert node.tcx_in_use
