"""Somebody else's program on a pod's hook: what a netflow collector beside Cilium looks like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from lazymesh.datapath.libbpf import MAP_TYPE_ARRAY, Map, MapLayout
from tests.support import tcx
from tests.support.bpfobject import BpfObject, compile_bpf, program_info
from tests.support.tcx import Filter, TcxLink

if TYPE_CHECKING:
    from tests.support.namespaces import Namespace


class Bystander:
    """A program that counts packets and hands them on; loaded when entered, detached from tcx when left."""

    def __init__(self, node: Namespace, directory: Path) -> None:
        self._node = node
        self._seen = Map.create("bystander_seen", MapLayout(MAP_TYPE_ARRAY, 4, 8, 1, 0))
        source = Path(__file__).with_suffix(".c")
        self._object = BpfObject(
            compile_bpf(source, directory / "bystander.o"), ["bystander"], {"bystander_seen": self._seen.fd}
        )
        self._program = self._object.program("bystander")
        self.program_id = program_info(self._program).program_id
        self._links: list[TcxLink] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for link in self._links:
            link.close()
        self._object.close()
        self._seen.close()

    @property
    def packets(self) -> int:
        """How many packets it saw, on all its hooks."""
        return int.from_bytes(self._seen.lookup(bytes(4)) or b"", "little")

    def attach(self, interface: str, *, head: bool = True) -> TcxLink:
        """Go to the head or the tail of an interface's tcx ingress."""
        link = self._node.call(TcxLink.attach, self._program, interface, head=head)
        self._links.append(link)
        return link

    def filter(self, interface: str, priority: int = 5, handle: int = 7, hook: str = tcx.INGRESS) -> Filter:
        """Become a clsact filter."""
        place = Filter(priority, handle, "bystander", self.program_id, hook)
        self._node.call(tcx.replace_filter, interface, place, self._program)
        return place
