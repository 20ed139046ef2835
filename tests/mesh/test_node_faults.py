"""What befalls the node itself: full disks, torn pins, spoiled journals, clocks that jump, interfaces that go."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.libbpf import Map, MapLayout, pin
from tests.support.clockjump import ClockJump
from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, AgentProcess, Lab, remote_address
from tests.support.node import (
    Misses,
    child_of,
    connect,
    delete_entry,
    entries,
    filters,
    identity_of,
    is_alive,
    launched,
    metric,
    missed_until,
    options,
    pack_key,
    pack_value,
    raw_entries,
    status,
    wait_identity,
    wait_well,
)
from tests.support.pulse import Pulse, Sender
from tests.support.soak import fill, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

KNOWN = [remote_address(number, 6 if number % 2 else 4) for number in range(4)]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab for each story, with some peers."""
    with Lab(pods=2) as built:
        built.publish_many(KNOWN)
        yield built


def know(lab: Lab) -> None:
    """Have the peers resolved."""
    for address in KNOWN:
        missed_until(lab, address, SERVER_IDENTITY)


# --- logs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """Return a file system of one page, which is full once anything was written."""
    disk = lab.directory / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_disk_under_the_log_costs_lines_only(lab: Lab, small_disk: Path) -> None:
    """The agent goes on, counts what it could not write, and ends in good order."""
    (small_disk / "agent.log").write_bytes(b"x" * 4096)
    agent = AgentProcess(lab.node_a, options(lab), small_disk / "agent.log")
    try:
        agent.wait_ready()
        know(lab)
        lab.leave_mesh()
        wait_until(lambda: entries(lab) == {}, 5, "the entries gone")
        lab.join_mesh()
        know(lab)
        assert metric(agent, "lazymesh_log_lines_lost_total") > 5
        assert metric(agent, "lazymesh_unexpected_errors_total") == 0
        assert agent.log == ""
    finally:
        code = agent.stop()
    assert code == 0


