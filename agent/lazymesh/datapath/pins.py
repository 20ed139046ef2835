"""The datapath's pins in the BPF file system, and the checks before anything is loaded over existing ones."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lazymesh.datapath import abi, libbpf
from lazymesh.datapath.libbpf import Map, MapLayout
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = ("lm_from_pod", "lm_from_uplink")
HOLD_PROGRAMS = ("lm_hold_out", "lm_hold_back")
HOLD_FILTER = "lm_hold_whole"
INSTALL = "lm_install"
SIGNALS = "lm_signals"
DOORBELL = "lm_doorbell"
RINGS = (SIGNALS, DOORBELL)
READER = "lm_reader"
IPCACHE = "lm_ipcache"
JOURNAL = "lm_owned"
LINKS = "links"
LASTING = (IPCACHE, JOURNAL)
"""Entries and their journal outlive versions, so a changed layout must still be readable; all else is relearned."""
_NAMESPACE = Path("/proc/thread-self/ns/net")
VIEWS = ("lm_view_v1", "lm_view_v2", "lm_view_v2ro")
"""By enum lm_view, from 1 on. Like the rings, they belong to one load of the programs."""

SHARE_OF_MAP = 20
"""Our budget is one in this many of the map's entries."""
JOURNAL_SPARE = 1_024
"""Lines that are written before it is known which addresses get an entry."""


def own_ipcache(size: int) -> MapLayout:
    """Return the layout of our own ipcache, which is Cilium's v2."""
    return MapLayout(libbpf.MAP_TYPE_LPM_TRIE, 24, 24, size, libbpf.BPF_F_NO_PREALLOC)


def journal_size(ipcache_size: int) -> int:
    """Return how many lines the journal has: for our budget, and as many again, since an earlier agent's may be larger.

    All are preallocated, which halves the time to write one.
    """
    return 2 * (ipcache_size // SHARE_OF_MAP) + JOURNAL_SPARE


def budget(map_size: int, journal_lines: int) -> int:
    """Return how many of a map's entries may be ours. Cilium's map may be larger than the journal was made for."""
    return min(map_size // SHARE_OF_MAP, (journal_lines - JOURNAL_SPARE) // 2)


class PinnedMap(NamedTuple):
    """A line of bpf/include/maps.h: what a map holds, and how many."""

    kind: int
    key: type[ctypes._SimpleCData[int] | ctypes.Structure] | None
    value: type[ctypes._SimpleCData[int] | ctypes.Structure]
    max_entries: int
    flags: int = 0

    @property
    def layout(self) -> MapLayout:
        """Its layout in bytes, as the kernel describes it."""
        key_size = ctypes.sizeof(self.key) if self.key else 0
        return MapLayout(self.kind, key_size, ctypes.sizeof(self.value), self.max_entries, self.flags)


def pinned_maps(ipcache_size: int) -> dict[str, PinnedMap]:
    """Return every pinned map but the ipcache by name, as in bpf/include/maps.h."""
    lazy, mapped = libbpf.BPF_F_NO_PREALLOC, libbpf.BPF_F_MMAPABLE
    return {
        "lm_mesh_cidrs": PinnedMap(libbpf.MAP_TYPE_LPM_TRIE, abi.IpcacheKey, abi.MeshCidr, 131_072, lazy),
        JOURNAL: PinnedMap(libbpf.MAP_TYPE_HASH, abi.IpcacheKey, abi.Owned, journal_size(ipcache_size)),
        "lm_config": PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, abi.Config, 1),
        "lm_counters": PinnedMap(libbpf.MAP_TYPE_PERCPU_ARRAY, u32, abi.Counters, 2),
        READER: PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, abi.Reader, 1, mapped),
        "lm_dedup": PinnedMap(libbpf.MAP_TYPE_LRU_HASH, abi.DedupKey, u64, 65_536),
        "lm_recent": PinnedMap(libbpf.MAP_TYPE_LRU_HASH, abi.DedupKey, u64, 16_384),
        "lm_recent_tags": PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, u64, 8_192),
        "lm_windows": PinnedMap(libbpf.MAP_TYPE_LRU_HASH, abi.DedupKey, abi.Window, 16_384),
        "lm_rate": PinnedMap(libbpf.MAP_TYPE_LRU_HASH, u32, u64, 4_096),
        "lm_policy": PinnedMap(libbpf.MAP_TYPE_HASH, abi.PolicyKey, u32, 262_144, lazy),
        "lm_flows": PinnedMap(libbpf.MAP_TYPE_LRU_HASH, abi.FlowKey, abi.Flow, 65_536),
        "lm_slots": PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, abi.Slot, 16_384, mapped),
        "lm_hold_control": PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, abi.HoldControl, 1, mapped),
        "lm_hold_bucket": PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, abi.Outstanding, 65_536),
        "lm_hold_if": PinnedMap(libbpf.MAP_TYPE_HASH, u32, abi.Outstanding, 4_096, lazy),
        "lm_hold_total": PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, abi.Outstanding, 1),
        "lm_hold_count": PinnedMap(libbpf.MAP_TYPE_PERCPU_ARRAY, u32, abi.HoldCounters, 1),
        "lm_hold_free": PinnedMap(libbpf.MAP_TYPE_QUEUE, None, u32, 16_384),
        "lm_holder_stats": PinnedMap(libbpf.MAP_TYPE_ARRAY, u32, abi.HolderStats, 1, mapped),
    }


