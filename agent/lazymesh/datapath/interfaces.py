"""Keeps the programs on the selected interfaces, first on their ingress hooks, as interfaces come and go.

A pod's traffic enters the node at the ingress of the pod's host-side interface, the network's at the uplink's: so both
programs are on ingress hooks. hooks.py attaches them. What is attached goes with its interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from pyroute2 import AsyncIPRoute, NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_LINK, RTMGRP_TC

from lazymesh.core.model import Direction
from lazymesh.datapath import tap
from lazymesh.datapath.hooks import choose_hook, has_metadata, link_kind, link_name
from lazymesh.errors import DatapathError
from lazymesh.tasks import together

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.datapath.hooks import Hook
    from lazymesh.datapath.program import Datapath

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
"""Between checks of the order of tcx programs, changes of which the kernel does not report."""
LOOK_REPORTED = 20
"""Filters, changes of which it does report, are checked once in this many times: that is costly, and only catches what
went unheard. Failed attachments are retried as often."""
INSIST_EVERY_S = 5.0
"""The least time between moving an interface's program back to the front."""
_FILTER_EVENTS = ("RTM_NEWTFILTER", "RTM_DELTFILTER", "RTM_DELQDISC")
_ARPHRD_ETHER = 1
_AF_BRIDGE = 7
"""The family of messages about a bridge's ports: leaving a bridge is reported as an RTM_DELLINK of this family."""


@dataclass(frozen=True, slots=True)
class InterfaceSelection:
    """Which interfaces are pods' (egress misses) and which are uplinks (ingress misses).

    A name that ends in ``+`` matches every interface whose name starts with the part before it.
    """

    pods: tuple[str, ...] = ()
    uplinks: tuple[str, ...] = ()

    def direction_of(self, name: str) -> Direction | None:
        """Return the interface's direction, None if it is not selected; the holder's TAP never is."""
        if name in tap.NAMES:
            return None
        if any(_matches(name, pattern) for pattern in self.uplinks):
            return Direction.INGRESS
        if any(_matches(name, pattern) for pattern in self.pods):
            return Direction.EGRESS
        return None

    def exact_names(self) -> list[str]:
        """Return the names that must exist: those without wildcard."""
        return [name for name in (*self.pods, *self.uplinks) if not name.endswith("+")]


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("+") else name == pattern


@dataclass(slots=True)
class _Attached:
    name: str
    direction: Direction
    patience: float = 0.0
    """When it may next be moved to the front."""
    behind: bool = False


@dataclass(slots=True)
class _Failed:
    link: Any
    """The kernel's last message about the interface; it reports every change, and removal."""
    name: str
    reason: str


@dataclass(slots=True)
class InterfaceStats:
    """What has happened to interfaces so far."""

    attach_errors_total: int = 0
    displaced_total: int = 0
    """How often our program was no longer first, or gone, and was attached again."""


