"""The datapath as the agent holds it: open maps and programs.

The programs are compiled by a short-lived process, or were by that of an earlier start, and loaded here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import structlog

from lazymesh.datapath import libbpf, programcache
from lazymesh.datapath.ipcachemaps import IpcacheLayout, IpcacheMap, VisibleIpcaches
from lazymesh.datapath.journal import Journal, Writer
from lazymesh.datapath.maps import (
    CounterMap,
    MeshCidrs,
    PolicyMap,
    RecentMap,
    WindowMap,
    open_map,
    open_or_make_map,
)
from lazymesh.datapath.pins import (
    DOORBELL,
    HOLD_PROGRAMS,
    INSTALL,
    IPCACHE,
    JOURNAL,
    PROGRAMS,
    READER,
    SIGNALS,
    VIEWS,
    expected_layouts,
    own_ipcache,
)
from lazymesh.datapath.settingsmap import SettingsMap
from lazymesh.datapath.signals import SignalMaps
from lazymesh.datapath.source import origin
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from pathlib import Path

    from lazymesh.core.model import Direction
    from lazymesh.datapath.pins import Pins
    from lazymesh.datapath.programcache import Compiled

log = structlog.get_logger()

COMPILE_TIMEOUT_S = 300
"""A second or two on an idle node; half a minute was seen on emulated processors, and more than three on busy ones."""


class Compiling:
    """The compiler's process, at work.

    made_of: the origin of what it reads now.
    """

    def __init__(self, made_of: str) -> None:
        self._made_of = made_of
        self._process = subprocess.Popen(  # noqa: S603 (our interpreter, our module)
            [sys.executable, "-m", "lazymesh.datapath.compiler", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the agent, which waits for the compiler before it stops
        )

    def result(self) -> Compiled:
        """Wait for what it compiles; DatapathError if that fails."""
        try:
            said, words = self._process.communicate(timeout=COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired as exc:
            self._process.kill()
            self._process.communicate()
            raise DatapathError(
                f"compiling the datapath took more than {COMPILE_TIMEOUT_S} s: is this node overloaded?"
            ) from exc
        try:
            answer = json.loads(said)
        except ValueError as exc:
            last = (words.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise DatapathError(
                f"the datapath's compiler died with status {self._process.returncode}: {last}"
            ) from exc
        if "error" in answer:
            raise DatapathError(answer["error"])
        return programcache.decode(said)

    def keep(self, compiled: Compiled, path: Path) -> None:
        """Cache it for the next start."""
        try:
            programcache.write(path, compiled, self._made_of)
        except OSError as exc:
            log.warning(
                "the compiled programs could not be cached for the next start",
                error=f"{path}: {exc.strerror}",
            )


def find_programs(cache: Path | None) -> Compiled | Compiling:
    """Return what an earlier start has cached in a file; without that, the compiler, which begins."""
    made_of = origin()
    found = None if cache is None else programcache.read(cache, made_of)
    return found or Compiling(made_of)


def load(maps: MeshMaps, cache: Path | None = None, found: Compiled | Compiling | None = None) -> Datapath:
    """Load and pin the programs; maps that are already pinned are reused.

    cache: a file for what is compiled.
    found: what ``find_programs`` has returned for it, if it was called before.
    """
    found = found or find_programs(cache)
    if not isinstance(found, Compiling):
        try:
            programcache.load(found, maps.pins, maps.ipcache_size)
            return Datapath(maps)
        except DatapathError as exc:
            log.warning(
                "the programs cached at an earlier start do not load, compiling again", error=str(exc)
            )
        found = Compiling(origin())
    compiled = found.result()
    programcache.load(compiled, maps.pins, maps.ipcache_size)
    if cache is not None:
        found.keep(compiled, cache)
    return Datapath(maps)


def open_own_ipcache(pins: Pins, size: int) -> IpcacheMap:
    """Return our own ipcache, for a node without Cilium: the pinned one, or a new one."""
    path = pins.path(IPCACHE)
    open_or_make_map(path, own_ipcache(size)).close()
    return IpcacheMap.pinned(path)


class MeshMaps:
    """The maps that describe the mesh to the kernel; they can be filled before the programs that read them are loaded.

    Pinned at once, so that the programs get them as they get those of an earlier agent.
    """

    def __init__(self, pins: Pins, ipcache_size: int) -> None:
        self.pins = pins
        self.ipcache_size = ipcache_size
        for name in pins.prepare(ipcache_size):
            log.info("map of another version, replaced", name=name)
        libbpf.raise_memlock()
        layouts = expected_layouts(ipcache_size)
        self._maps = [
            open_or_make_map(pins.path(name), layouts[name])
            for name in ("lm_config", "lm_mesh_cidrs", "lm_policy")
        ]
        config, cidrs, policy = self._maps
        self.config, self.cidrs, self.policy = SettingsMap(config), MeshCidrs(cidrs), PolicyMap(policy)

    def close(self) -> None:
        """Close the maps."""
        for opened in self._maps:
            opened.close()


class Datapath:
    """All other pinned maps, opened, and the programs as file descriptors; ``visible`` sets which ipcaches they read.

    It uses the mesh maps, which stay open when it is closed.
    """

    def __init__(self, maps: MeshMaps) -> None:
        self.pins = maps.pins
        self.config = maps.config
        self._maps: list[libbpf.Map] = []
        self._programs: dict[str, int] = {}
        try:
            self._open_pins()
        except DatapathError:
            self.close()
            raise

    def _open_pins(self) -> None:
        self.journal = Journal(self._open(JOURNAL))
        self.windows = WindowMap(self._open("lm_windows"))
        self.counters = CounterMap(self._open("lm_counters"))
        self.recent = RecentMap(self._open("lm_recent"))
        outer = {view: self._open(name) for view, name in zip(IpcacheLayout, VIEWS, strict=True)}
        self.visible = VisibleIpcaches(outer, self.config)
        self.signals = SignalMaps(self._open(SIGNALS), self._open(DOORBELL), self._open(READER))
        for name in (*PROGRAMS, *HOLD_PROGRAMS, INSTALL):
            try:
                self._programs[name] = libbpf.open_pin(self.pins.path(name))
            except OSError as exc:
                raise DatapathError(
                    f"cannot open the program at {self.pins.path(name)}: {exc.strerror}"
                ) from exc
        self.writer = Writer(self._programs[INSTALL])

    def program(self, direction: Direction) -> tuple[str, int]:
        """Return the name and file descriptor of the program for a direction's interfaces."""
        return PROGRAMS[direction], self._programs[PROGRAMS[direction]]

    def hold_programs(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Return the names and file descriptors of the programs for the TAP's egress and ingress."""
        out, back = HOLD_PROGRAMS
        return (out, self._programs[out]), (back, self._programs[back])

    def close(self) -> None:
        """Close programs and maps; what is pinned or attached stays."""
        for fd in self._programs.values():
            os.close(fd)
        self._programs = {}
        for opened in self._maps:
            opened.close()

    def _open(self, name: str) -> libbpf.Map:
        self._maps.append(open_map(self.pins.path(name)))
        return self._maps[-1]
