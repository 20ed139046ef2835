"""The two ways onto an interface's ingress: tcx links (kernel 6.6 and later) and clsact filters.

Ours goes first, because no program behind us may have seen a packet that is held. On a tcx hook that is the head of the
chain; a clsact filter shares priority 1, the lowest, and the kernel puts the newest of a priority in front. tcx
programs run before clsact filters, and other agents (Cilium at each program load) delete filters that are not theirs,
so tcx is used wherever the kernel has it. Both outlive the agent: a link by its pin, a filter by itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from pyroute2 import AsyncIPRoute, NetlinkError
from pyroute2.netlink.rtnl.tcmsg import sched_bpf

from lazymesh.datapath import kernelfeatures, libbpf, programs
from lazymesh.errors import DatapathError
from lazymesh.tasks import in_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.datapath.pins import Pins
    from lazymesh.datapath.program import Datapath

log = structlog.get_logger()

TC_ACT_SHOT, TC_ACT_STOLEN = 2, 4

_INGRESS = 0xFFFFFFF2
"""TC_H_CLSACT with TC_H_MIN_INGRESS."""
_EGRESS = _INGRESS + 1
_ROOT = 0xFFFFFFFF
_PRIORITY, _HANDLE, _ETH_P_ALL = 1, 0x1A2E, 3
"""Cilium's filters have handle 1, and priority 1 unless configured otherwise (cilium-formats 8.1)."""
# The kernel has more attributes of a BPF filter than pyroute2 lists.
if len(sched_bpf.options.nla_map) == 9:
    sched_bpf.options.nla_map += (
        ("TCA_BPF_FLAGS_GEN", "uint32"),
        ("TCA_BPF_TAG", "hex"),
        ("TCA_BPF_ID", "uint32"),
    )
_IFF_UP = 1
_GONE = (errno.ENODEV, errno.ENOENT, errno.EINVAL)
_TAP_RING = 16_384


class Hook(Protocol):
    """Puts a program on an interface's ingress, in front of all others."""

    style: str
    """``tcx`` or ``clsact``."""
    reports_changes: bool
    """The kernel reports when something on it changes."""
    park_verdict: int
    """The verdict for a packet whose clone is in the TAP."""

    async def attach(self, index: int, program: int, name: str) -> None:
        """Attach, replacing our earlier program; OSError or NetlinkError when that fails."""

    async def detach(self, index: int) -> None:
        """Detach; nothing to do if the interface is gone."""

    async def place(self, index: int, program: int) -> int | None:
        """Return how many programs run before ours; None if ours is not attached."""

    async def put_first(self, index: int, program: int, name: str) -> None:
        """Attach again, in front; ours is off the hook for microseconds on tcx, for 0.1 to 0.6 ms on clsact."""

    async def supersede(self, index: int) -> None:
        """Detach what an earlier agent attached the other way, once ours is attached."""


class TcxHook:
    """Links at the head of the tcx chain, pinned under ``links/`` by the interface's index."""

    style = "tcx"
    reports_changes = False
    # tcx treats every verdict that it does not know, TC_ACT_STOLEN too, as "next".
    park_verdict = TC_ACT_SHOT

    def __init__(self, pins: Pins, route: AsyncIPRoute) -> None:
        self._pins = pins
        self._route = route

    async def attach(self, index: int, program: int, name: str) -> None:  # noqa: ARG002 (a link needs no name)
        """Update the pinned link, which keeps its place, or make one.

        In a thread, because the kernel waits for a grace period of some ten milliseconds.
        """
        await in_thread(lambda: _attach_link(self._pins.link(index), index, program))

    async def detach(self, index: int) -> None:
        """Detach and unpin the link."""
        await in_thread(lambda: _detach_link(self._pins.link(index)))

    async def place(self, index: int, program: int) -> int | None:
        """Query the chain."""
        return _index(programs.tcx_programs(index), programs.program_id(program))

    async def put_first(self, index: int, program: int, name: str) -> None:  # noqa: ARG002
        """Replace the link with one in front: the kernel cannot move a link."""
        await in_thread(lambda: _move_link(self._pins.link(index), index, program))

    async def supersede(self, index: int) -> None:
        """Delete our filter."""
        await _delete_filter(self._route, index)


def _attach_link(pin: Path, index: int, program: int) -> None:
    if _update(pin, index, program):
        return
    pin.unlink(missing_ok=True)
    pin.parent.mkdir(mode=0o700, exist_ok=True)
    link = programs.attach_tcx(program, index)
    try:
        libbpf.pin(link, pin)
    finally:
        os.close(link)


