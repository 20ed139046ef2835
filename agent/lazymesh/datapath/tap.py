"""The TAP device in which parked packets wait; it lives as long as its file descriptor.

Free of heavy imports: the holder process is this file, its loop and a few maps.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from lazymesh.errors import DatapathError

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETFILTEREBPF = 0x400454CA, 0x400454D0, 0x800454E1
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_OFFLOAD_TCP = 0x01 | 0x02 | 0x04 | 0x08
"""TUN_F_CSUM, TSO4, TSO6, TSO_ECN: without them a GSO packet comes out as segments that share one token."""
_OFFLOAD_UDP = 0x20 | 0x40
"""TUN_F_USO4, USO6: since 6.2."""

VNET_HEADER = 10
READ_SIZE = VNET_HEADER + 14 + 65_536
"""A shorter read would truncate a packet silently."""
NAMES = tuple(f"lm_hold{number}" for number in range(4))
"""The first becomes free when an older holder ends; the others are for when that one hangs, or another device has the
name."""
_PATIENCE_S = 1.0
_TAKEN = (errno.EBUSY, errno.EINVAL)
"""Taken by another holder's TAP; by a device that is not a TAP."""


@dataclass(frozen=True, slots=True)
class Tap:
    """An open TAP device, still down."""

    fd: int
    name: str
    ifindex: int
    udp_gso: bool
    """It accepts UDP segmentation offload (UDP GSO)."""

    def set_filter(self, program: int) -> None:
        """Attach a socket filter that decides on every frame before it is queued for us."""
        fcntl.ioctl(self.fd, _TUNSETFILTEREBPF, struct.pack("i", program))


def open_tap(names: tuple[str, ...] = NAMES, path: Path = Path("/dev/net/tun")) -> Tap:
    """Make the device in this network namespace; DatapathError says why that failed."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise DatapathError(
            f"cannot open {path} ({exc.strerror}): holding needs TUN in the kernel and the device in the container"
        ) from exc
    try:
        name = _attach(fd, names)
        udp_gso = _offload(fd)
        return Tap(fd, name, _ifindex(name), udp_gso)
    except OSError as exc:
        os.close(fd)
        if exc.errno in _TAKEN:
            raise DatapathError(
                f"cannot make a TAP device: {' and '.join(names)} are taken, by holders that hang or by other devices"
            ) from exc
        raise DatapathError(
            f"cannot make the TAP device {names[0]} with all offloads: {exc.strerror} (it needs CAP_NET_ADMIN)"
        ) from exc


def try_tap() -> bool:
    """Make a TAP as the holder does and close it; return whether it accepts UDP GSO."""
    tap = open_tap(("lm_try%d",))
    os.close(tap.fd)
    return tap.udp_gso


def _attach(fd: int, names: tuple[str, ...]) -> str:
    """Take the first free name and return it; the holder of a dead agent gives its name up in a moment."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        late = time.monotonic() > until
        for name in names if late else names[:1]:
            request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
            try:
                return fcntl.ioctl(fd, _TUNSETIFF, request)[:16].rstrip(b"\0").decode()
            except OSError as exc:
                if exc.errno not in _TAKEN or (late and name == names[-1]):
                    raise
        time.sleep(0.01)


def _offload(fd: int) -> bool:
    try:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOAD_TCP | _OFFLOAD_UDP)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOAD_TCP)
        return False
    return True


def _ifindex(name: str) -> int:
    import socket  # noqa: PLC0415 (one call, in a process that counts its megabytes)

    return socket.if_nametoindex(name)
