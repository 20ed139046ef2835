"""``lazymesh agent``: loads the datapath, follows the mesh, answers misses, until it is told to stop.

This file puts the parts together and takes them apart again; what they do is told where they stand: signals
(datapath/signals.py) go to the driver, which asks the resolver (core/resolver.py) and carries its commands out with
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
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from lazymesh import __version__
from lazymesh.core import events
from lazymesh.core.model import format_address
from lazymesh.core.policy import PolicyEngine
from lazymesh.core.policyfile import parse_policy
from lazymesh.core.resolver import Judge, Limits, Resolver
from lazymesh.datapath.capabilities import check_capabilities
from lazymesh.datapath.cilium import NodeView, is_pinned_here, take_out_ours
from lazymesh.datapath.holdmaps import HoldControl, HoldCounterMap, HoldLimits
from lazymesh.datapath.hooks import detach_everywhere
from lazymesh.datapath.installer import Installer
from lazymesh.datapath.interfaces import InterfaceFollower, InterfaceSelection
from lazymesh.datapath.maps import DatapathConfig, OnMiss, bits_of, kernel_honours_noexist
from lazymesh.datapath.pins import IPCACHE, Pins, alone, budget, check_bpffs
from lazymesh.datapath.program import MeshMaps, load
from lazymesh.datapath.signals import SignalReader
from lazymesh.errors import DatapathError, LazymeshError, SettingsError
from lazymesh.metrics import HttpServer, Metrics
from lazymesh.roles.announce import is_marked
from lazymesh.roles.auditing import Auditor
from lazymesh.roles.configdir import check_directories
from lazymesh.roles.control import ControlServer
from lazymesh.roles.driver import Driver, Shadow
from lazymesh.roles.enforcement import Enforcement
from lazymesh.roles.export import Sources, export
from lazymesh.roles.guest import GuestIpcaches
from lazymesh.roles.holding import Holding, HoldSettings
from lazymesh.roles.inlets import Inbox, Valve
from lazymesh.roles.ipcaches import OwnIpcache
from lazymesh.roles.mesh import Mesh
from lazymesh.roles.status import Parts, Starting, Status
from lazymesh.roles.uninstall import take_out_everywhere
from lazymesh.settings import CILIUM_INTERFACES
from lazymesh.tasks import together

if TYPE_CHECKING:
    from lazymesh.core.policy import Policy
    from lazymesh.datapath.program import Datapath
    from lazymesh.roles.auditing import Allows
    from lazymesh.roles.ipcaches import NodeIpcaches
    from lazymesh.settings import AgentSettings

log = structlog.get_logger()

TICK_S = 0.1
EPOCH_S = 10.0
"""How long the programs remember that they have noted a peer."""
M_MMAP_THRESHOLD, OWN_PAGES_FROM = -3, 128 << 10
"""glibc's mallopt(3): blocks from this size on get pages of their own, and these go back when they are freed."""


def run_agent(settings: AgentSettings) -> None:
    """Run until SIGTERM or SIGINT; LazymeshError when something that is needed is missing or taken."""
    if os.geteuid() != 0:
        raise DatapathError(
            "lazymesh agent needs root: it loads BPF programs (sudo, or a privileged container)"
        )
    settings = _with_mode(settings)
    check_capabilities()
    policy = _read_policy(settings)
    check_directories(settings.mesh.clustermesh_config, settings.mesh.remote_config)
    # Left alone, glibc raises that size with each block that is freed, and the heap keeps what a long listing took.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, OWN_PAGES_FROM)
    agent = Agent(settings, policy)
    # A storm makes objects by the hundred thousand, none of them garbage, and looking through them was a fifth of its
    # work; what is there by now stays, and is looked through no more.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    asyncio.run(agent.run())