def expected_layouts(ipcache_size: int) -> dict[str, MapLayout]:
    """Return the layout of every pinned map by name, including our own ipcache."""
    others = {name: each.layout for name, each in pinned_maps(ipcache_size).items()}
    return {IPCACHE: own_ipcache(ipcache_size), **others}


@dataclass(frozen=True, slots=True)
class Pins:
    """The directory ``<bpffs>/lazymesh``."""

    directory: Path

    @classmethod
    def under(cls, bpffs: Path) -> Pins:
        """Return our directory under a mounted BPF file system."""
        return cls(bpffs / "lazymesh")

    def path(self, name: str) -> Path:
        """Return the pin's path of a map or program."""
        return self.directory / name

    def link(self, ifindex: int) -> Path:
        """Return the pin's path of an interface's tcx link."""
        return self.directory / LINKS / str(ifindex)

    def linked(self) -> set[int]:
        """Return the indexes of interfaces with a pinned link, including interfaces that are gone."""
        directory = self.directory / LINKS
        return {int(path.name) for path in directory.iterdir()} if directory.is_dir() else set()

    def make_directory(self) -> None:
        """Create the directory unless it exists."""
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise DatapathError(
                f"cannot make {self.directory}: {exc.strerror} (lazymesh runs as root)"
            ) from exc

    def prepare(self, ipcache_size: int) -> list[str]:
        """Create the directory and check every existing pin; DatapathError says what is wrong.

        A map that another version laid out differently goes, where nothing is lost by that; return the names.
        """
        gone = []
        check_bpffs(self.directory.parent)
        self.make_directory()
        for name, expected in expected_layouts(ipcache_size).items():
            path = self.path(name)
            if not path.exists():
                continue
            try:
                found = Map.pinned(path)
            except OSError as exc:
                raise DatapathError(f"{path} is not a BPF map: remove it") from exc
            layout = found.layout
            found.close()
            if layout == expected or (name in LASTING and _serves(name, layout, expected)):
                continue
            if name not in LASTING:
                # Attached programs keep using the old one until ours replace them.
                path.unlink()
                gone.append(name)
            else:
                raise DatapathError(
                    f"{path} has another layout ({layout}; ours: {expected}): it belongs to another lazymesh version;"
                    f" remove {self.directory} while no agent runs, or run that version with --cleanup"
                )
        return gone

    def missing(self, *, own_ipcache: bool) -> list[str]:
        """Return the names of pinned maps and programs that were removed; own_ipcache: ours should be pinned, too."""
        names = (*PROGRAMS, *HOLD_PROGRAMS, HOLD_FILTER, INSTALL, *RINGS, *VIEWS, *expected_layouts(0))
        return [name for name in names if not self.path(name).exists() and (own_ipcache or name != IPCACHE)]

    def remove(self) -> None:
        """Unpin everything of ours, of whatever version; maps and programs go with their last user."""
        for path in self.directory.glob("lm_*"):
            path.unlink(missing_ok=True)
        for index in self.linked():
            self.link(index).unlink(missing_ok=True)
        for directory in (self.directory / LINKS, self.directory):
            with contextlib.suppress(OSError):
                directory.rmdir()


@contextlib.contextmanager
def alone(*directories: Path) -> Iterator[None]:
    """Be the only agent in this network namespace and with these pins; DatapathError if there is another.

    Pins may be in several BPF file systems, but two agents would still compete for the same interfaces.
    """
    with contextlib.ExitStack() as held:
        for path in (*directories, _NAMESPACE):
            fd = os.open(path, os.O_RDONLY)
            held.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                holder = _flock_holder(fd)
                who = f" (process {holder})" if holder else ""
                what = "runs in this network namespace" if path is _NAMESPACE else f"holds {path}"
                raise DatapathError(f"another lazymesh agent{who} {what}: stop it first") from exc
        yield


def _serves(name: str, found: MapLayout, wanted: MapLayout) -> bool:
    """Return whether a lasting map of another size will do: a map cannot grow, and it holds entries.

    Our budget follows what is there (``budget``). The journal's lines are the same, preallocated or not.
    """
    if name == JOURNAL:
        found = replace(found, flags=wanted.flags)
        if found.max_entries <= JOURNAL_SPARE:
            return False
    return replace(found, max_entries=wanted.max_entries) == wanted


def _flock_holder(fd: int) -> int | None:
    """Return the process that holds the lock; None if the kernel does not say, as for other pid namespaces."""
    found = os.fstat(fd)
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks", encoding="ascii") as lines:  # noqa: PTH123 (pathlib is imported for types only)
        for line in lines:
            words = line.split()
            if "FLOCK" in words and "->" not in words and wanted in words:
                return int(words[words.index(wanted) - 1]) or None
    return None


def check_bpffs(path: Path) -> None:
    """Raise DatapathError unless the path is a mounted BPF file system."""
    kinds = {
        _unescape(line.split()[4]): line.split(" - ")[1].split()[0] for line in _mounts() if " - " in line
    }
    if not path.is_dir() or kinds.get(str(path.resolve())) != "bpf":
        raise DatapathError(
            f"{path} is not a BPF file system: run `mount -t bpf bpf {path}`, or name another with --bpffs"
        )


def _unescape(field: str) -> str:
    """Return a path from mountinfo, which writes blanks and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _mounts() -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:  # noqa: PTH123 (pathlib is imported for types only)
        return lines.read().splitlines()
