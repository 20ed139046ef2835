"""``lazymesh agent``: loads the datapath, follows the mesh and resolves misses, until it is told to stop.

This file puts the parts together and takes them apart again; each module says what its part does: signals
(datapath/signals.py) go to the driver, which asks the resolver (core/resolver/) and carries its commands out with
links (roles/link.py) and the installer (datapath/installer.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import structlog

from lazymesh import __version__
from lazymesh.core import events
from lazymesh.core.policy import PolicyEngine
from lazymesh.core.resolver import Judge, Limits, Resolver
from lazymesh.datapath.capabilities import check_capabilities
from lazymesh.datapath.cilium import NodeView, take_out_ours
from lazymesh.datapath.holdmaps import HoldControl, HoldCounterMap
from lazymesh.datapath.installer import Installer
from lazymesh.datapath.interfaces import InterfaceFollower, InterfaceSelection
from lazymesh.datapath.kernelfeatures import kernel_honours_noexist
from lazymesh.datapath.netlinkthread import NetlinkThread
from lazymesh.datapath.pins import IPCACHE, Pins, alone, budget, check_bpffs
from lazymesh.datapath.program import MeshMaps, load
from lazymesh.datapath.signals import SignalReader
from lazymesh.errors import DatapathError
from lazymesh.metrics import Metrics
from lazymesh.roles.auditing import Auditor
from lazymesh.roles.ciliumipcaches import CiliumIpcaches
from lazymesh.roles.cleanup import CleanUp
from lazymesh.roles.configdir import check_directories
from lazymesh.roles.driver import Driver, Shadow
from lazymesh.roles.endpoints import Endpoints
from lazymesh.roles.holding import HolderProcess, Holding, HoldSettings
from lazymesh.roles.inputs import MeshEventBuffer, MissThrottle
from lazymesh.roles.ipcaches import OwnIpcache
from lazymesh.roles.mesh import Mesh
from lazymesh.roles.preflight import check_interfaces, read_policy, resolve_mode
from lazymesh.roles.programsettings import ProgramSettings
from lazymesh.roles.status import Parts, Starting
from lazymesh.tasks import together

if TYPE_CHECKING:
    import threading

    from lazymesh.core.policy import Policy
    from lazymesh.datapath.program import Compiling, Datapath
    from lazymesh.datapath.programcache import Compiled
    from lazymesh.metrics import Sample
    from lazymesh.roles.auditing import Allows
    from lazymesh.roles.ipcaches import NodeIpcaches
    from lazymesh.roles.status import Status
    from lazymesh.settings import AgentSettings

log = structlog.get_logger()

TICK_S = 0.1
EPOCH_S = 10.0
"""How long the programs remember that they have noted a peer."""
M_MMAP_THRESHOLD, OWN_PAGES_FROM = -3, 128 << 10
"""glibc's mallopt(3): blocks of this size and more get pages of their own, which are returned when they are freed."""


def run_agent(settings: AgentSettings, programs: Compiled | Compiling | None = None) -> None:
    """Run until SIGTERM or SIGINT; LazymeshError when something required is missing or taken.

    programs: what ``find_programs`` has returned, if it was called before.
    """
    if os.geteuid() != 0:
        raise DatapathError(
            "lazymesh agent needs root, because it loads BPF programs: use sudo, or a privileged container"
        )
    settings = resolve_mode(settings)
    check_capabilities()
    policy = read_policy(settings)
    check_directories(settings.mesh.clustermesh_config, settings.mesh.remote_config)
    # Left alone, glibc raises the threshold with each block that is freed, and the heap keeps what a long listing took.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, OWN_PAGES_FROM)
    agent = Agent(settings, policy, programs)
    # A storm makes hundreds of thousands of objects, none of them garbage, and traversing them was a fifth of its
    # work; what exists by now stays, and is not traversed again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    # The thread for netlink may compute for this long (the default is 5 ms) while a miss waits to be read.
    sys.setswitchinterval(0.001)
    asyncio.run(agent.run())