def _move_link(pin: Path, index: int, program: int) -> None:
    """Make a link in front and swap it with the pinned one.

    Detaching and attaching again would leave nothing of ours on the hook for the kernel's grace period, some ten
    milliseconds. A hook accepts no program twice, but a link's program is replaced at once: so an idle program holds
    the new place until another idle one has replaced ours in the old place.
    """
    if not pin.exists() or programs.program_id(program) not in programs.tcx_programs(index):
        _attach_link(pin, index, program)  # it is not on the hook
        return
    with contextlib.ExitStack() as stack:

        def own(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        old, here, there = own(libbpf.open_pin(pin)), own(programs.load_idle()), own(programs.load_idle())
        new = own(programs.attach_tcx(here, index))  # until it is pinned the link lives with its descriptor
        programs.update_link(old, there)
        programs.update_link(new, program)
        libbpf.pin(new, pin)
        programs.detach_link(old)


def _detach_link(pin: Path) -> None:
    """Detach and unpin; unpinning alone would leave the program running until the kernel has cleaned up."""
    try:
        link = libbpf.open_pin(pin)
    except FileNotFoundError:
        return
    try:
        programs.detach_link(link)
    finally:
        os.close(link)
        pin.unlink(missing_ok=True)


def _update(pin: Path, index: int, program: int) -> bool:
    """Put the program into the pinned link if that is still on this interface; return whether it was."""
    try:
        link = libbpf.open_pin(pin)
    except FileNotFoundError:
        return False
    try:
        if programs.link_ifindex(link) != index:
            return False  # its interface is gone
        programs.update_link(link, program)
    finally:
        os.close(link)
    # An index is unique in one network namespace only, and that may be gone.
    return programs.program_id(program) in programs.tcx_programs(index)


class ClsactHook:
    """Filters of priority 1 on clsact."""

    style = "clsact"
    reports_changes = True
    # As good as a drop, and drop monitors do not report it.
    park_verdict = TC_ACT_STOLEN

    def __init__(self, pins: Pins, route: AsyncIPRoute) -> None:
        self._pins = pins
        self._route = route

    async def attach(self, index: int, program: int, name: str) -> None:
        """Replace our filter in its place, or add it in front."""
        await _add_clsact(self._route, index)
        await _put_filter(self._route, index, _INGRESS, program, name)

    async def detach(self, index: int) -> None:
        """Delete our filter."""
        await _delete_filter(self._route, index)

    async def place(self, index: int, program: int) -> int | None:  # noqa: ARG002 (a filter is known by its handle)
        """List the filters, which the kernel returns in the order in which they run."""
        return _index(await _filters(self._route, index, _INGRESS), (_PRIORITY, _HANDLE))

    async def put_first(self, index: int, program: int, name: str) -> None:
        """Delete and add: the newest of a priority runs first."""
        await self.detach(index)
        await self.attach(index, program, name)

    async def supersede(self, index: int) -> None:
        """Detach and unpin our link."""
        await in_thread(lambda: _detach_link(self._pins.link(index)))


async def prepare_tap(datapath: Datapath, index: int, name: str) -> None:
    """Prepare the holder's TAP for parked packets and nothing else, and bring it up; DatapathError if that fails."""
    try:
        # It must never send by itself: no address, no router solicitation.
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1", encoding="ascii")  # noqa: ASYNC240 (memory)
    except OSError:
        log.debug("no IPv6 to disable", interface=name)
    try:
        async with AsyncIPRoute() as route:
            await _make_tap_fit(route, datapath, index)
    except NetlinkError as exc:
        raise DatapathError(f"cannot set up the TAP device {name}: {exc}") from exc


async def mend_tap(datapath: Datapath, index: int) -> bool:
    """Restore the holder's TAP if it was changed; return whether anything was wrong."""
    async with AsyncIPRoute() as route:
        try:
            if await _is_fit(route, index):
                return False
            await _make_tap_fit(route, datapath, index)
        except NetlinkError as exc:
            log.debug("cannot restore the TAP", error=str(exc))  # it is gone, and its holder is ending
            return False
    return True


async def _make_tap_fit(route: AsyncIPRoute, datapath: Datapath, index: int) -> None:
    (out, out_fd), (back, back_fd) = datapath.hold_programs()
    await route.link("set", index=index, txqlen=_TAP_RING)  # more than all slots
    await _add_clsact(route, index)
    await _put_filter(route, index, _EGRESS, out_fd, out)
    await _put_filter(route, index, _INGRESS, back_fd, back)
    await route.link("set", index=index, state="up")
    # With a queue, clone_redirect would succeed although the ring is full.
    await route.tc("replace", "noqueue", index, parent=_ROOT)


async def _is_fit(route: AsyncIPRoute, index: int) -> bool:
    (link,) = await route.link("get", index=index)
    if not link["flags"] & _IFF_UP or link.get_attr("IFLA_QDISC") != "noqueue":
        return False
    hooks = [await _filters(route, index, parent) for parent in (_INGRESS, _EGRESS)]
    return all((_PRIORITY, _HANDLE) in filters for filters in hooks)


async def _add_clsact(route: AsyncIPRoute, index: int) -> None:
    try:
        await route.tc("add", "clsact", index)
    except NetlinkError as exc:
        if exc.code != errno.EEXIST:
            raise


async def _put_filter(route: AsyncIPRoute, index: int, parent: int, program: int, name: str) -> None:
    await route.tc(
        "replace-filter", "bpf", index, _HANDLE,
        fd=program, name=name, parent=parent, prio=_PRIORITY, protocol=_ETH_P_ALL, classid=1, direct_action=True,
    )  # fmt: skip


def _index(chain: Sequence[object], ours: object) -> int | None:
    return chain.index(ours) if ours in chain else None


def choose_hook(style: str, pins: Pins, route: AsyncIPRoute) -> Hook:
    """Return the hook that the user chose, or for ``auto`` the best that this kernel has."""
    if style == "clsact" or (style == "auto" and not kernelfeatures.has_tcx()):
        return ClsactHook(pins, route)
    if not kernelfeatures.has_tcx():
        raise DatapathError("this kernel has no tcx (it came with 6.6): use --attach clsact, or auto")
    return TcxHook(pins, route)


async def detach_everywhere(pins: Pins) -> list[str]:
    """Remove our links and filters from every interface, and clsact qdiscs left empty; return the interfaces."""
    cleaned = []
    linked = pins.linked()
    async with AsyncIPRoute() as route:
        for link in [link async for link in await route.link("dump")]:
            _detach_link(pins.link(link["index"]))
            # An interface may disappear at any moment, with its filters.
            with contextlib.suppress(NetlinkError):
                if await _clean(route, link["index"]) or link["index"] in linked:
                    cleaned.append(link_name(link))
    return cleaned


async def _clean(route: AsyncIPRoute, index: int) -> bool:
    if not await _delete_filter(route, index):
        return False
    if not await _filters(route, index, _INGRESS) and not await _filters(route, index, _EGRESS):
        await route.tc("del", "clsact", index)
    return True


async def _delete_filter(route: AsyncIPRoute, index: int) -> bool:
    """Delete our clsact filter; return whether there was one."""
    if (_PRIORITY, _HANDLE) not in await _filters(route, index, _INGRESS):
        return False
    with contextlib.suppress(NetlinkError):
        await route.tc(
            "del-filter", "bpf", index, _HANDLE, parent=_INGRESS, prio=_PRIORITY, protocol=_ETH_P_ALL
        )
    return True


async def _filters(route: AsyncIPRoute, index: int, parent: int) -> list[tuple[int, int]]:
    """Return priority and handle of an interface's filters in the order in which they run."""
    return [(item["info"] >> 16, item["handle"]) for item in await _dump(route, index, parent)]


@dataclass(frozen=True, slots=True)
class Attachment:
    """A program on a hook."""

    style: str
    """``tcx`` or ``clsact``."""
    name: str
    program_id: int


async def attachments(route: AsyncIPRoute, index: int) -> list[Attachment]:
    """Return the programs on an interface's ingress, in the order in which they run: tcx before clsact."""
    return [*tcx_attachments(index), *await clsact_attachments(route, index)]


def tcx_attachments(index: int) -> list[Attachment]:
    """Return those on tcx; none if the interface is gone or the kernel has no tcx."""
    found = []
    with contextlib.suppress(OSError):
        for program_id in programs.tcx_programs(index):
            with contextlib.suppress(OSError):  # it was replaced a moment ago
                found.append(Attachment("tcx", programs.describe_program(program_id).name, program_id))
    return found


async def clsact_attachments(route: AsyncIPRoute, index: int) -> list[Attachment]:
    """Return those on clsact; none if the interface is gone."""
    found = []
    for item in await _dump(route, index, _INGRESS):
        options = item.get_attr("TCA_OPTIONS")
        number = options.get_attr("TCA_BPF_ID") if options else None
        if number:
            found.append(Attachment("clsact", options.get_attr("TCA_BPF_NAME") or "", number))
    return found


def link_name(link: Any) -> str:
    """Return the name in a link message; pyroute2 leaves one that is not UTF-8 as bytes."""
    return os.fsdecode(link.get("ifname") or "")


def link_kind(link: Any) -> str | None:
    """Return the kind of a link message's device, such as ``veth``."""
    info = link.get_attr("IFLA_LINKINFO")
    return info.get_attr("IFLA_INFO_KIND") if info else None


def has_metadata(link: Any) -> bool:
    """Return whether a link message's device is a tunnel that keeps a packet's tunnel data in its metadata."""
    info = link.get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    # For kinds that pyroute2 does not know it is text.
    attributes = data.get("attrs", ()) if isinstance(data, dict) else ()
    return any(name.endswith("_COLLECT_METADATA") and value not in (None, 0) for name, value in attributes)


async def _dump(route: AsyncIPRoute, index: int, parent: int) -> list[Any]:
    try:
        found = [item async for item in await route.get_filters(index=index, parent=parent)]
    except NetlinkError as exc:
        if exc.code in _GONE:
            return []
        raise
    # Every priority has an item of its own first, with handle 0.
    return [item for item in found if item["handle"]]