@dataclass(slots=True)
class InterfaceFollower:
    """Keeps our program on every selected interface."""

    datapath: Datapath
    selection: InterfaceSelection
    style: str = "auto"
    """tcx, clsact, or auto for the better one that the kernel has."""
    stats: InterfaceStats = field(default_factory=InterfaceStats)
    # Another thread reads these two, so what it reads is a copy: list() makes one before anybody else has a turn.
    _attached: dict[int, _Attached] = field(default_factory=dict)
    _failed: dict[int, _Failed] = field(default_factory=dict)
    """Selected, but our program is not, or perhaps no longer, attached."""
    _ipr: AsyncIPRoute | None = None
    _hook: Hook | None = None
    _placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Our own steps cause kernel messages: nothing may check, attach or detach in the middle of one."""

    @property
    def attached(self) -> dict[str, Direction]:
        """Names and directions of the interfaces with our program."""
        return {item.name: item.direction for item in list(self._attached.values())}

    @property
    def attach(self) -> str:
        """How programs get onto interfaces here: tcx or clsact."""
        return self._hook.style if self._hook else self.style

    @property
    def behind(self) -> list[str]:
        """Names of the interfaces on which another program insists on being first."""
        return sorted(item.name for item in list(self._attached.values()) if item.behind)

    @property
    def failed(self) -> list[tuple[str, str]]:
        """Names of the selected interfaces that cannot be attached to, and why."""
        return sorted((item.name, item.reason) for item in list(self._failed.values()))

    async def run(self, ready: Callable[[], object]) -> None:
        """Attach to what is there, call ``ready``, then follow the kernel's link messages forever.

        The agent runs this in another thread than the one that reads what is attached. DatapathError when an interface
        named exactly is missing or cannot be attached to.
        """
        async with AsyncIPRoute() as self._ipr:
            self._hook = choose_hook(self.style, self.datapath.pins, self._ipr)
            self.datapath.config.change(park_verdict=self._hook.park_verdict)
            await together(self._keep_attached(ready), self._keep_first())

    async def _keep_attached(self, ready: Callable[[], object]) -> None:
        first = True
        while True:
            async with AsyncIPRoute() as monitor:
                # Listen before listing: what appears in between is seen twice, never missed.
                await monitor.bind(RTMGRP_LINK | RTMGRP_TC)
                await self._resync(strict=first)
                first = False
                ready()
                with contextlib.suppress(NetlinkError, OSError):
                    await self._follow(monitor)
            log.warning("the kernel's link messages were lost; listing interfaces again")
            await asyncio.sleep(0.05)

    async def _follow(self, monitor: AsyncIPRoute) -> None:
        while True:
            async for message in monitor.get():
                # Messages that pyroute2 does not know (such as of chains) have neither.
                event, index = message.get("event"), message.get("index")
                if message.get("family") == _AF_BRIDGE or index is None:
                    continue
                if event == "RTM_NEWLINK":
                    await self._consider(message, strict=False)
                elif event == "RTM_DELLINK" and (index in self._attached or index in self._failed):
                    await self._detach(index)
                elif event in _FILTER_EVENTS and index in self._attached:
                    await self._look_after(index, self._attached[index])

    async def _resync(self, strict: bool) -> None:
        links = [link async for link in await self._route.link("dump")]
        present = {link["index"] for link in links}
        for gone in (self._attached.keys() | self._failed.keys() | self.datapath.pins.linked()) - present:
            await self._detach(gone)
        names = {link_name(link) for link in links}
        for name in self.selection.exact_names() if strict else ():
            if name not in names:
                raise DatapathError(f"no interface {name} here: `ip link` lists what there is")
        for link in links:
            named = link_name(link) in self.selection.exact_names()
            await self._consider(link, strict and named, again=True)
            if strict and link["index"] in self._attached:
                await self._on.supersede(link["index"])

    async def _consider(self, link: Any, strict: bool, again: bool = False) -> None:
        """Bring one interface's attachment up to date with its name (a pod's device may be renamed into place).

        again: attach even where we think we are attached, since we may have missed a change.
        """
        async with self._placing:
            await self._bring_up_to_date(link, strict, again)

    async def _bring_up_to_date(self, link: Any, strict: bool, again: bool) -> None:
        index, name = link["index"], link_name(link)
        direction = self.selection.direction_of(name)
        known = self._attached.get(index)
        if known is not None and known.direction == direction:
            known.name = name
            if not again:
                return
        elif known is not None:
            await self._take_off(index)
        if direction is None:
            self._failed.pop(index, None)
            return
        try:
            if link["ifi_type"] != _ARPHRD_ETHER:
                raise DatapathError(
                    f"{name} is not an Ethernet interface, and lazymesh cannot read others yet: leave it out"
                )
            if link_kind(link) == "netkit":
                raise DatapathError(
                    f"{name} is a netkit device, which lazymesh does not support yet: use veth"
                )
            if has_metadata(link):
                raise DatapathError(
                    f"{name} is a tunnel in external mode, and a held packet would lose its tunnel data: leave it out"
                )
            await self._attach(index, direction)
        except (DatapathError, NetlinkError) as exc:
            if strict:
                raise DatapathError(f"cannot attach to {name}: {exc}") from exc
            self._note_failure(link, exc)
            return
        self._failed.pop(index, None)
        if index in self._attached:
            return
        self._attached[index] = _Attached(name, direction)
        log.info("attached", interface=name, direction=direction.name.lower())

    def _note_failure(self, link: Any, exc: DatapathError | NetlinkError) -> None:
        """Record a failure; count and log it once, unless the interface has probably gone since it was reported."""
        index, name, reason = link["index"], link_name(link), str(exc.args[-1])
        known = self._failed.get(index)
        self._failed[index] = _Failed(link, name, reason)
        if isinstance(exc, NetlinkError) and exc.code in (errno.ENODEV, errno.EINVAL):
            return
        if known is None or (known.name, known.reason) != (name, reason):
            self.stats.attach_errors_total += 1
            log.warning("cannot attach", interface=name, error=reason)

    async def _attach(self, index: int, direction: Direction) -> None:
        name, fd = self.datapath.program(direction)
        try:
            await self._on.attach(index, fd, name)
        except OSError as exc:
            raise NetlinkError(exc.errno or 0, exc.strerror) from exc

    async def _keep_first(self) -> None:
        """Return to the head of hooks where another program got ahead of ours, or ours was removed."""
        for count in itertools.count(1):
            await asyncio.sleep(LOOK_EVERY_S)
            for index, attached in list(self._attached.items()):
                if not self._on.reports_changes or attached.behind or count % LOOK_REPORTED == 0:
                    await self._look_after(index, attached)
            for index in list(self._failed) if count % LOOK_REPORTED == 0 else ():
                async with self._placing:
                    if index in self._failed:  # it may have gone while another task held the lock
                        await self._bring_up_to_date(self._failed[index].link, strict=False, again=True)

    async def _look_after(self, index: int, attached: _Attached) -> None:
        try:
            async with self._placing:
                if self._attached.get(index) is attached:  # it may have gone while another task held the lock
                    await self._put_in_place(index, attached)
        except (NetlinkError, OSError) as exc:  # most likely the interface is about to disappear
            log.debug("cannot check an interface", interface=attached.name, error=str(exc))

    async def _put_in_place(self, index: int, attached: _Attached) -> None:
        name, fd = self.datapath.program(attached.direction)
        place, now = await self._on.place(index, fd), time.monotonic()
        attached.behind = False
        if place == 0:
            return
        if place is not None and now < attached.patience:
            attached.behind = True  # the other one insists: if both did, they would take turns on the hook
            return
        if place is not None:
            attached.patience = now + INSIST_EVERY_S
        why = "it was removed" if place is None else "another program went ahead of it"
        log.warning("attaching our program again", interface=attached.name, why=why)
        await self._on.put_first(index, fd, name)
        self.stats.displaced_total += 1

    async def _detach(self, index: int) -> None:
        async with self._placing:
            await self._take_off(index)

    async def _take_off(self, index: int) -> None:
        self._attached.pop(index, None)
        self._failed.pop(index, None)
        with contextlib.suppress(
            NetlinkError, OSError
        ):  # the interface, or our program on it, is gone already
            await self._on.detach(index)

    @property
    def _on(self) -> Hook:
        if self._hook is None:
            raise RuntimeError("run() was not called")
        return self._hook

    @property
    def _route(self) -> AsyncIPRoute:
        if self._ipr is None:
            raise RuntimeError("run() was not called")
        return self._ipr
