"""Attaches the programs to interfaces (clsact ingress, by pyroute2) and follows interfaces as they come and go.

A pod's traffic enters the node at the ingress of the pod's host-side interface, the network's at the uplink's: so both
programs sit on ingress hooks. A filter goes with its interface; nothing is left behind when a pod goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from pyroute2 import AsyncIPRoute, NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_LINK

from lazymesh.core.model import Direction
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from lazymesh.datapath.program import Datapath

log = structlog.get_logger()

_INGRESS = 0xFFFFFFF2
"""TC_H_CLSACT with TC_H_MIN_INGRESS."""
_PRIORITY, _HANDLE, _ETH_P_ALL = 49_000, 0x1A2E, 3
"""A place of our own on the hook: Cilium's filters are priority 1, handle 1 (cilium-formats 8.1)."""
_ARPHRD_ETHER = 1
_ROOT = 0xFFFFFFFF
_TAP_RING = 16_384
_AF_BRIDGE = 7
"""The family of messages about a bridge's ports: leaving a bridge is told as an RTM_DELLINK of this family."""


@dataclass(frozen=True, slots=True)
class InterfaceSelection:
    """Which interfaces are pods' (egress misses) and which are uplinks (ingress misses).

    A name that ends in ``+`` stands for every interface whose name starts with what precedes it.
    """

    pods: tuple[str, ...] = ()
    uplinks: tuple[str, ...] = ()

    def direction_of(self, name: str) -> Direction | None:
        """Return what the interface carries, None when it is not selected."""
        if any(_matches(name, pattern) for pattern in self.uplinks):
            return Direction.INGRESS
        if any(_matches(name, pattern) for pattern in self.pods):
            return Direction.EGRESS
        return None

    def exact_names(self) -> list[str]:
        """Return the names that must exist: those without a wildcard."""
        return [name for name in (*self.pods, *self.uplinks) if not name.endswith("+")]


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("+") else name == pattern


@dataclass(slots=True)
class _Attached:
    name: str
    direction: Direction


@dataclass(slots=True)
class InterfaceStats:
    """What happened to interfaces so far."""

    attached_total: int = 0
    attach_errors_total: int = 0
    resyncs_total: int = 0


@dataclass(slots=True)
class InterfaceFollower:
    """Keeps our program on every selected interface."""

    datapath: Datapath
    selection: InterfaceSelection
    stats: InterfaceStats = field(default_factory=InterfaceStats)
    _attached: dict[int, _Attached] = field(default_factory=dict)
    _ipr: AsyncIPRoute | None = None

    @property
    def attached(self) -> dict[str, Direction]:
        """Names and directions of the interfaces that carry our program."""
        return {item.name: item.direction for item in self._attached.values()}

    async def run(self, ready: asyncio.Event) -> None:
        """Attach to what is there, then follow the kernel's link messages for ever; sets ``ready`` after the first.

        DatapathError when an interface that was named exactly is missing, or cannot be attached to.
        """
        async with AsyncIPRoute() as self._ipr:
            first = True
            while True:
                async with AsyncIPRoute() as monitor:
                    # Listen before listing: what appears in between is seen twice, never missed.
                    await monitor.bind(RTMGRP_LINK)
                    await self._resync(strict=first)
                    first = False
                    ready.set()
                    with contextlib.suppress(NetlinkError, OSError):
                        await self._follow(monitor)
                self.stats.resyncs_total += 1
                log.warning("the kernel's link messages were lost; listing interfaces again")
                await asyncio.sleep(0.05)

    async def _follow(self, monitor: AsyncIPRoute) -> None:
        while True:
            async for message in monitor.get():
                if message["family"] == _AF_BRIDGE:
                    continue
                if message["event"] == "RTM_DELLINK":
                    self._attached.pop(message["index"], None)
                elif message["event"] == "RTM_NEWLINK":
                    await self._consider(message, strict=False)

    async def _resync(self, strict: bool) -> None:
        links = [link async for link in await self._route.link("dump")]
        present = {link["index"] for link in links}
        for gone in self._attached.keys() - present:
            del self._attached[gone]
        names = {link.get("ifname") for link in links}
        for name in self.selection.exact_names() if strict else ():
            if name not in names:
                raise DatapathError(f"no interface {name} here: `ip link` lists what there is")
        for link in links:
            named = link.get("ifname") in self.selection.exact_names()
            await self._consider(link, strict and named, again=True)

    async def _consider(self, link: Any, strict: bool, again: bool = False) -> None:
        """Bring one interface's attachment up to date with its name (a pod's device may be renamed into place).

        again: attach also where we think that we are attached, since we may have missed how that ended.
        """
        index, name = link["index"], link.get("ifname")
        direction = self.selection.direction_of(name)
        known = self._attached.get(index)
        if known is not None and known.direction == direction:
            known.name = name
            if not again:
                return
        elif known is not None:
            await self._detach(index)
        if direction is None:
            return
        try:
            if link["ifi_type"] != _ARPHRD_ETHER:
                raise DatapathError(
                    f"{name} is no Ethernet interface, which is all that lazymesh can read so far"
                )
            await self._attach(index, direction)
        except (DatapathError, NetlinkError) as exc:
            if isinstance(exc, NetlinkError) and exc.code in (errno.ENODEV, errno.EINVAL) and not strict:
                return  # it went away between its message and our answer
            self.stats.attach_errors_total += 1
            if strict:
                raise DatapathError(f"cannot attach to {name}: {exc}") from exc
            log.warning("cannot attach", interface=name, error=str(exc))
            return
        if index in self._attached:
            return
        self._attached[index] = _Attached(name, direction)
        self.stats.attached_total += 1
        log.info("attached", interface=name, direction=direction.name.lower())

    async def _attach(self, index: int, direction: Direction) -> None:
        name, fd = self.datapath.program(direction)
        try:
            await self._route.tc("add", "clsact", index)
        except NetlinkError as exc:
            if exc.code != errno.EEXIST:
                raise
        await self._route.tc(
            "replace-filter", "bpf", index, _HANDLE,
            fd=fd, name=name, parent=_INGRESS, prio=_PRIORITY, protocol=_ETH_P_ALL, classid=1, direct_action=True,
        )  # fmt: skip

    async def _detach(self, index: int) -> None:
        self._attached.pop(index, None)
        with contextlib.suppress(NetlinkError):  # the interface, or the filter, is gone already
            await self._route.tc(
                "del-filter", "bpf", index, _HANDLE, parent=_INGRESS, prio=_PRIORITY, protocol=_ETH_P_ALL
            )

    @property
    def _route(self) -> AsyncIPRoute:
        if self._ipr is None:
            raise RuntimeError("run() was not called")
        return self._ipr


