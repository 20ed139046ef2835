"""The kernel's lock over interfaces (RTNL), kept for as long as a test wants.

Thousands of interfaces that go keep it as well, but the kernel then keeps a processor, too, and whoever waits for that
one is late for another reason. So here it sleeps with the lock: an ethtool request is copied in under the lock, and the
page that it lies on is left missing (userfaultfd) until the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.namespaces import Namespace

_SYS_USERFAULTFD = 323
_UFFD_API, _MODE_MISSING = 0xAA, 1
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_SIOCETHTOOL, _ETHTOOL_GSTRINGS = 0x8946, 0x1B


def has_userfaultfd() -> bool:
    """Return whether this process may leave pages missing."""
    try:
        os.close(_userfaultfd())
    except OSError:
        return False
    return True


def _userfaultfd() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return fd


@contextlib.contextmanager
def rtnl_kept(namespace: Namespace) -> Iterator[None]:
    """Keep the lock, which is the whole machine's, by a request in a namespace."""
    fault = _userfaultfd()
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    second = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + mmap.PAGESIZE
    # The command is read before the lock is taken, and so it lies on the first page; all else on the second.
    pages[mmap.PAGESIZE - 4 : mmap.PAGESIZE] = struct.pack("I", _ETHTOOL_GSTRINGS)
    fcntl.ioctl(fault, _UFFDIO_API, bytearray(struct.pack("QQQ", _UFFD_API, 0, 0)))
    registered = struct.pack("QQQQ", second, mmap.PAGESIZE, _MODE_MISSING, 0)
    fcntl.ioctl(fault, _UFFDIO_REGISTER, bytearray(registered))
    with namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sQ16x", b"lo", second - 4)
        asker = threading.Thread(target=_ask, args=(sock, request))
        asker.start()
        try:
            _wait_readable(fault)  # by now the lock is kept
            yield
        finally:
            os.close(fault)  # the page is found, empty
            asker.join()


def _wait_readable(fault: int) -> None:
    readiness = select.poll()
    readiness.register(fault, select.POLLIN)
    if not readiness.poll(5_000):
        raise TimeoutError("the kernel did not look at the missing page")


def _ask(sock: socket.socket, request: bytes) -> None:
    with contextlib.suppress(OSError):  # a loopback device has no strings
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
