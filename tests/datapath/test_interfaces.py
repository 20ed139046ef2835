"""Programs on real interfaces, in a namespace of the test's own: they come, go, are renamed, and have other tenants."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import statistics
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import NetlinkError
from structlog.testing import capture_logs

from lazymesh.core.model import Direction
from lazymesh.datapath import interfaces as module
from lazymesh.datapath import tap
from lazymesh.datapath.hooks import has_metadata
from lazymesh.datapath.interfaces import InterfaceFollower, InterfaceSelection
from lazymesh.errors import DatapathError
from tests.datapath.conftest import open_descriptors
from tests.support import packets, tcx
from tests.support.bpfobject import program_info_by_id
from tests.support.packets import Flow
from tests.support.prog_run import Tap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from lazymesh.datapath.program import Datapath
    from tests.datapath.conftest import Bench
    from tests.support.namespaces import Namespace

EGRESS, INGRESS = Direction
PODS = InterfaceSelection(pods=("lxc+",), uplinks=("eth0",))
PODS_ONLY = InterfaceSelection(pods=("lxc+",))
HOOKS = ("ingress", "egress")


def veth(*names: str) -> list[str]:
    """Return ip commands that make veth pairs; the other end of x is peer-x."""
    return [f"link add {name} type veth peer name peer-{name}" for name in names]


def filters(node: Namespace, name: str, hook: str = "ingress") -> list[str]:
    """Return the names of the programs on an interface, in the order they run."""
    chain = [program_info_by_id(one).name for one in node.call(tcx.tcx_programs, name, hook)]
    listed = json.loads(node.run("tc", "-j", "filter", "show", "dev", name, hook, check=False) or "[]")
    return chain + [item["options"]["bpf_name"] for item in listed if "bpf_name" in item.get("options", {})]


def has_clsact(node: Namespace, name: str) -> bool:
    """Tell whether the interface has the qdisc that filters hang on."""
    listed = json.loads(node.run("tc", "-j", "qdisc", "show", "dev", name))
    return any(qdisc["kind"] == "clsact" for qdisc in listed)


def test_the_holders_tap_is_never_selected() -> None:
    """Held packets are not to be held again, however wide a pattern is."""
    everything = InterfaceSelection(pods=("+",))
    assert {everything.direction_of(name) for name in tap.NAMES} == {None}
    assert everything.direction_of("lm_holding") is EGRESS
    assert InterfaceSelection(uplinks=("lm_+",)).direction_of(tap.NAMES[0]) is None


async def until(condition: Callable[[], bool], seconds: float = 5) -> float:
    """Poll until a condition holds; returns how long that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "it never happened"
        await asyncio.sleep(0.002)
    return time.monotonic() - start