async def detach_everywhere() -> list[str]:
    """Remove our filters from every interface, and each clsact qdisc that is empty then; returns interface names."""
    cleaned = []
    async with AsyncIPRoute() as ipr:
        for link in [link async for link in await ipr.link("dump")]:
            # An interface may go at any moment, and its filters with it.
            with contextlib.suppress(NetlinkError):
                if await _clean(ipr, link["index"]):
                    cleaned.append(link.get("ifname"))
    return cleaned


async def _clean(ipr: AsyncIPRoute, index: int) -> bool:
    filters = [item async for item in await ipr.get_filters(index=index, parent=_INGRESS)]
    if not any((item["info"] >> 16, item["handle"]) == (_PRIORITY, _HANDLE) for item in filters):
        return False
    await ipr.tc("del-filter", "bpf", index, _HANDLE, parent=_INGRESS, prio=_PRIORITY, protocol=_ETH_P_ALL)
    others = [item async for item in await ipr.get_filters(index=index, parent=_INGRESS)]
    others += [item async for item in await ipr.get_filters(index=index, parent=_INGRESS + 1)]
    if not others:
        await ipr.tc("del", "clsact", index)
    return True


async def prepare_tap(datapath: Datapath, index: int, name: str) -> None:
    """Make the holder's TAP fit for parked packets and nothing else, then bring it up; DatapathError if that fails."""
    try:
        # Silent before it is up: no address, no router solicitation, nothing of its own.
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1", encoding="ascii")  # noqa: ASYNC240 (memory)
    except OSError:
        log.debug("no IPv6 here to switch off", interface=name)
    (out, out_fd), (back, back_fd) = datapath.hold_programs()
    try:
        async with AsyncIPRoute() as ipr:
            # noqueue, or clone_redirect would say that a full ring took the packet; the ring longer than all slots.
            await ipr.link("set", index=index, txqlen=_TAP_RING)
            await ipr.tc("add", "clsact", index)
            for program, fd, parent in ((out, out_fd, _INGRESS + 1), (back, back_fd, _INGRESS)):
                await ipr.tc(
                    "replace-filter", "bpf", index, _HANDLE,
                    fd=fd, name=program, parent=parent, prio=_PRIORITY, protocol=_ETH_P_ALL, classid=1,
                    direct_action=True,
                )  # fmt: skip
            await ipr.link("set", index=index, state="up")
            await ipr.tc("replace", "noqueue", index, parent=_ROOT)
    except NetlinkError as exc:
        raise DatapathError(f"cannot set up the TAP device {name}: {exc}") from exc
