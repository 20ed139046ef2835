"""What check makes of maps, programs and devices; on a real node that is told by the mesh tier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from lazymesh.datapath.hooks import Attachment
from lazymesh.errors import DatapathError
from lazymesh.roles import checkcilium as module
from lazymesh.roles.checkcilium import check_cilium

if TYPE_CHECKING:
    from lazymesh.roles.checkresult import CheckResult


class FakeNode:
    """A node as the test says it is."""

    def __init__(self, netkit: list[str], chains: dict[str, list[Attachment]]) -> None:
        self._netkit, self._chains = netkit, chains
        self.tcx_in_use = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def ipcaches(self) -> frozenset[int]:
        """No program of Cilium's."""
        return frozenset()

    async def chains(self) -> dict[str, list[Attachment]]:
        """The programs."""
        return self._chains

    async def netkit(self) -> list[str]:
        """The devices."""
        return self._netkit


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what finds on such a node."""

    async def found(
        netkit: list[str], chains: dict[str, list[Attachment]] | None = None
    ) -> dict[str, CheckResult]:
        monkeypatch.setattr(module, "pinned_ipcaches", lambda _bpffs: {})
        monkeypatch.setattr(module, "NodeView", lambda _selection: FakeNode(netkit, chains or {}))
        return {each.name: each async for each in check_cilium(Path("/sys/fs/bpf"), ("lxc+",))}

    return found


async def test_netkit_devices_are_named_as_unsupported(look: Any) -> None:
    """The first few, and how many more; with what to do."""
    result = (await look([f"lxc{number}" for number in range(5)]))["interfaces"]
    assert result.verdict == "fail"
    assert result.text.startswith(
        "lxc0, lxc1, lxc2 and 2 more: netkit devices, which lazymesh does not support"
    )
    assert "veth" in result.text
    assert "interfaces" not in await look([])


async def test_place_of_our_programs(look: Any) -> None:
    """First everywhere, behind somebody somewhere, nowhere at all."""
    ours, theirs = Attachment("tcx", "lm_from_pod", 7), Attachment("tcx", "netflow", 8)
    first = await look([], {"lxc0": [ours, theirs], "lxc1": [theirs]})
    assert (first["attachment"].verdict, first["attachment"].text) == (
        "ok",
        "our program is the first on lxc0",
    )
    behind = await look([], {"lxc0": [ours], "lxc1": [theirs, ours]})
    assert behind["attachment"].verdict == "warn"
    assert "lxc1: netflow is ahead of our program on lxc1" in behind["attachment"].text
    assert "attachment" not in await look([], {"lxc0": [theirs], "lxc1": []})


async def test_what_cannot_be_looked_at_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root, for one."""

    def refuse(_bpffs: Path) -> dict[Path, int]:
        raise DatapathError("cannot open it: Permission denied")

    monkeypatch.setattr(module, "pinned_ipcaches", refuse)
    (result,) = [each async for each in check_cilium(Path("/sys/fs/bpf"), ("lxc+",))]
    assert result.verdict == "fail"
    assert "Permission denied" in result.text
