"""What this kernel can do, found out by trying, and its version."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import socket

from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import (
    BPF_F_NO_PREALLOC,
    BPF_NOEXIST,
    MAP_TYPE_LPM_TRIE,
    Map,
    MapLayout,
    library,
)
from lazymesh.datapath.programs import tcx_programs


def version_of(release: str) -> tuple[int, ...]:
    """Return the numbers in a kernel release or in the name of its directory."""
    return tuple(int(number) for number in re.findall(r"\d+", release))


def kernel_version() -> tuple[int, ...]:
    """Return the running kernel's version, such as (6, 1)."""
    return version_of(os.uname().release)[:2]


@functools.cache
def has_tcx() -> bool:
    """Return whether this kernel has tcx, by querying loopback's chain; PermissionError if that is not allowed."""
    try:
        tcx_programs(socket.if_nametoindex("lo"))
    except PermissionError:
        raise
    except OSError:
        return False
    return True


def has_lpm_batches() -> bool:
    """Return whether this kernel writes LPM tries in batches, by trying it on one."""
    probe = Map.create("lm_probe", MapLayout(MAP_TYPE_LPM_TRIE, 8, 4, 1, BPF_F_NO_PREALLOC))
    count = ctypes.c_uint32(1)
    words = (bytes(8), bytes(4), ctypes.byref(count), None)
    try:
        return bool(library().bpf_map_update_batch(probe.fd, *words) == 0)
    finally:
        probe.close()


def kernel_honours_noexist() -> bool:
    """Return whether BPF_NOEXIST works on LPM tries (kernels without eae6a075e953 ignore it), by trying it once."""
    probe = Map.create("lm_probe", MapLayout(MAP_TYPE_LPM_TRIE, 24, 24, 2, BPF_F_NO_PREALLOC))
    try:
        key = abi.pack_address_key(bytes(4))
        probe.update(key, bytes(24))
        probe.update(key, bytes(24), BPF_NOEXIST)
    except OSError as exc:
        return exc.errno == errno.EEXIST
    else:
        return False
    finally:
        probe.close()
