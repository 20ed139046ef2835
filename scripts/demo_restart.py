"""The restart scene: a Cilium agent restarts under traffic, without lazymesh and with it.

At each start the agent makes a new, empty ipcache and fills it. After some time its programs switch to it, filled or
not, and treat every pod that is still missing as world. The agent here is the tests' stand-in, which does what real
ones were observed to do; the traffic, the programs, the kernel and the etcd are real.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.support.cilium import Cilium
from tests.support.lab import Lab
from tests.support.node import beside_cilium, status
from tests.support.restart import Scene, addresses, play

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.restart import Outcome

Numbers = dict[str, Any]
FILL_RATE, FULL, SWITCH_AT = 3_000, 200_000, 0.3
"""Entries per second; entries; when the programs switch, as a share of the time that filling takes."""
BIN_S = 0.1
"""The width of a bin in the picture."""
SIDES = {"without": "Without lazymesh", "with": "With lazymesh"}


def scene_of(endpoints: int) -> Scene:
    """Return the scene for a mesh with this number of endpoints."""
    filling = endpoints / FILL_RATE
    return Scene(endpoints, FILL_RATE, switch_after_s=1 + SWITCH_AT * filling, lead_s=2)


def run(endpoints: int, say: Callable[[str], None]) -> Numbers:
    """Play the scene twice, and return the results."""
    scene, peers = scene_of(endpoints), addresses(endpoints)
    say("building two clusters in network namespaces, with an etcd")
    with Lab(pods=1) as lab:
        say(f"publishing {endpoints:,} remote pods")
        lab.publish_many(peers)
        results = {}
        for side, name in SIDES.items():
            say(f"{name}: a Cilium agent learns them")
            with Cilium(lab) as cilium:
                cilium.upsert_many(peers)
                if side == "without":
                    outcome = play(cilium, lab.pods[0], scene, say)
                else:
                    with beside_cilium(lab):
                        outcome = play(cilium, lab.pods[0], scene, say)
                        noticed = status(lab)["datapath"]["ipcache"]["noticedMs"]
            results[side] = numbers(outcome)
        results["with"]["noticed_ms"] = noticed
        say("cleaning up")
    return {"endpoints": endpoints, "fill_rate": FILL_RATE, **results}


def numbers(outcome: Outcome) -> Numbers:
    """Return the results for JSON."""
    fates = outcome.fates
    first = sorted(took for _, took in fates.fresh if took is not None)
    bins = fates.per_bin(BIN_S)
    return {
        "flow_packets": {"sent": len(fates.flows), "lost": sum(took is None for _, took in fates.flows)},
        "connections": {"attempted": len(fates.fresh), "failed": len(fates.fresh) - len(first)},
        "lost_for_s": round(outcome.lost_for_s, 3),
        "first_ms": {f"p{p}": round(first[len(first) * p // 100] * 1000, 3) for p in (50, 99)}
        if first
        else None,
        "overwritten": outcome.overwritten,
        "events_s": {name: round(at, 3) for name, at in outcome.events.items()},
        "per_100ms": {"sent": [sent for sent, _ in bins], "lost": [lost for _, lost in bins]},
    }


def shows_the_difference(results: Numbers) -> bool:
    """Return whether packets were lost only without lazymesh, and no entry of Cilium was overwritten."""
    return (
        results["without"]["flow_packets"]["lost"] > 0
        and all(
            results["with"][what][bad] == 0
            for what, bad in (("flow_packets", "lost"), ("connections", "failed"))
        )
        and results["with"]["overwritten"] == 0
    )


def table(results: Numbers) -> str:
    """Return the results as a table."""
    rows = [
        (
            "packets of 50 established flows lost",
            lambda r: "{lost:,} of {sent:,}".format(**r["flow_packets"]),
        ),
        (
            "new connections that lost their SYN",
            lambda r: "{failed:,} of {attempted:,}".format(**r["connections"]),
        ),
        ("from the first lost packet to the last", lambda r: f"{r['lost_for_s']:.1f} s"),
        ("first packets, p50 / p99", lambda r: "{p50:.2g} / {p99:.2g} ms".format(**r["first_ms"])),
    ]
    lines = [f"{name:<42}" + "".join(f"{show(results[side]):>20}" for side in SIDES) for name, show in rows]
    head = f"{'a Cilium agent restarts':<42}" + "".join(f"{name:>20}" for name in SIDES.values())
    at = results["with"]["events_s"]
    told = (
        f"{results['endpoints']:,} remote endpoints, filled at {results['fill_rate']:,}/s; programs switch"
        f" {at['switched'] - at['restart']:.1f} s after the start, the map is full after"
        f" {at['filled'] - at['restart']:.1f} s."
    )
    verdict = (
        "Without: dropped by policy until the entry is there. With: nothing lost, no entry of Cilium overwritten."
        if shows_the_difference(results)
        else "Not as promised: packets should be lost without lazymesh, and none with it."
    )
    return "\n".join([head, "-" * len(head), *lines, "", verdict, told])
