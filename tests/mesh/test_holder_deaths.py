"""Agent and holder are killed and stopped under traffic: a known peer loses nothing, and parked packets come back."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import abi
from lazymesh.datapath.holdmaps import HoldCounterMap
from lazymesh.datapath.libbpf import Map
from tests.support.burst import Sink, Ticker
from tests.support.etcd import wait_until
from tests.support.lab import ETCD_PORT, AgentProcess, Lab, remote_address
from tests.support.node import child_of, identity_of, launched, metric, options, send_udp
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

PROXY_PORT = 12_380
KNOWN = remote_address(0)
_numbers = itertools.count(10_000)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab, with one published peer."""
    with Lab(pods=1) as built:
        built.publish(KNOWN)
        config = built.directory / "proxied"
        config.mkdir()
        url = built.etcd.url.replace(str(ETCD_PORT), str(PROXY_PORT))
        (config / "b").write_text(f"endpoints:\n- {url}\n", encoding="ascii")
        yield built


@pytest.fixture(scope="module")
def proxy(lab: Lab) -> Iterator[Proxy]:
    """Return a store that takes 40 ms to answer, so that there is always something parked."""
    with Proxy(lab.node_a, PROXY_PORT, ETCD_PORT, 0.04) as between:
        yield between


@contextlib.contextmanager
def holding(lab: Lab) -> Iterator[AgentProcess]:
    """Run an agent that holds, and has the known peer's entry."""
    words = options(lab, clustermesh_config=str(lab.directory / "proxied"), policy=None)
    with launched(lab, *words, "--on-miss", "hold") as agent:
        agent.wait_ready()
        wait_until(lambda: _asked(lab), 10, "the known peer's entry")
        yield agent


def _asked(lab: Lab) -> bool:
    send_udp(lab.pods[0].namespace, KNOWN, 1)
    return identity_of(lab, KNOWN) is not None


@pytest.fixture
def agent(lab: Lab, proxy: Proxy) -> Iterator[AgentProcess]:
    """Return such an agent."""
    with holding(lab) as running:
        yield running


def fresh() -> Iterator[str]:
    """Yield addresses that were never used; nobody is published there."""
    return (remote_address(number) for number in _numbers)


def holder_of(agent: AgentProcess) -> int:
    """Return the process id of its holder."""
    return int(wait_until(lambda: child_of(agent.pid), 5, "a holder"))


def counts(lab: Lab) -> dict[str, int]:
    """Return the kernel's counters of holding and the holders' own, read from the pins."""
    with contextlib.closing(HoldCounterMap(lab.bpffs / "lazymesh")) as maps:
        return maps.kernel() | {f"holder {name}": number for name, number in maps.holder().items()}


def out(lab: Lab) -> int:
    """Return how many packets are out by the kernel's account."""
    total = Map.pinned(lab.bpffs / "lazymesh/lm_hold_total")
    raw = total.lookup(bytes(4)) or b""
    total.close()
    return int(abi.Outstanding.from_buffer_copy(raw).packets)


def leaked(lab: Lab) -> int:
    """Return how many slots are not free."""
    slots = Map.pinned(lab.bpffs / "lazymesh/lm_slots")
    busy = sum(abi.Slot.from_buffer_copy(raw).state != abi.SLOT_FREE for _, raw in slots.items())
    slots.close()
    return busy


