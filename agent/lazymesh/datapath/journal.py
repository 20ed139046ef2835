"""The ownership journal, and the program that writes it together with our own ipcache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.model import Address, Entry
from lazymesh.datapath import abi
from lazymesh.datapath.maps import NO_ROOM
from lazymesh.datapath.programs import run_program
from lazymesh.errors import DatapathError, MapFullError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lazymesh.core.events import Install
    from lazymesh.datapath.libbpf import Map

Line = tuple[bytes, Entry, int]
"""A new entry as the journal gets it: key of the address, entry, cluster id."""


class Journal:
    """The ownership journal: which ipcache entries are ours."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map
        self.size = bpf_map.layout.max_entries

    def items(self) -> Iterator[tuple[Address, abi.OwnedEntry]]:
        """Yield every line; keys other than host addresses are not ours and are skipped."""
        for key, value in self._map.items():
            address = abi.address_of_key(key)
            if address is not None:
                yield address, abi.unpack_owned(value)

    def read(self, address: Address) -> abi.OwnedEntry | None:
        """Return the line of an address."""
        raw = self._map.lookup(abi.pack_address_key(address))
        return None if raw is None else abi.unpack_owned(raw)

    def write(self, address: Address, owned: abi.OwnedEntry) -> None:
        """Add or replace a line; MapFullError when there is no room."""
        self._write([(abi.pack_address_key(address), abi.pack_owned(owned))])

    def write_many(self, lines: Iterable[Line]) -> None:
        """Add or replace the lines of new entries; MapFullError when there is no room."""
        packed: list[tuple[bytes, bytes]] = []
        for key, entry, number in lines:
            packed.append((key, abi.pack_owned_new(entry, number)))
        self._write(packed)

    def _write(self, lines: list[tuple[bytes, bytes]]) -> None:
        try:
            self._map.update_many(lines)
        except OSError as exc:
            if exc.errno in NO_ROOM:
                raise MapFullError("the ownership journal is full") from exc
            raise DatapathError(f"cannot write to the ownership journal: {exc.strerror}") from exc

    def remove(self, address: Address) -> None:
        """Delete a line."""
        try:
            self._map.delete(abi.pack_address_key(address))
        except OSError as exc:
            raise DatapathError(f"cannot delete from the ownership journal: {exc.strerror}") from exc


class Writer:
    """Writes the journal and our own ipcache, many addresses with one system call (install.h)."""

    def __init__(self, program: int) -> None:
        self.program = program

    def write(self, installs: Iterable[Install]) -> list[bool | None]:
        """Write lines and entries of new addresses; return whether each was written. If not, its line may be there.

        None: unknown, because the whole run failed; some kernels report an error even after running the program.
        """
        lines = [abi.pack_installs(each.addresses, each.entry, each.cluster_id) for each in installs]
        written: list[bool | None] = []
        for run in abi.pack_install_runs(b"".join(lines)):
            try:
                verdict, packet = run_program(self.program, run)
            except OSError:
                written += [None] * len(abi.unpack_installed(run))
                continue
            written += [verdict == 0 and error == 0 for error in abi.unpack_installed(packet)]
        return written
