"""The two ways onto an interface's traffic control hooks: tcx links (kernel >= 6.6) and clsact filters.

Written apart from lazymesh's own, for programs of others that tests put beside it. Everything here acts on the
network namespace of the calling thread: hand it to Namespace.call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pyroute2 import IPRoute, NetlinkError

from lazymesh.datapath import kernelfeatures, libbpf, programs

if TYPE_CHECKING:
    from pathlib import Path

INGRESS, EGRESS = "ingress", "egress"
HOOKS = (INGRESS, EGRESS)
_ATTACH_TYPE = {INGRESS: 46, EGRESS: 47}
_PARENT = {INGRESS: 0xFFFFFFF2, EGRESS: 0xFFFFFFF3}
_F_BEFORE = 1 << 3
"""Without a program to stand before: at the head."""
_F_AFTER = 1 << 4
_ETH_P_ALL = 3


# tcx.


class _LinkCreateOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
        ("union", ctypes.c_uint64 * 4),
    )


class _LinkInfo(ctypes.Structure):
    """The head of ``struct bpf_link_info``."""

    _fields_ = (("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("prog_id", ctypes.c_uint32))


class TcxLink:
    """A program's place on an interface's hook; it goes with its last descriptor and pin."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def attach(cls, program: int, interface: str, hook: str = INGRESS, *, head: bool = False) -> Self:
        """Put a program at the tail, or at the head, of what is attached already."""
        flags = _F_BEFORE if head else _F_AFTER
        opts = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts), flags=flags)
        index, kind = socket.if_nametoindex(interface), _ATTACH_TYPE[hook]
        return cls(libbpf.checked(libbpf.library().bpf_link_create(program, index, kind, ctypes.byref(opts))))

    @classmethod
    def pinned(cls, path: Path) -> Self:
        """Open the link behind a pin."""
        return cls(libbpf.open_pin(path))

    @property
    def link_id(self) -> int:
        """The kernel's number of it, which an update keeps."""
        info = _LinkInfo()
        size = ctypes.c_uint32(ctypes.sizeof(info))
        libbpf.checked(
            libbpf.library().bpf_obj_get_info_by_fd(self.fd, ctypes.byref(info), ctypes.byref(size))
        )
        return int(info.id)

    def follows(self, interface: str) -> bool:
        """Tell whether it is on this interface, and not on one of that name which is gone."""
        return programs.link_ifindex(self.fd) == socket.if_nametoindex(interface)

    def update(self, program: int) -> None:
        """Put another program in the same place."""
        libbpf.checked(libbpf.library().bpf_link_update(self.fd, program, None))

    def pin(self, path: Path) -> None:
        """Let it outlive this process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        libbpf.pin(self.fd, path)

    def close(self) -> None:
        """Give the descriptor back; without a pin the program is detached."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def tcx_programs(interface: str, hook: str = INGRESS) -> list[int]:
    """Return the ids of the programs on a hook, in the order in which they see a packet; none without tcx."""
    if not kernelfeatures.has_tcx():
        return []
    ids, count, flags = (ctypes.c_uint32 * 64)(), ctypes.c_uint32(64), ctypes.c_uint32()
    pointers = (ctypes.byref(flags), ids, ctypes.byref(count))
    index, kind = socket.if_nametoindex(interface), _ATTACH_TYPE[hook]
    libbpf.checked(libbpf.library().bpf_prog_query(index, kind, 0, *pointers))
    return list(ids[: count.value])


# clsact.


@dataclass(frozen=True, order=True)
class Filter:
    """One clsact filter."""

    priority: int
    handle: int
    name: str
    program_id: int
    hook: str = INGRESS


def replace_filter(interface: str, wanted: Filter, program: int) -> None:
    """Attach a program as a direct-action filter for all protocols, making the clsact qdisc where it is missing."""
    index = socket.if_nametoindex(interface)
    with IPRoute() as route:
        try:
            route.tc("add", "clsact", index)
        except NetlinkError as exc:
            if exc.code != errno.EEXIST:
                raise
        route.tc(
            "replace-filter", "bpf", index, wanted.handle,
            fd=program, name=wanted.name, parent=_PARENT[wanted.hook], prio=wanted.priority, protocol=_ETH_P_ALL,
            classid=1, direct_action=True,
        )  # fmt: skip


def filters(interface: str) -> list[Filter]:
    """Return all BPF filters of an interface, both directions."""
    return [found for hook in HOOKS for found in _filters(interface, hook)]


def remove_filter(interface: str, which: Filter) -> None:
    """Remove one filter."""
    with IPRoute() as route:
        route.tc(
            "del-filter", "bpf", socket.if_nametoindex(interface), which.handle,
            parent=_PARENT[which.hook], prio=which.priority, protocol=_ETH_P_ALL,
        )  # fmt: skip


def remove_filters(interface: str, spare: str | None = None) -> list[Filter]:
    """Remove every filter of both directions but those whose name starts with ``spare``; the qdisc stays."""
    gone = [one for one in filters(interface) if not (spare and one.name.startswith(spare))]
    for one in gone:
        remove_filter(interface, one)
    return gone


def remove_clsact(interface: str) -> None:
    """Remove the clsact qdisc with all that hangs on it."""
    with IPRoute() as route, contextlib.suppress(NetlinkError):
        route.tc("del", "clsact", socket.if_nametoindex(interface))


def _filters(interface: str, hook: str) -> list[Filter]:
    # By tc, because pyroute2 does not know the attribute that names the program.
    done = subprocess.run(
        ["tc", "-json", "filter", "show", "dev", interface, hook], capture_output=True, text=True, check=False
    )
    if done.returncode:  # no clsact qdisc here
        return []
    return [
        Filter(
            item["pref"],
            int(item["options"]["handle"], 16),
            item["options"].get("bpf_name", ""),
            item["options"]["prog"]["id"],
            hook,
        )
        for item in json.loads(done.stdout or "[]")
        if "handle" in item.get("options", {})
    ]