def run_for(seconds: float) -> None:
    """Let traffic flow."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, seconds + 1)


def lost(ticker: Ticker, sink: Sink) -> tuple[int, int]:
    """Return how many datagrams to the known peer and to fresh addresses did not arrive."""
    sink.wait(len(ticker.sent), 1.5)
    came = [each.address for each in sink.arrived]
    known = sum(address == KNOWN for address, _ in ticker.sent) - came.count(KNOWN)
    return known, len(ticker.sent) - len(came) - known


def slowest_after(sink: Sink, ticker: Ticker, moment: float) -> float:
    """Return the longest trip of what was sent after this moment."""
    sent = dict(reversed(ticker.sent))
    trips = [
        each.at - sent[each.address]
        for each in sink.arrived
        if each.address != KNOWN and sent[each.address] > moment
    ]
    assert len(trips) > 20
    return max(trips)


def test_a_killed_agent_loses_no_packet(lab: Lab, proxy: Proxy) -> None:
    """What was parked is given back by the holder, which outlives it by a moment; new misses pass."""
    with holding(lab) as agent, Sink(lab.node_b) as sink:
        holder = holder_of(agent)
        with Ticker(lab.pods[0].namespace, KNOWN, fresh()) as ticker:
            wait_until(lambda: out(lab) > 5, 5, "parked packets")
            agent.kill()
            died = time.monotonic()
            run_for(0.5)
        assert lost(ticker, sink) == (0, 0)
        assert slowest_after(sink, ticker, died + 0.1) < 0.1
        wait_until(lambda: not Path(f"/proc/{holder}").exists(), 2, "the holder's end")
    assert counts(lab)["holder shutdown"] > 0
    assert (out(lab), leaked(lab)) == (0, 0)


def test_a_stopped_agent_stops_the_holding_not_the_traffic(lab: Lab, agent: AgentProcess) -> None:
    """Half a second later misses pass; what waits is let go after the time limit, and awake again all is as before."""
    with Sink(lab.node_b) as sink, Ticker(lab.pods[0].namespace, KNOWN, fresh()) as ticker:
        wait_until(lambda: out(lab) > 5, 5, "parked packets")
        agent.process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            run_for(1.1)
            stale = counts(lab)["refused_stale"]
        finally:
            agent.process.send_signal(signal.SIGCONT)
        woken, before = time.monotonic(), counts(lab)["held"]
        wait_until(lambda: counts(lab)["held"] > before + 20, 5, "holding to resume")
        ticker.stop()
        assert lost(ticker, sink) == (0, 0)
        mine = [each for each in ticker.sent if stopped + 0.55 < each[1] < woken - 0.05]
        came = {each.address: each.at for each in sink.arrived}
        assert max(came[address] - at for address, at in mine if address != KNOWN) < 0.15
        assert stale > 50
    wait_until(lambda: out(lab) == 0, 3)


def test_a_stopped_holder_keeps_what_it_has_and_gets_no_more(lab: Lab, agent: AgentProcess) -> None:
    """Within 100 ms misses pass; awake again it gives everything back, and holding resumes."""
    holder = holder_of(agent)
    with Sink(lab.node_b) as sink:
        with Ticker(lab.pods[0].namespace, KNOWN, fresh()) as ticker:
            wait_until(lambda: out(lab) > 5, 5, "parked packets")
            os.kill(holder, signal.SIGSTOP)
            stopped = time.monotonic()
            try:
                run_for(0.6)
            finally:
                os.kill(holder, signal.SIGCONT)
            woken, before = time.monotonic(), counts(lab)["held"]
            wait_until(lambda: counts(lab)["held"] > before + 20, 5, "holding to resume")
        assert lost(ticker, sink) == (0, 0)
        passing = [each for each in ticker.sent if stopped + 0.15 < each[1] < woken - 0.05]
        came = {each.address: each.at for each in sink.arrived}
        assert max(came[address] - at for address, at in passing if address != KNOWN) < 0.15
    assert counts(lab)["refused_stale"] > 50
    wait_until(lambda: out(lab) == 0, 3)


def test_a_holder_that_hangs_for_good_is_replaced(lab: Lab, agent: AgentProcess) -> None:
    """The agent sees that it is silent, says so, and starts another."""
    holder = holder_of(agent)
    os.kill(holder, signal.SIGSTOP)
    wait_until(lambda: "the holder hangs" in lab.cli("status", check=False).stdout, 5, "a word about it")
    wait_until(lambda: child_of(agent.pid) not in (None, holder), 15, "another holder")
    before = counts(lab)["held"]
    wait_until(lambda: _hold_one(lab) and counts(lab)["held"] > before, 5, "holding to resume")
    assert not Path(f"/proc/{holder}").exists()


def _hold_one(lab: Lab) -> bool:
    send_udp(lab.pods[0].namespace, next(fresh()), 1)
    return True


def _restarts(agent: AgentProcess) -> float:
    return metric(agent, "lazymesh_holder_restarts_total")


def test_killed_holders_leave_nothing_behind(lab: Lab, agent: AgentProcess) -> None:
    """Ten of them, under traffic: each takes only what it had in its hands, and the next one starts from zero."""
    start = counts(lab)
    with Sink(lab.node_b) as sink:
        with Ticker(lab.pods[0].namespace, KNOWN, fresh()) as ticker:
            for round_ in range(1, 11):
                before = counts(lab)["held"]
                wait_until(lambda before=before: counts(lab)["held"] > before + 5, 8, "holding")  # type: ignore[misc]
                os.kill(holder_of(agent), signal.SIGKILL)
                wait_until(lambda round_=round_: _restarts(agent) == round_, 5, "the agent to notice")  # type: ignore[misc]
            before = counts(lab)["held"]
            wait_until(lambda: counts(lab)["held"] > before + 5, 8, "holding")
        known, others = lost(ticker, sink)
    wait_until(lambda: out(lab) == 0, 3, "everything given back")
    grown = {name: number - start[name] for name, number in counts(lab).items()}
    print(
        f"10 kills of the holder: {others} of {grown['held']} held lost, {known} of {len(ticker.sent) // 2} known"
    )
    assert known == 0
    assert others <= grown["holder lost"]
    assert grown["held"] + grown["gated"] == grown["returned"] + grown["discarded"] + grown["holder lost"]
    assert leaked(lab) == 0


def test_a_new_agent_takes_over_cleanly(lab: Lab, agent: AgentProcess) -> None:
    """An upgrade: the old one stops under traffic, the next one holds; no packet is lost on the way."""
    with Sink(lab.node_b) as sink, Ticker(lab.pods[0].namespace, KNOWN, fresh()) as ticker:
        wait_until(lambda: out(lab) > 5, 5, "parked packets")
        assert agent.stop() == 0
        with holding(lab):
            before = counts(lab)["held"]
            wait_until(lambda: counts(lab)["held"] > before + 20, 5, "holding to resume")
            ticker.stop()
            assert lost(ticker, sink) == (0, 0)
    wait_until(lambda: out(lab) == 0, 3)


def test_an_old_holder_that_hangs_is_in_nobodys_way(lab: Lab, proxy: Proxy) -> None:
    """Its agent was killed and it has the device: the next one takes another, and is not switched off by it later."""
    with holding(lab) as first:
        old = holder_of(first)
        os.kill(old, signal.SIGSTOP)
        first.kill()
    try:
        with holding(lab) as second:
            wait_until(lambda: "lm_hold1" in lab.node_a.run("ip", "link"), 5, "a device of its own")
            wait_until(lambda: "usual name is taken" in second.log, 5, "a word about it")
            os.kill(old, signal.SIGCONT)
            wait_until(lambda: not Path(f"/proc/{old}").exists(), 5, "the old one's end")
            before = counts(lab)["held"]
            wait_until(lambda: _hold_one(lab) and counts(lab)["held"] > before, 5, "holding")
            assert metric(second, "lazymesh_holder_restarts_total") == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(old, signal.SIGKILL)


@pytest.mark.parametrize(
    "removal",
    [
        ("tc", "qdisc", "del", "dev", "{}", "clsact"),
        ("tc", "filter", "del", "dev", "{}", "egress"),
        ("tc", "filter", "del", "dev", "{}", "ingress"),
        ("tc", "qdisc", "replace", "dev", "{}", "root", "pfifo_fast"),
        ("ip", "link", "set", "{}", "down"),
    ],
    ids=["both", "out", "back", "queue", "down"],
)
def test_what_is_taken_off_its_device_is_put_back(
    lab: Lab, agent: AgentProcess, removal: tuple[str, ...]
) -> None:
    """Somebody cleans the node: without filters and queue held packets are lost, while it is down none is held."""
    device = wait_until(lambda: next(iter(holding_devices(lab)), ""), 5, "a device")
    lab.node_a.run(*(word.format(device) for word in removal))
    wait_until(lambda: "the holder's TAP device was changed" in agent.log, 5, "the agent to notice")
    with Sink(lab.node_b) as sink, Ticker(lab.pods[0].namespace, KNOWN, fresh()) as ticker:
        before = counts(lab)["held"]
        wait_until(lambda: counts(lab)["held"] > before + 20, 5, "holding to resume")
        ticker.stop()
        assert lost(ticker, sink) == (0, 0)
    wait_until(lambda: (out(lab), leaked(lab)) == (0, 0), 5, "everything given back")


def holding_devices(lab: Lab) -> list[str]:
    """Return the names of the TAP devices of holders."""
    return re.findall(r"lm_hold\d", lab.node_a.run("ip", "-o", "link"))
