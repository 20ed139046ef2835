"""The datapath as tests see it: loaded once into a BPF file system of its own, and wiped before every test."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import ipaddress
import os
import re
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Direction, Entry, Network
from lazymesh.datapath import abi, libbpf
from lazymesh.datapath.libbpf import BPF_F_NO_PREALLOC, Map, MapLayout
from lazymesh.datapath.pins import Pins, expected_layouts
from lazymesh.datapath.program import open_own_ipcache
from lazymesh.datapath.settingsmap import DatapathConfig
from tests.support.loaded import LoadedDatapath, load
from tests.support.namespaces import NamespaceSet
from tests.support.prog_run import Run, run_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.support.namespaces import Namespace

IPCACHE_SIZE = 20_000
"""Enough for every test, and quickly wiped."""

_EMPTIED = {libbpf.MAP_TYPE_HASH, libbpf.MAP_TYPE_LRU_HASH, libbpf.MAP_TYPE_LPM_TRIE}
"""Kinds of maps that a wipe empties; arrays have no elements to delete."""

_MOUNT = re.compile(r"lazymesh-bpffs-(\d+)-")


class Bench:
    """The loaded programs and their maps, in the words of a test."""

    def __init__(self, datapath: LoadedDatapath) -> None:
        self.datapath = datapath
        self.ipcache = open_own_ipcache(datapath.pins, IPCACHE_SIZE)
        datapath.visible.show([self.ipcache])
        self.maps = {name: Map.pinned(datapath.pins.path(name)) for name in expected_layouts(IPCACHE_SIZE)}

    def close(self) -> None:
        """Give the maps back."""
        self.ipcache.close()
        for opened in self.maps.values():
            opened.close()

    def wipe(self) -> None:
        """Leave every map as a fresh load would, with default settings."""
        for opened in self.maps.values():
            if opened.layout.kind in _EMPTIED:
                opened.delete_many([key for key, _ in opened.items()])
        self.forget_counts()
        self.datapath.config.write(DatapathConfig())
        self.datapath.config.change(epoch=self.datapath.config.read().epoch + 10)

    def forget_counts(self) -> None:
        """Set the packet counters to zero."""
        zero = bytes(ctypes.sizeof(abi.Counters) * libbpf.possible_cpus())
        for direction in Direction:
            self.maps["lm_counters"].update(int(direction).to_bytes(4, "little"), zero)

    def entries(self, entries: Mapping[str, Entry]) -> None:
        """Put entries into the ipcache, as anybody may: any prefix."""
        self.maps["lm_ipcache"].update_many(
            [(key_of(text), abi.pack_entry(e)) for text, e in entries.items()]
        )
        self.datapath.config.void()

    def mesh(self, cidrs: Mapping[str, int]) -> None:
        """Declare pod CIDRs and the cluster ids they belong to."""
        self.datapath.mesh_cidrs.apply([(ipaddress.ip_network(c), owner) for c, owner in cidrs.items()], [])

    def configure(self, **settings: object) -> None:
        """Put settings in force, defaults for the rest."""
        self.datapath.config.write(DatapathConfig(**settings))  # type: ignore[arg-type]

    def send(self, direction: Direction, frame: bytes, **options: int) -> int:
        """Run the direction's program over a frame and return its verdict."""
        return self.run(direction, frame, **options).verdict

    def run(self, direction: Direction, frame: bytes, **options: int) -> Run:
        """Run the direction's program over a frame."""
        return run_packet(self.datapath.program(direction)[1], frame, **options)

    def counts(self, direction: Direction) -> dict[str, int]:
        """Return the counters of a direction that are not zero."""
        return {name: n for name, n in asdict(self.datapath.counters.read(direction)).items() if n}


def key_of(prefix: str) -> bytes:
    """Return the ipcache key of a prefix in text form."""
    return abi.pack_network_key(network_of(prefix))


def network_of(prefix: str) -> Network:
    """Return a prefix in text form as a network."""
    return ipaddress.ip_network(prefix)


def open_descriptors() -> int:
    """Return how many file descriptors this process has open, without those that only wait for the collector."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def mounted_bpffs() -> Iterator[Path]:
    """Mount a BPF file system in a directory of its own; unmounted whatever happens, a killed run's by the next."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"lazymesh-bpffs-{os.getpid()}-") as directory:
        subprocess.run(["mount", "-t", "bpf", "bpf", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob("lazymesh-bpffs-*"):
        found = _MOUNT.match(path.name)
        if found and not Path("/proc", found[1]).exists():
            subprocess.run(["umount", "--lazy", path], stderr=subprocess.DEVNULL, check=False)
            with contextlib.suppress(OSError):
                path.rmdir()


@pytest.fixture(scope="session")
def loaded() -> Iterator[LoadedDatapath]:
    """Return the datapath, loaded once for all tests."""
    with mounted_bpffs() as bpffs:
        pins = Pins.under(bpffs)
        datapath = load(pins, IPCACHE_SIZE)
        yield datapath
        datapath.close()
        pins.remove()


@pytest.fixture(scope="session")
def shared_bench(loaded: LoadedDatapath) -> Iterator[Bench]:
    """Return the bench that ``bench`` wipes; for properties that wipe it themselves between examples."""
    bench = Bench(loaded)
    yield bench
    bench.close()


@pytest.fixture
def bench(shared_bench: Bench) -> Bench:
    """Return the datapath with empty maps, zero counters and default settings."""
    shared_bench.wipe()
    return shared_bench


@pytest.fixture
def make_map() -> Iterator[Callable[..., Map]]:
    """Return a function that makes maps which go with the test."""
    made: list[Map] = []

    def make(kind: int, key: int, value: int, size: int = 16, flags: int = BPF_F_NO_PREALLOC) -> Map:
        made.append(Map.create("lm_test", MapLayout(kind, key, value, size, flags)))
        return made[-1]

    yield make
    for opened in made:
        opened.close()


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """Return a BPF file system of the test's own."""
    with mounted_bpffs() as directory:
        yield directory


@pytest.fixture
def node(loaded: LoadedDatapath) -> Iterator[Namespace]:
    """Return a network namespace with nothing but a loopback device; what is pinned for it goes with it."""
    with NamespaceSet(["node"]) as spaces:
        yield spaces["node"]
    for index in loaded.pins.linked():
        loaded.pins.link(index).unlink()


@pytest.fixture(params=[pytest.param("tcx", marks=pytest.mark.needs("tcx")), "clsact"])
def style(request: pytest.FixtureRequest) -> str:
    """Attach in each way."""
    return str(request.param)
