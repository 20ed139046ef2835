"""Both ways onto a hook: in front, kept in front, taken off again; others' programs are left as they are."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core.model import Direction
from lazymesh.datapath import hooks, interfaces, kernelfeatures, libbpf
from lazymesh.datapath.hooks import TcxHook, detach_everywhere
from lazymesh.datapath.interfaces import InterfaceFollower, InterfaceSelection
from lazymesh.errors import DatapathError
from tests.datapath.conftest import open_descriptors
from tests.datapath.test_interfaces import (
    HOOKS,
    PODS,
    PODS_ONLY,
    add_theirs,
    attach_once,
    filters,
    following,
    has_clsact,
    index_of,
    inside,
    take_off,
    until,
    until_attached,
    veth,
)
from tests.support import packets, tcx
from tests.support.namespaces import NamespaceSet
from tests.support.packets import Flow

if TYPE_CHECKING:
    from pathlib import Path

    from lazymesh.datapath.program import Datapath
    from tests.datapath.conftest import Bench
    from tests.support.namespaces import Namespace


def leave(node: Namespace, datapath: Datapath) -> list[str]:
    """Detach everything of ours, inside the namespace."""
    return node.call(lambda: asyncio.run(detach_everywhere(datapath.pins)))


def test_leaving_takes_off_everything_of_ours(loaded: Datapath, node: Namespace) -> None:
    """Filters, and qdiscs without other filters; the second time there is nothing to do."""
    node.ip(veth("eth0", "lxc1", "other"))
    attach_once(node, loaded, PODS)
    assert sorted(leave(node, loaded)) == ["eth0", "lxc1"]
    assert [name for name in ("eth0", "lxc1", "other") if has_clsact(node, name) or filters(node, name)] == []
    assert leave(node, loaded) == []


def test_program_that_was_taken_off_is_back(loaded: Datapath, node: Namespace, style: str) -> None:
    """Cilium deletes other filters at each load, which the kernel reports; it does not report a tcx link's end."""
    node.ip(veth("eth0"))

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            waits: list[float] = []
            for number in range(1, 4):
                await take_off(node, loaded, "eth0", style)
                waits.append(await until(lambda number=number: follower.stats.displaced_total == number))  # type: ignore[misc]
                await until_attached(node, "eth0", ["lm_from_uplink"])
            assert min(waits) < (0.2 if style == "clsact" else 1)
            assert follower.behind == []

    inside(node, story)