@asynccontextmanager
async def following(follower: InterfaceFollower) -> AsyncIterator[InterfaceFollower]:
    """Follow interfaces until the block ends; what goes wrong at the start is raised."""
    ready = asyncio.Event()
    work = asyncio.create_task(follower.run(ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if work.done():
            work.result()
        yield follower
        assert not work.done()
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, DatapathError):
            await work


def inside(node: Namespace, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a story in an event loop inside the namespace."""
    node.call(lambda: asyncio.run(story()))


async def make(node: Namespace, *lines: str) -> None:
    """Run ip commands inside while the loop runs."""
    await asyncio.to_thread(node.ip, lines)


def test_selected_interfaces_get_the_program_of_their_direction(
    loaded: Datapath, node: Namespace, style: str
) -> None:
    """Exact names and patterns, pods and uplinks; nothing on anybody else."""
    node.ip(veth("eth0", "lxc1", "lxc22", "other", "lx"))

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            assert follower.attached == {"eth0": INGRESS, "lxc1": EGRESS, "lxc22": EGRESS}

    inside(node, story)
    assert {name: filters(node, name) for name in ("eth0", "lxc1", "lxc22", "other", "lx", "peer-lxc1")} == {
        "eth0": ["lm_from_uplink"],
        "lxc1": ["lm_from_pod"],
        "lxc22": ["lm_from_pod"],
        "other": [],
        "lx": [],
        "peer-lxc1": [],
    }
    assert filters(node, "lxc1", "egress") == []


def test_programs_stay_when_the_agent_goes(loaded: Datapath, node: Namespace, style: str) -> None:
    """Traffic keeps passing through them; the next agent replaces them with its own, once."""
    node.ip(veth("eth0"))

    async def story() -> None:
        for _ in range(3):
            async with following(InterfaceFollower(loaded, PODS, style)) as follower:
                assert follower.attached == {"eth0": INGRESS}
            assert await asyncio.to_thread(filters, node, "eth0") == ["lm_from_uplink"]

    inside(node, story)


def test_packet_of_an_interface_reaches_the_program(bench: Bench, node: Namespace, style: str) -> None:
    """Not only listed by tc: a frame that comes in is counted."""
    bench.mesh({packets.PODS_OF_B[4]: 2})
    with Tap(node, bench.datapath.pins.path("lm_from_pod")) as tap:
        node.run("tc", "filter", "del", "dev", "tap0", "ingress")
        tap.receive(Flow().udp())
        assert bench.counts(EGRESS) == {}

        async def story() -> None:
            async with following(
                InterfaceFollower(bench.datapath, InterfaceSelection(pods=("tap0",)), style)
            ):
                tap.receive(Flow().udp())

        inside(node, story)
    assert bench.counts(EGRESS) == {"missed": 1, "lost": 1}


@pytest.mark.parametrize("role", ["pods", "uplinks"])
def test_exact_name_that_is_missing_is_an_error(
    loaded: Datapath, node: Namespace, role: str, style: str
) -> None:
    """A typo must not look like a quiet network; a pattern may match nothing yet."""
    selection = InterfaceSelection(**{role: ("lxc+", "eth9")})

    async def story() -> None:
        with pytest.raises(DatapathError, match="no interface eth9 here: `ip link` lists what there is"):
            async with following(InterfaceFollower(loaded, selection, style)):
                pass

    inside(node, story)


def test_exact_name_that_is_no_ethernet_is_an_error(loaded: Datapath, node: Namespace, style: str) -> None:
    """Our parser starts at an Ethernet header."""

    async def story() -> None:
        with pytest.raises(DatapathError, match="cannot attach to lo: lo is not an Ethernet interface"):
            async with following(InterfaceFollower(loaded, InterfaceSelection(pods=("lo",)), style)):
                pass

    inside(node, story)


def test_pattern_that_matches_another_kind_passes_it_over(
    loaded: Datapath, node: Namespace, style: str
) -> None:
    """A pattern names no interface exactly, so a wrong kind is not the user's mistake: counted, logged, not fatal."""
    node.ip(veth("lxc1"))

    async def story() -> None:
        async with following(InterfaceFollower(loaded, InterfaceSelection(pods=("l+",)), style)) as follower:
            assert follower.attached == {"lxc1": EGRESS}
            assert follower.stats.attach_errors_total == 1
            assert [name for name, _ in follower.failed] == ["lo"]

    inside(node, story)


def test_uplink_that_matches_a_pod_pattern_is_an_uplink(
    loaded: Datapath, node: Namespace, style: str
) -> None:
    """The exact word of the user beats the pattern."""
    node.ip(veth("eth0", "eth1"))

    async def story() -> None:
        selection = InterfaceSelection(pods=("eth+",), uplinks=("eth0",))
        async with following(InterfaceFollower(loaded, selection, style)) as follower:
            assert follower.attached == {"eth0": INGRESS, "eth1": EGRESS}

    inside(node, story)


def test_a_name_need_not_be_text(loaded: Datapath, node: Namespace, style: str) -> None:
    """The kernel takes any bytes for one; pyroute2 then returns bytes."""
    odd = os.fsdecode(b"lxc\xff")
    node.run("ip", "link", "add", odd, "type", "veth", "peer", "name", os.fsdecode(b"\xff"))

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS_ONLY, style)) as follower:
            assert follower.attached == {odd: EGRESS}

    inside(node, story)