class Agent:
    """One life of the node agent."""

    def __init__(
        self,
        settings: AgentSettings,
        policy: Policy | None,
        programs: Compiled | Compiling | None = None,
    ) -> None:
        self._settings = settings
        self._compiled = programs
        self._selection = InterfaceSelection(settings.datapath.interfaces, settings.datapath.uplinks)
        self._engine = PolicyEngine(policy) if policy else None
        self._programs = ProgramSettings(settings, policy)
        self._metrics = Metrics()
        self._netlink = NetlinkThread()
        self._stop = asyncio.Event()
        self._holder: HolderProcess | None = None
        """The first one."""
        self._failure: Exception | None = None
        self._unexpected = 0
        self._started = time.monotonic()

    async def run(self) -> None:
        """Start everything in order of dependence, wait, and stop in the opposite order."""
        self._handle_signals()
        pins = Pins.under(self._settings.datapath.bpffs)
        check_bpffs(pins.directory.parent)
        check_interfaces(self._selection)
        pins.make_directory()
        with alone(pins.directory):
            self._log_start()
            cleanup = CleanUp(pins, self._settings)
            try:
                with cleanup.loading():
                    maps = MeshMaps(pins, self._settings.datapath.ipcache_size)
                with contextlib.closing(maps):
                    await self._load_and_serve(maps, cleanup)
                if self._failure is not None:
                    raise self._failure
                log.info("stopped")
            finally:
                await cleanup.run()

    def _log_start(self) -> None:
        mesh, wanted = self._settings.mesh, self._settings.datapath
        log.info(
            "starting",
            version=__version__,
            cluster=mesh.cluster_name,
            datapath=wanted.mode,
            on_miss=wanted.on_miss,
            clustermesh_config=str(mesh.clustermesh_config),
            **({"shadow": True} if self._settings.shadow else {}),
        )

    async def _load_and_serve(self, maps: MeshMaps, cleanup: CleanUp) -> None:
        """Load while the mesh is already followed, and the holder started: compiling takes as long as both."""
        enforcement = self._programs.enforcement(maps, self._engine)
        buffer = MeshEventBuffer()
        mesh = Mesh(self._settings.mesh, maps.cidrs, enforcement, buffer.feed)
        following = asyncio.create_task(mesh.run(), name="mesh")
        try:
            if self._settings.holds:
                with contextlib.suppress(OSError):  # Holding tries again, and says what is wrong
                    self._holder = HolderProcess(maps.pins.directory)
            with cleanup.loading():
                cache = self._settings.datapath.program_cache
                datapath = await asyncio.to_thread(load, maps, cache, self._compiled)
            try:
                await together(self._stop.wait(), self._serve(datapath, mesh, following, buffer, cleanup))
            finally:
                datapath.close()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            if self._holder is not None:
                await self._holder.end()

    async def _serve(
        self,
        datapath: Datapath,
        mesh: Mesh,
        following: asyncio.Task[None],
        buffer: MeshEventBuffer,
        cleanup: CleanUp,
    ) -> None:
        self._programs.write(datapath.config)
        async with contextlib.AsyncExitStack() as stack:
            starting = Starting(self._settings, self._started)
            endpoints = Endpoints(self._settings, self._metrics, starting)
            await endpoints.open(stack)
            await stack.enter_async_context(self._netlink)
            ipcaches = await self._open_ipcaches(datapath, starting)
            parts, auditor = self._assemble(datapath, ipcaches, mesh, buffer, cleanup.attached)
            stack.callback(parts.reader.close)
            status = endpoints.show(parts, auditor, self._programs)
            self._metrics.collect_counter(
                "lazymesh_unexpected_errors",
                "Unexpected errors; each is in the log",
                (),
                self._count_unexpected,
            )
            parts.reader.start()
            cleanup.begin_attaching()
            await together(
                asyncio.wait_for(following, None),
                ipcaches.run(),
                self._netlink.run(parts.follower.run(cleanup.attached.set)),
                self._tick(parts, status),
                self._note_use(datapath, parts.driver),
                parts.holding.run(),
                auditor.run(),
            )

    def _assemble(
        self,
        datapath: Datapath,
        ipcaches: NodeIpcaches,
        mesh: Mesh,
        buffer: MeshEventBuffer,
        attached: threading.Event,
    ) -> tuple[Parts, Auditor]:
        """Make what resolves misses and holds packets, with what an earlier life left; nothing of it runs yet."""
        settings, wanted = self._settings, self._settings.datapath
        installer = Installer(
            ipcaches.maps,
            datapath.journal,
            kernel_honours_noexist(),
            shared=ipcaches.shared,
            writer=datapath.writer,
        )
        shadow = Shadow(ipcaches) if settings.shadow else None
        if shadow is not None and ipcaches.shared and installer.has_leftovers():
            raise DatapathError(
                "entries of an earlier run without --shadow stand in Cilium's ipcache, and nothing would keep them"
                " up to date: run `lazymesh uninstall` first"
            )
        owned = budget(ipcaches.maps[0].max_entries, datapath.journal.size)
        limits = Limits(owned=owned, stale_after=settings.stale_limit_s)
        judge = Judge(mesh.table, mesh.identities, settings.mesh.region, ipcaches.here)
        resolver = Resolver(limits, judge, random.random)
        auditor = Auditor(datapath.windows, datapath.counters, self._allows(), resolver)
        hold_settings = HoldSettings(wanted.hold_limit_s, wanted.drop_on_timeout)
        control = HoldControl(datapath.pins.directory)
        holding = Holding(datapath, control, hold_settings, self._netlink, self._holder)
        throttle = MissThrottle(datapath.config)
        driver = Driver(resolver, shadow or installer, mesh.links, self._metrics, throttle)
        driver.fail = self._fail
        driver.release, driver.released = holding.answer, holding.flush
        driver.installed = auditor.installed
        if shadow is None:
            for each in list(installer.adopt()):
                driver.feed(events.Adopted(*each))
            ipcaches.connect(installer, driver, resolver, mesh)
            if settings.holds:
                holding.want()
        buffer.connect(driver, mesh)
        hold_counters = HoldCounterMap(datapath.pins.directory)
        throttle.reader = SignalReader(datapath.signals, driver.on_signals, throttle.mute)
        parts = Parts(
            settings=settings,
            datapath=datapath,
            ipcaches=ipcaches,
            mesh=mesh,
            resolver=resolver,
            driver=driver,
            shadow=shadow,
            follower=InterfaceFollower(datapath, self._selection, wanted.attach),
            holding=holding,
            hold_counters=hold_counters,
            reader=throttle.reader,
            limits=limits,
            attached=attached,
            started=self._started,
        )
        return parts, auditor

    def _allows(self) -> Allows | None:
        """Return what the audit asks for a verdict: our policy if there is one; beside Cilium nothing can be asked."""
        if self._engine is not None:
            return self._engine.verdict
        return None if self._settings.datapath.mode == "cilium" else lambda _direction, _identity: True

    async def _open_ipcaches(self, datapath: Datapath, starting: Starting) -> NodeIpcaches:
        """Put the ipcache in force that entries go to: our own, or Cilium's."""
        settings = self._settings.datapath
        if settings.mode == "standalone":
            if not self._settings.shadow:
                # An earlier life may have been beside Cilium; nothing would keep its entries up to date any more.
                take_out_ours(settings.bpffs)
            return OwnIpcache(datapath, settings.ipcache_size, settings.bpffs)
        # An earlier life may have had no Cilium beside it.
        datapath.pins.path(IPCACHE).unlink(missing_ok=True)
        node = await self._netlink.enter(NodeView(self._selection))
        cilium = CiliumIpcaches(settings.bpffs, datapath, node, self._netlink)
        await cilium.open(starting.wait_for_cilium)
        if settings.attach == "clsact" and node.tcx_in_use:
            raise DatapathError(
                "Cilium is attached by tcx on this node, and deletes the clsact filters of others: leave out --attach"
                " clsact"
            )
        return cilium

    def _handle_signals(self) -> None:
        """Handle SIGTERM from the first moment on, so that --cleanup holds even if it arrives during compilation."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.set_exception_handler(self._on_unexpected)

    def _fail(self, error: Exception) -> None:
        """End the agent with this error."""
        self._failure = self._failure or error
        self._stop.set()

    def _on_unexpected(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log and count what asyncio would have written to stderr in its own format."""
        self._unexpected += 1
        log.error("unexpected", what=context["message"], exc_info=context.get("exception"))

    def _count_unexpected(self) -> list[Sample]:
        return [((), self._unexpected)]

    async def _tick(self, parts: Parts, status: Status) -> None:
        logged = False
        while True:
            await asyncio.sleep(TICK_S)
            parts.driver.feed(events.Tick())
            parts.reader.look()
            if not logged and status.not_ready() is None:
                logged = True
                log.info("ready", after_s=round(time.monotonic() - self._started, 3))

    async def _note_use(self, datapath: Datapath, driver: Driver) -> None:
        """Tell the resolver which peers the node talks to, and have the programs note them again."""
        while True:
            await asyncio.sleep(EPOCH_S)
            epoch = datapath.config.read().epoch
            datapath.config.change(epoch=(epoch + 1) % (1 << 32))
            driver.feed(events.Used(tuple(datapath.recent.of_epoch(epoch))))
