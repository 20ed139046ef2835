"""The node around a Cilium, as the kernel reports it."""

from __future__ import annotations

import asyncio
import os

from lazymesh.datapath.cilium import NodeView
from lazymesh.datapath.interfaces import InterfaceSelection
from tests.support.namespaces import NamespaceSet

_ADDRESSES = [f"10.9.{number // 250}.{1 + number % 250}" for number in range(1_000)]
"""More than one answer of the kernel holds."""


def test_questions_asked_at_the_same_time_are_all_answered() -> None:
    """The kernel gives one list at a time on a socket, and calls it busy meanwhile."""

    async def ask() -> None:
        async with NodeView(InterfaceSelection(("lxc+",))) as node:
            questions = [ask() for _ in range(10) for ask in (node.addresses, node.chains, node.ipcaches)]
            answers = await asyncio.gather(*questions)
        assert all(len(answers[n]) >= len(_ADDRESSES) for n in range(0, 30, 3))
        assert all(list(answers[n]) == ["lxc0"] for n in range(1, 30, 3))

    with NamespaceSet(["node"]) as spaces:
        node = spaces["node"]
        node.ip(
            [
                "link add lxc0 type veth peer name pod",
                "link set lo up",
                *(f"addr add {one}/32 dev lo" for one in _ADDRESSES),
            ]
        )
        node.run("tc", "qdisc", "add", "dev", "lxc0", "clsact")
        node.call(asyncio.run, ask())


def test_a_name_need_not_be_text() -> None:
    """The kernel takes any bytes for a name, without blanks."""
    odd = b"lxc\xff\x1c"

    async def ask() -> list[str]:
        async with NodeView(InterfaceSelection(("lxc+",))) as view:
            return list(await view.chains())

    with NamespaceSet(["node"]) as spaces:
        spaces["node"].run("ip", "link", "add", os.fsdecode(odd), "type", "veth", "peer", "name", "pod")
        assert spaces["node"].call(asyncio.run, ask()) == [os.fsdecode(odd)]