def test_hundred_pods_come_and_go(loaded: Datapath, node: Namespace, style: str) -> None:
    """Most carry the program within 200 ms, all are forgotten when they go, and nothing is left behind."""
    names = [f"lxc{number}" for number in range(100)]

    async def story() -> None:
        async with following(
            InterfaceFollower(loaded, InterfaceSelection(pods=("lxc+",)), style)
        ) as follower:
            before = open_descriptors()
            came: list[float] = []
            went: list[float] = []
            for name in names[:40]:
                await make(node, *veth(name))
                came.append(await until(lambda name=name: name in follower.attached))  # type: ignore[misc]
            await make(node, *veth(*names[40:]))
            # A tcx attach waits for a grace period of the kernel, with a lock held that all attaches share.
            assert await until(lambda: len(follower.attached) == 100) < 3
            assert set(await asyncio.to_thread(filters, node, names[99])) == {"lm_from_pod"}
            for name in names[:10]:
                await make(node, f"link del {name}")
                went.append(await until(lambda name=name: name not in follower.attached))  # type: ignore[misc]
            await make(node, *(f"link del {name}" for name in names[10:]))
            await until(lambda: follower.attached == {})
            assert max(statistics.median(came), statistics.median(went)) < 0.2
            assert follower.stats.attach_errors_total == 0
            assert len(follower._attached) == 0
            assert open_descriptors() == before

    inside(node, story)


def test_pod_that_goes_at_once_is_no_error(loaded: Datapath, node: Namespace, style: str) -> None:
    """Interfaces that are gone before we answer are neither counted nor logged as failures."""

    async def story() -> None:
        async with following(
            InterfaceFollower(loaded, InterfaceSelection(pods=("lxc+",)), style)
        ) as follower:
            for _ in range(20):
                node.ip([*veth("lxc1"), "link del lxc1"])  # in one go, with the loop held up
            await make(node, *veth("lxc2"))
            await until(lambda: "lxc2" in follower.attached)
            assert follower.attached == {"lxc2": EGRESS}
            assert follower.stats.attach_errors_total == 0
            assert follower.failed == []

    inside(node, story)


def test_interface_that_cannot_be_attached_to_is_told_as_long_as_it_is_there(
    loaded: Datapath, node: Namespace, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name, and is one error however often it is tried again; another name is another interface."""
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.001)
    why = "is not an Ethernet interface, and lazymesh cannot read others yet: leave it out"
    tries: list[str] = []
    consider = InterfaceFollower._bring_up_to_date

    async def counted(self: InterfaceFollower, link: Any, strict: bool, again: bool) -> None:
        tries.append(link.get("ifname"))
        await consider(self, link, strict, again)

    monkeypatch.setattr(InterfaceFollower, "_bring_up_to_date", counted)

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS_ONLY, style)) as follower:
            await make(node, "tuntap add lxc1 mode tun", "tuntap add lxc2 mode tun")
            await until(lambda: len(follower.failed) == 2)
            assert follower.failed == [(name, f"{name} {why}") for name in ("lxc1", "lxc2")]
            tries.clear()
            await until(lambda: tries.count("lxc1") > 2)
            assert follower.stats.attach_errors_total == 2
            await make(node, "link del lxc1", "link set lxc2 name other")
            await until(lambda: follower.failed == [])
            await make(node, "link set other name lxc3")
            await until(lambda: follower.failed == [("lxc3", f"lxc3 {why}")])
            assert follower.attached == {}

    inside(node, story)


def test_interface_that_could_not_be_attached_to_is_tried_again(
    loaded: Datapath, node: Namespace, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing reports when the reason is gone."""
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.001)
    refusing, attach = True, InterfaceFollower._attach

    async def refused(self: InterfaceFollower, index: int, direction: Direction) -> None:
        if refusing:
            raise NetlinkError(errno.EPERM)
        await attach(self, index, direction)

    monkeypatch.setattr(InterfaceFollower, "_attach", refused)
    node.ip(veth("lxc1"))

    async def story() -> None:
        nonlocal refusing
        async with following(InterfaceFollower(loaded, PODS_ONLY, style)) as follower:
            assert (follower.attached, follower.failed) == ({}, [("lxc1", "Operation not permitted")])
            refusing = False
            await until(lambda: "lxc1" in follower.attached)
            assert follower.failed == []

    inside(node, story)


