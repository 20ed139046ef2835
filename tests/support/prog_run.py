"""One packet through a loaded program.

By BPF_PROG_TEST_RUN: the kernel wraps the frame in an skb (its protocol comes from the Ethernet header, its device is
``ifindex`` in the caller's network namespace, the loopback device by default), runs the program and frees the skb
again. Or through a TAP device, for what only a device makes: untagged VLAN frames, GSO, headers in page fragments.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lazymesh.datapath.libbpf import checked, library
from lazymesh.datapath.programs import TestRunOpts

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.namespaces import Namespace

TC_ACT_UNSPEC = -1
"""The next program decides."""
TC_ACT_SHOT = 2
"""The packet is dropped."""


_TUNSETIFF = 0x4004_54CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_VNET_NEEDS_CSUM, _VNET_GSO_TCPV4, _VNET_GSO_TCPV6 = 1, 1, 4


class _SkBuff(ctypes.Structure):
    """``struct __sk_buff`` as far as a test run may set it; every other member has to be zero."""

    _fields_ = (
        ("len", ctypes.c_uint32),
        ("pkt_type", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("unset1", ctypes.c_uint32 * 5),
        ("priority", ctypes.c_uint32),
        ("ingress_ifindex", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("unset2", ctypes.c_uint32 * 25),
        ("flow_keys", ctypes.c_uint64),
        ("tstamp", ctypes.c_uint64),
        ("wire_len", ctypes.c_uint32),
        ("gso_segs", ctypes.c_uint32),
        ("sk", ctypes.c_uint64),
        ("gso_size", ctypes.c_uint32),
        ("unset3", ctypes.c_uint32),
        ("hwtstamp", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Run:
    """What the program made of the packet; with repeats, of the last one."""

    verdict: int
    ns: int
    """Nanoseconds of one run, the mean over all repeats."""
    frame: bytes
    """The packet as the program left it."""


def run_packet(
    program: int, frame: bytes, *, ifindex: int = 0, mark: int = 0, gso_size: int = 0, repeat: int = 1
) -> Run:
    """Run a program over one frame, ``repeat`` times; OSError when the kernel refuses the frame."""
    context = _SkBuff(ifindex=ifindex, mark=mark, gso_size=gso_size, gso_segs=2 if gso_size else 0)
    room = ctypes.create_string_buffer(len(frame) + 256)
    options = TestRunOpts(
        sz=ctypes.sizeof(TestRunOpts),
        data_in=frame,
        data_size_in=len(frame),
        data_out=ctypes.addressof(room),
        data_size_out=len(room),
        ctx_in=ctypes.addressof(context),
        ctx_size_in=ctypes.sizeof(context),
        repeat=repeat,
    )
    checked(library().bpf_prog_test_run_opts(program, ctypes.byref(options)))
    verdict = ctypes.c_int32(options.retval).value
    return Run(verdict, options.duration, room.raw[: options.data_size_out])


class QuickRun:
    """The same for a million frames: buffers are made once, and only what the program did is looked at."""

    def __init__(self, program: int, longest: int) -> None:
        self._program = program
        self._context = _SkBuff()
        self._room = ctypes.create_string_buffer(longest)
        self._left = memoryview(self._room).cast("B")
        self._options = TestRunOpts(
            sz=ctypes.sizeof(TestRunOpts),
            data_out=ctypes.addressof(self._room),
            ctx_in=ctypes.addressof(self._context),
            ctx_size_in=ctypes.sizeof(self._context),
            repeat=1,
        )
        self._reference = ctypes.byref(self._options)
        self._call = library().bpf_prog_test_run_opts

    def __call__(self, frame: bytes, gso_size: int = 0) -> tuple[int, bool]:
        """Return the verdict, and whether the frame was left as it was; OSError when the kernel refuses the frame."""
        options, length = self._options, len(frame)
        self._context.gso_size, self._context.gso_segs = gso_size, 2 if gso_size else 0
        options.data_in, options.data_size_in = frame, length
        options.data_size_out = len(self._room)
        checked(self._call(self._program, self._reference))
        verdict = options.retval
        untouched = options.data_size_out == length and self._left[:length] == frame
        return verdict - (1 << 32) if verdict >> 31 else verdict, untouched


class Tap:
    """A TAP device in a namespace with a pinned program on its ingress; every write is one received frame."""

    def __init__(self, namespace: Namespace, program: Path) -> None:
        self._namespace, self._program = namespace, program

    def __enter__(self) -> Self:
        self._fd = self._namespace.call(_open_tap)
        self._namespace.sysctl({"ipv6/conf/tap0/disable_ipv6": 1})
        self._namespace.ip(["link set tap0 up"])
        self._namespace.run("tc", "qdisc", "add", "dev", "tap0", "clsact")
        program = ("bpf", "direct-action", "pinned", self._program)
        self._namespace.run("tc", "filter", "add", "dev", "tap0", "ingress", *program)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def receive(self, frame: bytes) -> None:
        """Have the device receive a frame; the program has seen it when this returns."""
        os.write(self._fd, bytes(10) + frame)

    def receive_in_pieces(self, frame: bytes, linear: int) -> None:
        """Have it receive a frame of more than a page, of which only so many bytes are not in page fragments."""
        os.write(self._fd, struct.pack("=BBHHHH", 0, 0, linear, 0, 0, 0) + frame)

    def receive_gso(self, frame: bytes, segment: int = 1_400) -> None:
        """Have it receive a TCP segment that is to be cut up later."""
        v4 = frame[14] >> 4 == 4
        kind, start = (_VNET_GSO_TCPV4, 34) if v4 else (_VNET_GSO_TCPV6, 54)
        os.write(
            self._fd, struct.pack("=BBHHHH", _VNET_NEEDS_CSUM, kind, start + 20, segment, start, 16) + frame
        )


def _open_tap() -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"tap0", flags))
    return descriptor
