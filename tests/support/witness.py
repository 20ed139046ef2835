"""Watches what a node believes: looks into the real map without a pause, and holds it against what may stand there.

Whoever changes a record says so first (``may_be``), so at every moment an address may have each identity that its
records ever gave it; once the node is known to have followed, the old ones are taken back (``only``). What the map says
beyond that is a wrong identity: a security hole, however short.
"""

from __future__ import annotations

import contextlib
import ipaddress
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lazymesh.datapath.libbpf import Map

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_RESERVED = 256
"""Identities below mean no peer: the answer of a shorter prefix, where there is a Cilium."""


@dataclass(frozen=True)
class Wrong:
    """An entry that was never true."""

    at: float
    """Of time.monotonic()."""
    address: str
    identity: int
    might: frozenset[int]
    """What it might have been."""


class Witness:
    """Looks, from entering on, every few milliseconds, at the map behind a pin, whichever that is at the moment."""

    def __init__(self, pin: Path, every_s: float = 0.002) -> None:
        self.wrong: list[Wrong] = []
        self.looks = 0
        """How often all addresses were looked up."""
        self._pin = pin
        self._every_s = every_s
        self._might: dict[str, frozenset[int]] = {}
        self._keys: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witness")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self.insist()
        elif self._failure is not None:
            error.add_note(f"and the witness had ended: {self._failure!r}")

    def insist(self) -> None:
        """Raise RuntimeError if it looks no more: that nothing wrong was seen says nothing then."""
        if self._failure is not None:
            raise RuntimeError(
                f"the witness ended after {self.looks} looks: {self._failure!r}"
            ) from self._failure

    def may_be(self, address: str, *identities: int) -> None:
        """Let an address have these identities too, from now on; none: it is looked at, and may have no entry."""
        with self._lock:
            self._might[address] = self._might.get(address, frozenset()) | frozenset(identities)
            self._keys[address] = _key(address)

    def only(self, address: str, *identities: int) -> None:
        """Let an address have nothing but these from now on."""
        with self._lock:
            self._might[address] = frozenset(identities)
            self._keys[address] = _key(address)

    def now(self, addresses: Iterable[str]) -> dict[str, int | None]:
        """Return which identities the map gives addresses at this moment; None: no entry."""
        with contextlib.closing(Map.pinned(self._pin)) as ipcache:
            return {address: _identity(ipcache, _key(address)) for address in addresses}

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._every_s):
                # While a map is replaced there is no pin for a moment.
                with (
                    contextlib.suppress(FileNotFoundError),
                    contextlib.closing(Map.pinned(self._pin)) as ipcache,
                ):
                    self._look(ipcache)
        except Exception as exc:  # a thread's words reach nobody who could act on them
            self._failure = exc

    def _look(self, ipcache: Map) -> None:
        self.looks += 1
        for address, key in list(self._keys.items()):
            with self._lock:  # held over both, so that nothing is taken back between them
                identity, might = _identity(ipcache, key), self._might[address]
            if identity is not None and identity not in might:
                self.wrong.append(Wrong(time.monotonic(), address, identity, might))


def _key(address: str) -> bytes:
    ip = ipaddress.ip_address(address)
    return struct.pack("=IHBB16s", 32 + ip.max_prefixlen, 0, 0, 1 if ip.version == 4 else 2, ip.packed)


def _identity(ipcache: Map, key: bytes) -> int | None:
    raw = ipcache.lookup(key)
    identity = None if raw is None else int(struct.unpack_from("=I", raw)[0])
    return None if identity is None or 0 < identity < _RESERVED else identity