def _with_mode(settings: AgentSettings) -> AgentSettings:
    """Decide what ``auto`` means here; SettingsError for what does not go together."""
    datapath = settings.datapath
    if datapath.mode == "auto":
        datapath = replace(datapath, mode="cilium" if is_pinned_here(datapath.bpffs) else "standalone")
    if datapath.mode == "cilium" and not datapath.interfaces and not datapath.uplinks:
        datapath = replace(datapath, interfaces=CILIUM_INTERFACES)
    if datapath.mode == "cilium" and settings.policy is not None:
        raise SettingsError(
            "--policy is for nodes without Cilium, whose own policies decide here: leave it out,"
            " or keep to an ipcache of our own with --datapath standalone"
        )
    return replace(settings, datapath=datapath)


def _read_policy(settings: AgentSettings) -> Policy | None:
    if settings.policy is None:
        return None
    try:
        text = settings.policy.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"cannot read the policy {settings.policy}: {exc}") from exc
    policy, wanted = parse_policy(text, str(settings.policy)), settings.datapath
    if policy.enforced and not settings.shadow and not (wanted.interfaces and wanted.uplinks):
        missing = "--uplink (for example eth0)" if wanted.interfaces else "--interface (for example 'lxc+')"
        raise SettingsError(
            f"--policy needs {missing}, too: what comes in is judged at uplinks and what goes out at pods' interfaces,"
            " and answers pass that both have seen asked for"
        )
    return policy