def test_rename_into_and_out_of_the_pattern_is_followed(
    loaded: Datapath, node: Namespace, style: str
) -> None:
    """Container runtimes make a device under one name and give it another."""
    node.ip(veth("eth0", "tmp1"))

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            assert set(follower.attached) == {"eth0"}
            await make(node, "link set tmp1 name lxc1")
            await until(lambda: "lxc1" in follower.attached)
            await make(node, "link set lxc1 name lxc2")
            await until(lambda: set(follower.attached) == {"eth0", "lxc2"})
            assert await asyncio.to_thread(filters, node, "lxc2") == ["lm_from_pod"]
            await make(node, "link set lxc2 name tmp2")
            await until(lambda: set(follower.attached) == {"eth0"})
            await until_gone(node, "tmp2")

    inside(node, story)


async def until_gone(node: Namespace, name: str) -> None:
    """Wait until no filter is left on an interface."""
    deadline = time.monotonic() + 2
    while await asyncio.to_thread(filters, node, name):
        assert time.monotonic() < deadline, "the filter stayed"


def test_pod_that_becomes_an_uplink_changes_its_program(
    loaded: Datapath, node: Namespace, style: str
) -> None:
    """The direction goes with the name."""
    node.ip(veth("eth0"))

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            await make(node, "link set eth0 name lxc0")
            await until(lambda: follower.attached == {"lxc0": EGRESS})
            assert await asyncio.to_thread(filters, node, "lxc0") == ["lm_from_pod"]

    inside(node, story)


def test_leaving_a_bridge_is_no_farewell(loaded: Datapath, node: Namespace, style: str) -> None:
    """The kernel reports a deletion, of the bridge's port and not of the interface."""
    node.ip([*veth("eth0", "lxc1"), "link add br0 type bridge"])

    async def story() -> None:
        with capture_logs() as logs:
            await attach_them()
        told = [each["interface"] for each in logs if each["event"] == "attached"]
        assert sorted(told) == ["eth0", "lxc1", "lxc2"], "nothing was attached twice"

    async def attach_them() -> None:
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            await make(node, "link set lxc1 master br0", "link set lxc1 nomaster", *veth("lxc2"))
            await until(lambda: "lxc2" in follower.attached)
            assert set(follower.attached) == {"eth0", "lxc1", "lxc2"}

    inside(node, story)


def test_lost_messages_are_made_up_for(loaded: Datapath, node: Namespace, style: str) -> None:
    """While the loop is held up the kernel's queue overflows: list again, attach what was missed."""
    node.ip(veth("eth0", "busy"))

    async def story() -> None:
        with capture_logs() as logs:
            await overflow()
        assert any("link messages were lost" in each["event"] for each in logs)

    async def overflow() -> None:
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            node.ip([f"link set busy mtu {1_000 + number}" for number in range(1_500)])  # the loop waits
            node.ip(veth("lxc1"))
            await until(lambda: "lxc1" in follower.attached)
            await make(node, *veth("lxc2"))
            await until(lambda: "lxc2" in follower.attached)

    inside(node, story)