def test_log_that_nobody_reads_does_not_stop_the_agent(lab: Lab) -> None:
    """A pipe whose reader hangs takes 64 KiB and then nothing; who waited for it would resolve nothing any more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    os.set_blocking(writer, True)
    argv = lab.node_a.command(_python(), "-m", "lazymesh", "agent", *options(lab), "--log-level", "debug")
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    try:
        wait_for(lambda: lab.socket.exists() and status(lab)["ready"], "the agent")
        know(lab)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)


def _python() -> str:
    import sys  # noqa: PLC0415

    return sys.executable


# --- pins and journal -------------------------------------------------------------------------------------------------


def test_half_written_journal_is_sorted_out(lab: Lab) -> None:
    """A crash leaves lines without entries and entries that the line only announced; a torn line may say anything."""
    with launched(lab, *options(lab)) as agent:
        agent.wait_ready()
        know(lab)
        agent.kill()
    journal = lab.bpffs / "lazymesh/lm_owned"
    announced, replaced, torn, unheard = KNOWN
    lines = raw_entries(lab, "lm_owned")
    with contextlib.closing(Map.pinned(journal)) as owned:
        # Crashed between journal and map: an insert, and a replacement, which names the entry before it, too.
        delete_entry(lab, pack_key(announced))
        line = lines[pack_key(replaced)]
        owned.update(pack_key(replaced), pack_value(OTHER_IDENTITY) + line[24:])
        owned.update(pack_key(torn), os.urandom(len(line)))
        owned.update(struct.pack("=IHBB16s", 7, 9, 9, 77, os.urandom(16)), os.urandom(len(line)))
        owned.delete(pack_key(unheard))
    with launched(lab, *options(lab), "--cleanup") as agent:
        agent.wait_ready()
        assert identity_of(lab, replaced) == SERVER_IDENTITY
        missed_until(lab, announced, SERVER_IDENTITY)
        for address in (torn, unheard):
            # No line of ours vouches for them: they are a stranger's, and stay.
            assert identity_of(lab, address) == SERVER_IDENTITY
        assert metric(agent, "lazymesh_entries_owned") == 2
        lab.publish(replaced, OTHER_IDENTITY)
        wait_identity(lab, replaced, OTHER_IDENTITY)
        assert metric(agent, "lazymesh_unexpected_errors_total") == 0


def test_journal_of_another_version_is_refused_and_nothing_is_touched(lab: Lab) -> None:
    """The agent names the pin and what to do; programs and entries that are there go on."""
    with launched(lab, *options(lab)) as agent:
        agent.wait_ready()
        know(lab)
        agent.kill()
    journal, before = lab.bpffs / "lazymesh/lm_owned", (filters(lab.node_a), raw_entries(lab))
    with contextlib.closing(Map.create("lm_owned", MapLayout(1, 24, 48, 512_000, 1))) as older:
        pin(older.fd, journal)
    with launched(lab, *options(lab), "--cleanup") as refused:
        assert refused.process.wait(20) == 3
        started, line = refused.log.strip().splitlines()
    assert "starting" in started
    assert str(journal) in line
    assert "another lazymesh version" in line
    assert (filters(lab.node_a), raw_entries(lab)) == before
    assert connect(lab.pods[0].namespace, KNOWN[0]) is not None


def test_killed_agent_takes_compiler_and_holder_along(lab: Lab) -> None:
    """Nobody wants what they do any more."""
    with launched(lab, *options(lab, program_cache="off")) as agent:
        compiler = wait_until(lambda: _compiler(agent.pid), 10, "a compiler at work")
        holder = wait_until(lambda: child_of(agent.pid), 10, "a holder that waits to begin")
        os.kill(compiler, signal.SIGSTOP)  # so that it cannot end by itself
        try:
            agent.kill()
            wait_until(lambda: not is_alive(compiler), 5, "the compiler's end")
            wait_until(lambda: not is_alive(holder), 5, "the holder's end")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(compiler, signal.SIGKILL)


def _compiler(parent: int) -> int | None:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (path / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
            # Before it has BCC it looks who its parent is by itself.
            if int(stat[1]) == parent and "libbcc" in (path / "maps").read_text(encoding="ascii"):
                return int(path.name)
    return None


def test_torn_off_programs_come_back_and_known_peers_notice_nothing(lab: Lab) -> None:
    """Somebody removes the pins of the links: the kernel takes the programs off, the agent puts them on again."""
    with launched(lab, *options(lab), "--cleanup") as agent:
        agent.wait_ready()
        know(lab)
        with Sender(lab.pods[0].namespace, Pulse(KNOWN, [], flow_every_s=0.01)) as sender:
            for link in (lab.bpffs / "lazymesh/links").iterdir():
                link.unlink()
            wait_until(
                lambda: metric(agent, "lazymesh_programs_displaced_total") >= 3, 5, "programs attached again"
            )
            assert sender.stop().losses() == {}
        assert filters(lab.node_a) == ["eth0: lm_from_uplink", "lxc0: lm_from_pod", "lxc1: lm_from_pod"]
        lab.publish(remote_address(50))
        assert connect(lab.pods[0].namespace, remote_address(50)) is not None


def test_deleted_pins_are_told_and_the_next_agent_starts_afresh(lab: Lab) -> None:
    """The agent that runs has what it needs; people are told that commands and the next agent do not."""
    with launched(lab, *options(lab)) as agent:
        agent.wait_ready()
        know(lab)
        for path in (lab.bpffs / "lazymesh").iterdir():
            if path.is_file():
                path.unlink()
        lab.publish(remote_address(51))
        assert connect(lab.pods[0].namespace, remote_address(51)) is not None
        wait_until(lambda: "pins are gone" in " ".join(status(lab)["wrong"]), 5, "a word about it")
        assert metric(agent, "lazymesh_problems") == 1
        with Sender(lab.pods[0].namespace, Pulse(KNOWN, [])) as sender:
            agent.kill()
            with launched(lab, *options(lab), "--cleanup") as fresh:
                fresh.wait_ready()
                know(lab)
                fates = sender.stop()
                assert status(lab)["wrong"] == []
                assert metric(fresh, "lazymesh_problems") == 0
    print(f"pins deleted, agent killed and started again: {fates.lost} of {len(fates.flows)} packets lost")


# --- map, interfaces, clock -------------------------------------------------------------------------------------------


def test_full_map_refuses_new_entries_with_an_alarm(lab: Lab) -> None:
    """A stranger has filled it to the last entry: what there is serves, misses end by a reason."""
    fresh = remote_address(60)
    lab.publish(fresh)
    with launched(lab, *options(lab), "--cleanup") as agent:
        agent.wait_ready()
        know(lab)
        with Misses(lab.socket) as misses, Sender(lab.pods[0].namespace, Pulse(KNOWN, [])) as sender:
            with fill(lab):
                refused = misses.provoke(lab.pods[0].namespace, fresh)
                assert (refused["outcome"], refused["reason"]) == ("failed", "map-full")
                assert "the ipcache map is full" in " ".join(status(lab)["wrong"])
                assert metric(agent, "cilium_ipcache_miss_resolution_errors_total", reason="map-full") >= 1
                # What is ours can still be changed, and go.
                lab.publish(KNOWN[3], OTHER_IDENTITY)
                wait_identity(lab, KNOWN[3], OTHER_IDENTITY)
            missed_until(lab, fresh, SERVER_IDENTITY, 15)
            fates = sender.stop()
        assert set(fates.losses()) <= {KNOWN[3]}, "the policy denies that one by now"
        wait_well(lab, 10)
        assert metric(agent, "lazymesh_unexpected_errors_total") == 0


def test_interface_removed_under_traffic_costs_its_own_pod_only(lab: Lab) -> None:
    """Parked packets of a pod that is gone are let go of; made again, its traffic flows again."""
    pod, other = lab.pods
    with launched(lab, *options(lab), "--cleanup") as agent:
        agent.wait_ready()
        know(lab)
        nobody = [remote_address(number) for number in range(1_000, 1_100)]
        with Sender(pod.namespace, Pulse(KNOWN, [])) as known, Sender(other.namespace, Pulse(nobody, [])):
            for _ in range(5):
                lab.unplug(other)
                wait_until(lambda: other.interface not in status(lab)["datapath"]["interfaces"], 5, "let go")
                lab.plug(other)
                wait_until(
                    lambda: other.interface in status(lab)["datapath"]["interfaces"], 5, "attached again"
                )
                assert connect(other.namespace, KNOWN[0]) is not None
            fates = known.stop()
        assert fates.losses() == {}
        wait_until(lambda: metric(agent, "lazymesh_parked_packets") == 0, 5, "nothing parked any more")
        assert metric(agent, "lazymesh_unexpected_errors_total") == 0


@pytest.mark.needs("clang")
@pytest.mark.parametrize("seconds", [-86_400, 3 * 365 * 86_400], ids=["a day back", "three years on"])
def test_clock_jump_changes_nothing(lab: Lab, seconds: int) -> None:
    """Nothing is decided by the wall clock: entries stand, misses resolve, changes come, nothing expires."""
    clock = ClockJump(lab.directory)
    with launched(lab, *options(lab), "--cleanup", env=clock.env) as agent:
        agent.wait_ready()
        know(lab)
        with Sender(lab.pods[0].namespace, Pulse(KNOWN, [], flow_every_s=0.01)) as sender:
            clock.jump(seconds)
            lab.etcd.restart()
            lab.publish(KNOWN[3], OTHER_IDENTITY)
            wait_identity(lab, KNOWN[3], OTHER_IDENTITY, 10)
            lab.publish(remote_address(70))
            missed_until(lab, remote_address(70), SERVER_IDENTITY)
            clock.jump(0)
            lab.publish(KNOWN[3])
            wait_identity(lab, KNOWN[3], SERVER_IDENTITY, 10)
            fates = sender.stop()
        assert set(fates.losses()) <= {KNOWN[3]}, "the policy denied that one for a while"
        assert {identity_of(lab, address) for address in KNOWN} == {SERVER_IDENTITY}
        assert metric(agent, "lazymesh_unexpected_errors_total") == 0
        assert "Traceback" not in agent.log
