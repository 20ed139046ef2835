"""An ipcache and a journal whose writer may die before any write: a crash is an exception that nobody catches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.datapath.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lazymesh.core.model import Address, Entry
    from lazymesh.datapath import abi
    from lazymesh.datapath.journal import Line
    from lazymesh.datapath.libbpf import Map


class Crash(BaseException):
    """The process dies here."""


class Fuse:
    """Counts writes, and dies before the one it was told."""

    def __init__(self) -> None:
        self.left: int | None = None

    def write(self) -> None:
        """Let one more write pass, or not."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Crash


class MortalIpcache(IpcacheMap):
    """An ipcache whose writes may never happen; without ``honours`` also one of an old kernel."""

    def __init__(self, bpf_map: Map, path: Path, fuse: Fuse, tag: int = 0, *, honours: bool = True) -> None:
        super().__init__(bpf_map, path, tag)
        self._fuse, self._honours = fuse, honours

    def insert_many(self, lines: Iterable[Line]) -> list[bool]:
        """Add entries one by one."""
        added: list[bool] = []
        for line in lines:
            self._fuse.write()
            added += super().insert_many([line])
        return added

    def insert(self, address: Address, entry: Entry) -> bool:
        """Add an entry; an old kernel overwrites."""
        self._fuse.write()
        if self._honours:
            return super().insert(address, entry)
        super().replace(address, entry)
        return True

    def replace(self, address: Address, entry: Entry) -> None:
        """Overwrite an entry."""
        self._fuse.write()
        super().replace(address, entry)

    def delete(self, address: Address) -> bool:
        """Remove an entry."""
        self._fuse.write()
        return super().delete(address)


class MortalJournal(Journal):
    """A journal whose writes may never happen."""

    def __init__(self, bpf_map: Map, fuse: Fuse) -> None:
        super().__init__(bpf_map)
        self._fuse = fuse

    def write(self, address: Address, owned: abi.OwnedEntry) -> None:
        """Add a line."""
        self._fuse.write()
        super().write(address, owned)

    def write_many(self, lines: Iterable[Line]) -> None:
        """Add lines, all or none of them."""
        self._fuse.write()
        super().write_many(lines)

    def remove(self, address: Address) -> None:
        """Strike a line out."""
        self._fuse.write()
        super().remove(address)