def test_ours_goes_back_to_the_front(
    loaded: Datapath, node: Namespace, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; a program that insists on being ahead is left alone for a while, and named."""
    node.ip(veth("lxc1"))
    monkeypatch.setattr(interfaces, "LOOK_EVERY_S", 0.05)

    def ahead(number: int) -> None:
        if style == "clsact":
            add_theirs(node, loaded, "lxc1", "ingress", "prio", "1", "handle", str(number))
        else:
            theirs = libbpf.open_pin(loaded.pins.path("lm_hold_back"))
            links.append(node.call(tcx.TcxLink.attach, theirs, "lxc1", head=True))
            os.close(theirs)

    links: list[tcx.TcxLink] = []

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS_ONLY, style)) as follower:
            await asyncio.to_thread(ahead, 1)
            await until(lambda: follower.stats.displaced_total == 1, 1)
            assert (await asyncio.to_thread(filters, node, "lxc1"))[0] == "lm_from_pod"
            assert follower.behind == []
            for link in links:
                link.close()
            await asyncio.to_thread(ahead, 2)
            await until(lambda: follower.behind == ["lxc1"], 1)
            assert follower.stats.displaced_total == 1

    inside(node, story)
    for link in links:
        link.close()


@pytest.mark.needs("tcx")
def test_going_to_the_front_lets_nothing_past(bench: Bench, node: Namespace) -> None:
    """Ending and making a tcx link takes the kernel some 10 ms: ours stays on the hook meanwhile."""
    loaded = bench.datapath
    node.ip([*veth("lxc1"), "link set lxc1 up", "link set peer-lxc1 up"])
    sock = node.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
    node.call(sock.bind, ("peer-lxc1", 0))
    frame, sent, stop = Flow(peer=packets.INTERNET).udp(), 0, threading.Event()

    def send() -> None:
        nonlocal sent
        while not stop.wait(0.0001):
            sock.send(frame)
            sent += 1

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS_ONLY, "tcx")) as follower:
            hook, index, (name, fd) = follower._hook, next(iter(follower._attached)), program
            assert hook is not None
            sender = threading.Thread(target=send)
            sender.start()
            try:
                for _ in range(10):
                    await asyncio.sleep(0.02)
                    async with follower._placing:
                        await hook.put_first(index, fd, name)
                    assert await hook.place(index, fd) == 0
            finally:
                stop.set()
                sender.join()

    program = loaded.program(Direction.EGRESS)
    with sock:
        inside(node, story)
    assert sent > 100
    assert sent - bench.counts(Direction.EGRESS)["not_mesh"] < 10
    assert len(filters(node, "lxc1")) == 1


INDEX = 50
LXC1 = f"link add lxc1 index {INDEX} type veth peer name peer-lxc1"


def on_tcx(node: Namespace, datapath: Datapath, step: str) -> None:
    """Take one step on lxc1 with the program for pods: ``attach``, ``put_first`` or ``detach``."""
    name, program = datapath.program(Direction.EGRESS)
    words = () if step == "detach" else (program, name)
    hook = TcxHook(datapath.pins, cast("Any", None))
    node.call(lambda: asyncio.run(getattr(hook, step)(INDEX, *words)))


@pytest.mark.needs("tcx")
@pytest.mark.parametrize("step", ["attach", "put_first"])
def test_link_of_an_interface_that_had_the_same_index_is_replaced(
    loaded: Datapath, node: Namespace, step: str
) -> None:
    """The interface is gone; the new one gets a link of its own, which is pinned."""
    node.ip([LXC1])
    on_tcx(node, loaded, "attach")
    node.ip(["link del lxc1", LXC1])
    on_tcx(node, loaded, step)
    assert filters(node, "lxc1") == ["lm_from_pod"]
    on_tcx(node, loaded, "detach")
    assert filters(node, "lxc1") == []


@pytest.mark.needs("tcx")
@pytest.mark.parametrize("step", ["attach", "put_first"])
def test_link_in_another_network_namespace_is_not_taken_for_this_ones(
    loaded: Datapath, node: Namespace, step: str
) -> None:
    """Both have an interface of that index."""
    node.ip([LXC1])
    with NamespaceSet(["other"]) as spaces:
        spaces["other"].ip([LXC1])
        on_tcx(spaces["other"], loaded, "attach")
        on_tcx(node, loaded, step)
        assert filters(node, "lxc1") == ["lm_from_pod"]


@pytest.mark.needs("tcx")
def test_old_link_ends_at_once_whoever_has_it_open(loaded: Datapath, node: Namespace) -> None:
    """An inspection tool may, and keep its program running; of ours, no descriptor stays open."""
    node.ip([LXC1])
    before = open_descriptors()
    on_tcx(node, loaded, "attach")
    theirs = libbpf.open_pin(loaded.pins.path("lm_hold_back"))
    ahead = node.call(tcx.TcxLink.attach, theirs, "lxc1", head=True)
    elsewhere = [tcx.TcxLink.pinned(loaded.pins.link(INDEX))]
    on_tcx(node, loaded, "put_first")
    assert filters(node, "lxc1") == ["lm_from_pod", "lm_hold_back"]
    elsewhere.append(tcx.TcxLink.pinned(loaded.pins.link(INDEX)))
    on_tcx(node, loaded, "detach")
    assert filters(node, "lxc1") == ["lm_hold_back"]
    for link in (*elsewhere, ahead):
        link.close()
    os.close(theirs)
    assert open_descriptors() == before


def test_interface_that_is_renamed_while_ours_is_put_first_is_left(
    loaded: Datapath, node: Namespace, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no longer selected: what began under its old name neither completes nor starts again."""
    node.ip(veth("eth0", "lxc1"))
    monkeypatch.setattr(interfaces, "LOOK_EVERY_S", 1_000_000)

    async def story() -> None:
        async with following(InterfaceFollower(loaded, PODS, style)) as follower:
            hook = follower._hook
            assert hook is not None
            index = index_of(node, "lxc1")
            attached = follower._attached[index]
            put_first, place, begun, renamed = hook.put_first, hook.place, asyncio.Event(), asyncio.Event()

            async def slow(*words: Any) -> None:
                begun.set()
                await hook.detach(index)
                await renamed.wait()
                await put_first(*words)

            async def second(*_words: int) -> int:
                return 1

            monkeypatch.setattr(hook, "put_first", slow)
            monkeypatch.setattr(hook, "place", second)
            putting = asyncio.create_task(follower._look_after(index, attached))
            await begun.wait()
            again = asyncio.create_task(follower._look_after(index, attached))
            await asyncio.to_thread(node.ip, ["link set lxc1 name tmp1"])
            await asyncio.sleep(0.2)
            monkeypatch.setattr(hook, "place", place)
            renamed.set()
            await asyncio.gather(putting, again)
            await until(lambda: set(follower.attached) == {"eth0"})
            await until_attached(node, "tmp1", [])

    inside(node, story)


def test_filters_are_not_asked_for_again_and_again(
    loaded: Datapath, node: Namespace, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports them, and each query is costly; it does not report tcx chains, and querying those is cheap."""
    node.ip(veth("lxc1"))
    monkeypatch.setattr(interfaces, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(interfaces, "LOOK_REPORTED", 1_000_000)
    asked = 0

    async def story() -> None:
        nonlocal asked
        async with following(InterfaceFollower(loaded, PODS_ONLY, style)) as follower:
            hook = follower._hook
            assert hook is not None
            place = hook.place

            async def counted(index: int, program: int) -> int | None:
                nonlocal asked
                asked += 1
                return await place(index, program)

            await asyncio.sleep(0.2)  # our own changes are reported, too
            monkeypatch.setattr(hook, "place", counted)
            await asyncio.sleep(0.2)

    inside(node, story)
    assert (asked > 0) == (style == "tcx")


@pytest.mark.needs("tcx")
def test_another_way_to_attach_takes_off_what_was_attached_before(loaded: Datapath, node: Namespace) -> None:
    """An upgrade of kernel or agent: a packet must not meet both."""
    node.ip(veth("eth0", "lxc1"))
    for style in ("clsact", "tcx", "clsact", "auto"):
        attach_once(node, loaded, PODS, style)
        assert filters(node, "lxc1") == ["lm_from_pod"]
        assert filters(node, "eth0") == ["lm_from_uplink"]
        assert bool(node.call(tcx.tcx_programs, "eth0")) == (style != "clsact")


@pytest.mark.needs("tcx")
def test_links_of_interfaces_that_went_meanwhile_are_unpinned(loaded: Datapath, node: Namespace) -> None:
    """The agent was not running, so it was not informed."""
    node.ip(veth("lxc1", "lxc2"))
    attach_once(node, loaded, PODS_ONLY, "tcx")
    gone = index_of(node, "lxc1")
    node.ip(["link del lxc1"])
    assert gone in loaded.pins.linked()
    attach_once(node, loaded, PODS_ONLY, "tcx")
    assert loaded.pins.linked() == {index_of(node, "lxc2")}
    assert leave(node, loaded) == ["lxc2"]


async def test_what_is_cancelled_has_ended(loaded: Datapath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel makes an attachment wait; the agent, told to stop, closes the program and cleans up next."""
    began, steps = threading.Event(), []

    def slow(_pin: Path, index: int, _program: int) -> None:
        began.set()
        time.sleep(0.2)
        steps.append(index)

    monkeypatch.setattr(hooks, "_attach_link", slow)
    attaching = asyncio.create_task(TcxHook(loaded.pins, cast("Any", None)).attach(7, 0, ""))
    await asyncio.to_thread(began.wait)
    attaching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attaching
    assert steps == [7]


def test_kernel_without_tcx_is_told(
    loaded: Datapath, node: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for it by name says what to use instead; auto takes what is there."""
    node.ip(veth("lxc1"))
    monkeypatch.setattr(kernelfeatures, "has_tcx", lambda: False)
    with pytest.raises(DatapathError, match=r"no tcx .*: use --attach clsact"):
        attach_once(node, loaded, PODS_ONLY, "tcx")
    attach_once(node, loaded, PODS_ONLY, "auto")
    assert node.call(tcx.tcx_programs, "lxc1") == []
    assert filters(node, "lxc1") == ["lm_from_pod"]


@pytest.mark.parametrize("hook", HOOKS)
def test_filters_of_others_stay(loaded: Datapath, node: Namespace, hook: str) -> None:
    """On either hook of the same interface, with the qdisc that they hang on, in their order."""
    node.ip(veth("lxc1"))
    node.run("tc", "qdisc", "add", "dev", "lxc1", "clsact")
    add_theirs(node, loaded, "lxc1", hook, "prio", "1", "handle", "1")
    attach_once(node, loaded, InterfaceSelection(pods=("lxc+",)))
    expected = ["lm_from_pod", "lm_from_uplink"] if hook == "ingress" else ["lm_from_pod"]
    assert [name.partition(":")[0] for name in filters(node, "lxc1")] == expected

    assert leave(node, loaded) == ["lxc1"]

    assert len(filters(node, "lxc1", hook)) == 1
    assert has_clsact(node, "lxc1")


def test_filter_of_others_at_our_priority_is_not_taken_for_ours(loaded: Datapath, node: Namespace) -> None:
    """A priority is not a name: only our handle at our priority is ours."""
    node.ip(veth("lxc1", "lxc2"))
    for name in ("lxc1", "lxc2"):
        node.run("tc", "qdisc", "add", "dev", name, "clsact")
        add_theirs(node, loaded, name, "ingress", "prio", "1", "handle", "5")
    attach_once(node, loaded, InterfaceSelection(pods=("lxc1",)))
    assert len(filters(node, "lxc1")) == 2

    assert leave(node, loaded) == ["lxc1"]

    assert [len(filters(node, name)) for name in ("lxc1", "lxc2")] == [1, 1]


def test_qdisc_of_others_is_used_and_left(loaded: Datapath, node: Namespace) -> None:
    """An interface without us is not touched, though it has an empty qdisc."""
    node.ip(veth("other"))
    node.run("tc", "qdisc", "add", "dev", "other", "clsact")
    assert leave(node, loaded) == []
    assert has_clsact(node, "other")
