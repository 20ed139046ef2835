"""Another pod's round trips to known peers during a flood of distinct mesh addresses, beside an empty program."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from itertools import chain
from typing import TYPE_CHECKING

from bench.report import Part, Row, milliseconds, percentiles, repeated
from bench.stage import fresh, running
from lazymesh.datapath.programs import load_idle
from tests.support.lab import SERVER_IDENTITY, Lab
from tests.support.node import SIGNAL_OUTCOMES, packets, send_udp, wait_identity
from tests.support.pulse import Pulse, Sender
from tests.support.storm import Storm
from tests.support.tcx import TcxLink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.lab import AgentProcess
    from tests.support.pulse import Fates

ROUNDS, SECONDS, PEERS = 3, 20, 4
PREFIX = "10.64.0.0/10"


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    ours: list[Fates] = []
    empty: list[Fates] = []
    counted = dict.fromkeys(("sent", "missed", *SIGNAL_OUTCOMES), 0)
    rates: dict[str, list[float]] = {"ours": [], "empty": []}
    for number in range(ROUNDS):
        say(f"round {number + 1} of {ROUNDS}: {SECONDS} s with an empty program, {SECONDS} s with ours")
        with Lab(pods=2) as lab:
            peers = fresh(PEERS)
            lab.publish_many(peers)
            with _empty_programs(lab):
                fates, _, rate = _flood(lab, peers)
                empty.append(fates)
                rates["empty"].append(rate)
            with running(lab, "--mesh-cidr", f"b={PREFIX}", policy=None) as agent:
                for peer in peers:
                    send_udp(lab.pods[1].namespace, peer, 1)
                    wait_identity(lab, peer, SERVER_IDENTITY)
                before = _counts(agent)
                fates, sent, rate = _flood(lab, peers)
                ours.append(fates)
                rates["ours"].append(rate)
                counted["sent"] += sent
                for cause, value in _counts(agent).items():
                    counted[cause] += value - before[cause]
    return _part(ours, empty, counted, rates)


@contextlib.contextmanager
def _empty_programs(lab: Lab) -> Iterator[None]:
    program = load_idle()
    links = [lab.node_a.call(TcxLink.attach, program, pod.interface) for pod in lab.pods]
    try:
        yield
    finally:
        for link in links:
            link.close()
        os.close(program)


def _flood(lab: Lab, peers: list[str]) -> tuple[Fates, int, float]:
    with (
        Sender(lab.pods[1].namespace, Pulse(peers, [], flow_every_s=0.008)) as sender,
        Storm(lab, lab.pods[0], PREFIX) as storm,
    ):
        time.sleep(SECONDS)
        sent = storm.stop()
        return sender.stop(), sent, sent / storm.seconds


def _counts(agent: AgentProcess) -> dict[str, int]:
    return {name: packets(agent, name) for name in ("missed", *SIGNAL_OUTCOMES)}


def _part(
    ours: list[Fates], empty: list[Fates], counted: dict[str, int], rates_of: dict[str, list[float]]
) -> Part:
    rounds = {
        name: [[took * 1000 for _, took in one.flows if took is not None] for one in fates]
        for name, fates in (("ours", ours), ("empty", empty))
    }
    times = {name: percentiles(chain.from_iterable(each)) for name, each in rounds.items()}
    rates = {name: statistics.fmean(each) for name, each in rates_of.items()}
    figures = {
        "round_trip_ms": times["ours"],
        "round_trip_empty_program_ms": times["empty"],
        "packets_per_second": round(rates["ours"]),
        "packets_per_second_empty_program": round(rates["empty"]),
        "known_peers_lost": sum(one.lost for one in ours),
        "known_peers_sent": sum(len(one.flows) for one in ours),
        "packets": counted,
        "without_cause": counted["sent"] - sum(counted[outcome] for outcome in SIGNAL_OUTCOMES),
    }
    rows = [
        Row(
            f"known peers' round trip, flood of {rates['ours']:,.0f} misses per second, {rank}",
            milliseconds(times["ours"][rank]),
            f"an empty program, {rates['empty']:,.0f}/s: {milliseconds(times['empty'][rank])}",
            times["ours"][rank] / times["empty"][rank], 2,
        )
        for rank in ("p50", "p99")
    ]  # fmt: skip
    lost, sent = figures["known_peers_lost"], figures["known_peers_sent"]
    rows += [
        Row(f"of their {sent} packets lost", str(lost), "none", lost, 0, "packets"),
        Row(
            f"of {counted['sent']:,} misses without a cause", str(figures["without_cause"]), "none",
            abs(figures["without_cause"]), 0, "misses",
        ),
    ]  # fmt: skip
    repeats = {
        **repeated({"round_trip_ms": rounds["ours"], "round_trip_empty_program_ms": rounds["empty"]}),
        "packets_per_second": rates_of["ours"],
        "packets_per_second_empty_program": rates_of["empty"],
        "known_peers_lost": [float(one.lost) for one in ours],
    }
    return Part(figures, rows, repeats)