class Agent:
    """One life of the node agent."""

    def __init__(self, settings: AgentSettings, policy: Policy | None) -> None:
        self._settings = settings
        self._selection = InterfaceSelection(settings.datapath.interfaces, settings.datapath.uplinks)
        self._policy = policy
        self._policy_tag = policy.tag if policy else 0
        self._enforced = policy.enforced if policy and not settings.shadow else frozenset()
        self._metrics = Metrics()
        self._stop = asyncio.Event()
        self._failure: Exception | None = None
        self._fresh = False
        """Nobody has left a pin here before us."""
        self._refused = False
        """What somebody has left here is none of our kind: it is not ours to remove."""
        self._touched = False
        """We may have attached to something."""
        self._attached = False
        """We have attached to everything that was there."""
        self._unexpected = 0
        self._status: Starting | Status
        self._started = time.monotonic()

    async def run(self) -> None:
        """Start everything in the order in which it depends on each other, wait, stop in the other order."""
        self._heed_signals()
        pins = Pins.under(self._settings.datapath.bpffs)
        check_bpffs(pins.directory.parent)
        self._check_interfaces()
        try:
            pins.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise DatapathError(f"cannot make {pins.directory}: {exc.strerror}") from exc
        with alone(pins.directory):
            self._say_what_starts()
            self._fresh = not any(pins.directory.iterdir())
            try:
                with contextlib.closing(self._mesh_maps(pins)) as maps:
                    await self._load_and_serve(pins, maps)
                if self._failure is not None:
                    raise self._failure
                log.info("stopped")
            finally:
                # A first start that fails half-way leaves no program behind that denies what nobody resolves.
                if self._leaves_nothing:
                    await self._clean_up(pins)

    def _say_what_starts(self) -> None:
        mesh, wanted = self._settings.mesh, self._settings.datapath
        log.info(
            "starting", version=__version__, cluster=mesh.cluster_name, datapath=wanted.mode, on_miss=wanted.on_miss,
            clustermesh_config=str(mesh.clustermesh_config), **({"shadow": True} if self._settings.shadow else {}),
        )  # fmt: skip

    def _mesh_maps(self, pins: Pins) -> MeshMaps:
        try:
            return MeshMaps(pins, self._settings.datapath.ipcache_size)
        except DatapathError:
            self._refused = not self._fresh
            raise

    async def _load_and_serve(self, pins: Pins, maps: MeshMaps) -> None:
        """Load, and follow the mesh meanwhile: to compile takes as long as to list a large one."""
        engine = PolicyEngine(self._policy) if self._policy else None
        enforcement = self._enforcement(maps, engine)
        inbox = Inbox()
        mesh = Mesh(self._settings.mesh, maps.cidrs, enforcement, inbox.feed)
        following = asyncio.create_task(mesh.run(), name="mesh")
        try:
            try:
                wanted = self._settings.datapath
                datapath = await asyncio.to_thread(load, pins, wanted.ipcache_size, wanted.program_cache)
            except DatapathError:
                self._refused = not self._fresh
                raise
            try:
                await together(self._stop.wait(), self._serve(datapath, mesh, following, inbox, engine))
            finally:
                datapath.close()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    def _enforcement(self, maps: MeshMaps, engine: PolicyEngine | None) -> Enforcement:
        """Begin with what an earlier life has allowed if that was by this policy, or else with nothing."""
        config = maps.config.read()
        keep = engine is not None and config.policy_tag == self._policy_tag
        if not keep:
            # Whose the rights are that are written from now on is said once they are in force: we may die before. And
            # what is not enforced any more must not be denied meanwhile, with the map empty.
            maps.config.change(policy_tag=0, enforced=config.enforced & bits_of(self._enforced))
        return Enforcement(maps.policy, engine, keep)

    @property
    def _leaves_nothing(self) -> bool:
        if self._refused:
            return False
        marked = is_marked(self._settings.uninstall_mark)
        return self._settings.cleanup or marked or (self._fresh and not self._attached)

    async def _serve(
        self,
        datapath: Datapath,
        mesh: Mesh,
        following: asyncio.Task[None],
        inbox: Inbox,
        engine: PolicyEngine | None,
    ) -> None:
        self._configure(datapath)
        async with contextlib.AsyncExitStack() as stack:
            starting = Starting(self._settings, self._started)
            control = await self._listen(starting, stack)
            ipcaches = await self._open_ipcaches(datapath, starting, stack)
            parts = self._assemble(datapath, ipcaches, mesh, inbox, stack)
            driver, holding = parts.driver, parts.holding
            auditor = Auditor(datapath.windows, datapath.counters, self._allows(engine), parts.resolver)
            driver.release, driver.released = holding.answer, holding.flush
            driver.installed = auditor.installed
            status = self._show(parts, auditor, control)
            parts.reader.start()
            stack.callback(lambda: setattr(self, "_attached", parts.attached.is_set()))
            self._touched = True
            await together(
                asyncio.wait_for(following, None),
                ipcaches.run(),
                parts.follower.run(parts.attached),
                self._tick(driver, status),
                self._note_use(datapath, driver),
                holding.run(),
                auditor.run(),
            )

    def _assemble(
        self,
        datapath: Datapath,
        ipcaches: NodeIpcaches,
        mesh: Mesh,
        inbox: Inbox,
        stack: contextlib.AsyncExitStack,
    ) -> Parts:
        """Make what resolves misses and holds packets, with what an earlier life has left; nothing of it runs yet."""
        settings = self._settings
        owned = budget(ipcaches.maps[0].max_entries, datapath.journal.size)
        limits = Limits(owned=owned, stale_after=settings.stale_limit_s)
        installer = Installer(
            ipcaches.maps,
            datapath.journal,
            kernel_honours_noexist(),
            shared=ipcaches.shared,
            writer=datapath.writer,
        )
        judge = Judge(mesh.table, mesh.identities, settings.mesh.region, ipcaches.here)
        resolver = Resolver(limits, judge, random.random)
        shadow = Shadow(ipcaches) if settings.shadow else None
        valve = Valve(datapath.config)
        driver = Driver(resolver, shadow or installer, mesh.links, self._metrics, valve)
        driver.fail = self._fail
        if shadow is not None and ipcaches.shared and installer.has_leftovers():
            raise DatapathError(
                "entries of an earlier run without --shadow stand in Cilium's ipcache, and nobody would keep them"
                " true: run `lazymesh uninstall` first"
            )
        if shadow is None:
            for each in list(installer.adopt()):
                driver.feed(events.Adopted(*each))
            ipcaches.connect(installer, driver, resolver, mesh)
        inbox.connect(driver, mesh)
        holding = Holding(datapath, HoldControl(datapath.pins.directory), self._hold_settings())
        if settings.datapath.on_miss == "hold" and shadow is None:
            holding.want()
        valve.reader = SignalReader(datapath.signals, driver.on_signals, valve.mute)
        stack.callback(valve.reader.close)
        return Parts(
            settings,
            datapath,
            ipcaches,
            mesh,
            resolver,
            driver,
            shadow,
            InterfaceFollower(datapath, self._selection, settings.datapath.attach),
            holding,
            HoldCounterMap(datapath.pins.directory),
            valve.reader,
            limits,
            asyncio.Event(),
            self._started,
        )

    async def _listen(self, starting: Starting, stack: contextlib.AsyncExitStack) -> ControlServer:
        """Answer people, the kubelet and Prometheus, by the control socket and by HTTP.

        Before anything is waited for: an agent that does not answer is taken for dead, and killed.
        """
        settings, self._status = self._settings, starting
        answers = {"status": lambda _request: starting.describe()}
        answers |= dict.fromkeys(("audit", "on-miss", "stale"), starting.refuse)
        control = ControlServer(settings.socket, answers)
        await control.start()
        stack.push_async_callback(control.close)
        if settings.metrics_address is not None:
            server = HttpServer(settings.metrics_address, self._metrics, self._not_ready)
            await server.start()
            stack.push_async_callback(server.close)
        return control

    def _not_ready(self) -> str | None:
        return self._status.not_ready()

    def _show(self, parts: Parts, auditor: Auditor, control: ControlServer) -> Status:
        """Let them look at the parts."""
        status = self._status = Status(parts)
        control.use(
            {
                "status": lambda _request: status.describe(),
                "stale": lambda _request: {
                    "addresses": [format_address(each) for each in parts.resolver.stale_addresses()]
                },
                "audit": lambda request: auditor.describe(float(request["since"])),
                "on-miss": lambda request: self._switch_on_miss(
                    parts.datapath, parts.holding, request["action"]
                ),
            },
            lambda on: setattr(parts.driver, "publish", control.publish if on else None),
        )
        export(self._metrics, Sources(status, control, auditor.log))
        parts.ipcaches.export(self._metrics)
        self._metrics.collect_counter(
            "lazymesh_unexpected_errors", "Errors that nobody expected; each is in the log", (),
            lambda: [((), self._unexpected)],
        )  # fmt: skip
        return status

    def _allows(self, engine: PolicyEngine | None) -> Allows | None:
        """Return whom the audit asks: our policy if there is one; Cilium's, beside it, cannot be asked."""
        if engine is not None:
            return engine.verdict
        return None if self._settings.datapath.mode == "cilium" else lambda _direction, _identity: True

    async def _open_ipcaches(
        self, datapath: Datapath, starting: Starting, stack: contextlib.AsyncExitStack
    ) -> NodeIpcaches:
        """Put the ipcache in force that entries go to: our own, or Cilium's."""
        settings = self._settings.datapath
        if settings.mode == "standalone":
            if not self._settings.shadow:
                # An earlier life may have been beside Cilium; nobody would look after its entries any more.
                take_out_ours(settings.bpffs)
            return OwnIpcache(datapath, settings.ipcache_size, settings.bpffs)
        datapath.pins.path(IPCACHE).unlink(
            missing_ok=True
        )  # of an earlier life, which had no Cilium beside it
        node = await stack.enter_async_context(NodeView(self._selection))
        guest = GuestIpcaches(settings.bpffs, datapath, node)
        await guest.open(starting.wait_for_cilium)
        if settings.attach == "clsact" and node.tcx_in_use:
            raise DatapathError(
                "Cilium is attached by tcx here, and deletes clsact filters of others: leave out --attach clsact"
            )
        return guest

    def _check_interfaces(self) -> None:
        """Look for the interfaces named exactly before a second is spent on compiling."""
        for name in self._selection.exact_names():
            try:
                socket.if_nametoindex(name)
            except OSError as exc:
                raise DatapathError(f"no interface {name} here: `ip link` lists what there is") from exc

    def _heed_signals(self) -> None:
        """Take SIGTERM from the first moment on, so that --cleanup holds even if it comes while we compile."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.set_exception_handler(self._on_unexpected)

    def _fail(self, error: Exception) -> None:
        """End the agent with this error."""
        self._failure = self._failure or error
        self._stop.set()

    def _on_unexpected(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log and count what would have gone to stderr in a form of asyncio's own."""
        self._unexpected += 1
        log.error("unexpected", what=context["message"], exc_info=context.get("exception"))

    def _configure(self, datapath: Datapath) -> None:
        settings, shadow = self._settings.datapath, self._settings.shadow
        # Where no entry is ever written, policy, holding and dropping would cut everybody off.
        on_miss = OnMiss.PASS if shadow else OnMiss[settings.on_miss.upper()]
        datapath.config.write(
            DatapathConfig(
                interface_rate=settings.signal_rate,
                uplink_rate=4 * settings.signal_rate,
                global_rate=10 * settings.signal_rate,
                on_miss=on_miss,
                remember=self._may_remember(on_miss),
                enforced=self._enforced,
                policy_tag=self._policy_tag,
            )
        )

    def _may_remember(self, on_miss: OnMiss) -> bool:
        """Tell whether the programs may remember an answer until the next tick.

        Cilium's agent may remove an entry meanwhile: a packet then goes on as world, unless misses are to be held.
        """
        return self._settings.datapath.mode == "standalone" or on_miss is not OnMiss.HOLD

    def _switch_on_miss(self, datapath: Datapath, holding: Holding, action: str) -> dict[str, Any]:
        """Change what becomes of missed packets, at once."""
        if self._settings.shadow and action != "pass":
            return {"error": "in shadow mode missed packets are always passed on"}
        on_miss = OnMiss[action.upper()]
        datapath.config.change(on_miss=on_miss)
        datapath.config.remember(self._may_remember(on_miss))
        if action == "hold":
            holding.want()
        log.info("on miss", action=action)
        return {"onMiss": action, "holding": holding.state, "problem": holding.problem}

    def _hold_settings(self) -> HoldSettings:
        settings = self._settings.datapath
        return HoldSettings(HoldLimits(), settings.hold_limit_s, settings.drop_on_timeout)

    async def _tick(self, driver: Driver, status: Status) -> None:
        told = False
        while True:
            await asyncio.sleep(TICK_S)
            driver.feed(events.Tick())
            if not told and status.not_ready() is None:
                told = True
                log.info("ready", after_s=round(time.monotonic() - self._started, 3))

    async def _note_use(self, datapath: Datapath, driver: Driver) -> None:
        """Tell the resolver whom the node talks to, and have the programs note it anew."""
        while True:
            await asyncio.sleep(EPOCH_S)
            epoch = datapath.config.read().epoch
            datapath.config.change(epoch=(epoch + 1) % (1 << 32))
            driver.feed(events.Used(tuple(datapath.recent.of_epoch(epoch))))

    async def _clean_up(self, pins: Pins) -> None:
        """Leave the node as it was before us; filters that cannot be ours (another agent's, by its own pins) stay."""
        interfaces: list[str] = []
        if self._touched or not self._fresh:
            try:
                interfaces = await detach_everywhere(pins)
            except LazymeshError as exc:
                log.error("clean-up", error=str(exc))
            # Also an earlier life's, which this one may not have got to look at.
            try:
                await take_out_everywhere(self._settings.datapath.bpffs)
            except (LazymeshError, OSError) as exc:
                log.error("clean-up", error=str(exc))
        pins.remove()
        if interfaces:
            log.info("cleaned up", detached=interfaces)