def test_listing_again_repairs_what_was_taken_off(
    loaded: Datapath, node: Namespace, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    """After lost messages we trust no memory: every selected interface gets its program once more."""
    node.ip(veth("eth0", "lxc1"))

    async def story() -> None:
        trouble = asyncio.Event()
        follow = InterfaceFollower._follow

        async def troubled(self: InterfaceFollower, monitor: Any) -> None:
            if not trouble.is_set():
                await trouble.wait()
                raise OSError(errno.ENOBUFS, "No buffer space available")
            await follow(self, monitor)

        monkeypatch.setattr(InterfaceFollower, "_follow", troubled)
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            await take_off(node, loaded, "lxc1", style)
            await make(node, "link del eth0")
            trouble.set()
            await until(lambda: "eth0" not in follower.attached)
            await until_attached(node, "lxc1", ["lm_from_pod"])
            assert follower.attached == {"lxc1": EGRESS}

    inside(node, story)


async def take_off(node: Namespace, datapath: Datapath, name: str, style: str) -> None:
    """Remove our program from an interface as another program would."""
    if style == "clsact":
        await asyncio.to_thread(node.run, "tc", "qdisc", "del", "dev", name, "clsact")
    else:
        datapath.pins.link(index_of(node, name)).unlink()


def index_of(node: Namespace, name: str) -> int:
    """Return an interface's index."""
    return node.call(socket.if_nametoindex, name)


async def until_attached(node: Namespace, name: str, expected: list[str]) -> None:
    """Wait until an interface carries exactly these filters."""
    deadline = time.monotonic() + 2
    while await asyncio.to_thread(filters, node, name) != expected:
        assert time.monotonic() < deadline, "never attached"


def add_theirs(node: Namespace, datapath: Datapath, name: str, hook: str, *place: str) -> None:
    """Attach a foreign filter; our own pinned program serves as it."""
    pinned = ("bpf", "direct-action", "object-pinned", datapath.pins.path("lm_from_uplink"))
    node.run("tc", "filter", "add", "dev", name, hook, *place, *pinned)


def attach_once(
    node: Namespace, datapath: Datapath, selection: InterfaceSelection, style: str = "clsact"
) -> None:
    """Attach, and let the agent go."""

    async def story() -> None:
        async with following(InterfaceFollower(datapath, selection, style)):
            pass

    inside(node, story)


class ForeignLink(dict[str, Any]):
    """A link message of a device that this kernel cannot make."""

    def __init__(self, kind: str, data: Any = None) -> None:
        super().__init__(index=7, ifi_type=1, ifname="lxc7")
        self._attributes = {"IFLA_LINKINFO": self, "IFLA_INFO_KIND": kind, "IFLA_INFO_DATA": data}

    def get_attr(self, name: str) -> Any:
        """Return an attribute, from the message or the one inside it."""
        return self._attributes[name]


async def test_netkit_device_is_refused_by_name(loaded: Datapath) -> None:
    """It looks like Ethernet, and would carry our program for nothing."""
    follower = InterfaceFollower(loaded, PODS)
    link = ForeignLink("netkit")
    with pytest.raises(DatapathError, match="lxc7 is a netkit device"):
        await follower._consider(link, strict=True)
    await follower._consider(link, strict=False)
    assert follower.stats.attach_errors_total == 1
    assert follower.attached == {}


@pytest.mark.parametrize(("mode", "fits"), [("external", False), ("id 3", True)])
def test_tunnel_for_many_ends_is_refused(loaded: Datapath, node: Namespace, mode: str, fits: bool) -> None:
    """Its packets have their tunnel beside them, which the TAP does not keep; with one end there is nothing to keep."""
    try:
        node.ip([f"link add lxc1 type vxlan {mode} dstport 4789"])
    except RuntimeError as exc:
        pytest.skip(f"needs vxlan in the kernel: {exc}")

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS_ONLY)) as follower:
            assert set(follower.attached) == ({"lxc1"} if fits else set())
            assert follower.stats.attach_errors_total == (not fits)

    inside(node, story)


async def test_each_kind_of_tunnel_is_known_by_what_it_collects(loaded: Datapath) -> None:
    """Whatever its attribute is called, or worth; what pyroute2 cannot read is none."""
    follower = InterfaceFollower(loaded, PODS)
    for kind, data in (
        ("geneve", {"attrs": [("IFLA_GENEVE_ID", 0), ("IFLA_GENEVE_COLLECT_METADATA", True)]}),
        ("gretap", {"attrs": [("IFLA_GRE_COLLECT_METADATA", True)]}),
    ):
        with pytest.raises(DatapathError, match="lxc7 is a tunnel in external mode"):
            await follower._consider(ForeignLink(kind, data), strict=True)
    assert not has_metadata(ForeignLink("odd", "00:01"))
    assert not has_metadata(ForeignLink("vxlan", {"attrs": [("IFLA_VXLAN_COLLECT_METADATA", 0)]}))
