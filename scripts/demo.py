"""The demo: the same traffic from a pod to remote pods in a sync gap, without lazymesh and in each of its modes.

In each run the same program enforces the same policy (egress denied, except to ``app=server``), and none of the
remote pods is in the ipcache yet. Off: the agent follows no cluster, so the peers stay unknown and policy drops
their packets, as it does before a record arrives. Pass, drop, hold: the first packet misses and the agent fetches
the record; meanwhile the packet passes as world, is dropped, or waits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts import demo_restart
from tests.support.container import in_lab
from tests.support.lab import REMOTE_CIDRS, Lab, remote_address
from tests.support.namespaces import tidy_signals
from tests.support.traffic import Exchange, Probe, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Numbers = dict[str, Any]
_BEGAN = time.monotonic()
MODES = {"off": "OFF", "drop": "DROP", "pass": "PASS", "hold": "HOLD (default)"}
"""What happens to a missed packet, and the name of the column."""


@dataclass(frozen=True)
class Plan:
    """What is sent where; the same in every run."""

    connections: int

    @property
    def probe(self) -> Probe:
        """What the client does; it starts one connection at a time, so that its own work is not measured."""
        return Probe(tcp=self.tcp, udp=self.udp, stagger=min(0.002, 1 / self.connections))

    @property
    def tcp(self) -> tuple[str, ...]:
        """The peers of the TCP connections, IPv4 and IPv6 in turn."""
        return tuple(remote_address(number, 6 if number % 2 else 4) for number in range(self.connections))

    @property
    def udp(self) -> tuple[str, ...]:
        """The peers of the UDP exchanges: other ones, because a peer misses only once."""
        start = self.connections
        return tuple(remote_address(number, 6 if number % 2 else 4) for number in range(start, 2 * start))


def main() -> int:
    """Run the demo; return 0 if it shows what it promises, 1 if not, 3 if it cannot run."""
    options = parse_arguments()
    if os.geteuid() != 0:
        return fail("needs root, for network namespaces and BPF")
    scene = SCENES[options.scene]
    try:
        with tidy_signals():
            results = scene.run(options)
    except KeyboardInterrupt:
        say("interrupted; everything that it created is removed")
        return 130
    except (OSError, RuntimeError) as error:
        return fail(str(error))
    print(json.dumps(results) if options.output == "json" else scene.table(results))
    if options.picture is not None:
        from scripts.demo_picture import draw  # noqa: PLC0415 (half a second, and not often wanted)

        draw(results, options.picture)
    return 0 if scene.shows(results) else 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Two clusters in network namespaces, without and with lazymesh."
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument(
        "--scene",
        choices=tuple(SCENES),
        default="gap",
        help="gap: first connections in a sync gap (default). restart: a Cilium agent restarts under traffic.",
    )
    parser.add_argument(
        "--connections",
        type=count(1, 400),
        default=20,
        metavar="N",
        help="gap: connections of each protocol (default: 20)",
    )
    parser.add_argument(
        "--endpoints",
        type=count(1_000, 400_000),
        default=60_000,
        metavar="N",
        help="restart: remote pods in the mesh (default: 60000, which takes two minutes)",
    )
    parser.add_argument(
        "--image",
        type=directory,
        metavar="DIR",
        help="gap: run the agent inside this unpacked image (scripts/image), in a container",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="restart: draw a picture, as .svg or .png"
    )
    options = parser.parse_args()
    if options.picture is not None and options.scene != "restart":
        parser.error("--picture needs --scene restart")
    if options.image is not None and options.scene != "gap":
        parser.error("--image needs --scene gap")
    if options.picture is not None and options.picture.suffix not in (".svg", ".png"):
        parser.error("--picture: the name must end in .svg or .png")
    if options.picture is not None and not options.picture.absolute().parent.is_dir():
        parser.error(f"--picture: no directory {options.picture.absolute().parent}")
    return options


def directory(text: str) -> Path:
    """Return the absolute path of a directory, since a container mounts it from another working directory."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {text}; scripts/image makes .cache/image/root")
    return path


def count(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of numbers in these bounds."""

    def read(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"give a number from {least} to {most}")
        return number

    return read


def run(plan: Plan, image: Path | None = None) -> Numbers:
    """Build the lab, send the traffic in each mode, and return the results."""
    say("building two clusters in network namespaces, with an etcd")
    with Lab(pods=1) as lab:
        if image is not None:
            lab.program = in_lab(lab, image).command
        lab.publish_many([*plan.tcp, *plan.udp])
        modes = {}
        for mode in MODES:
            modes[mode], ipcache = run_once(lab, plan, mode)
        say("cleaning up")
    return {"without": modes["off"], "with": modes["hold"], "ipcache": ipcache, "modes": modes}


def run_once(lab: Lab, plan: Plan, mode: str) -> tuple[Numbers, dict[str, int]]:
    """Send the traffic past a new agent; return the numbers, and the size of the ipcache before and after."""
    say(f"{mode}: starting the agent")
    if mode == "off":
        cidrs = [word for cidr in REMOTE_CIDRS for word in ("--mesh-cidr", f"{lab.remote_name}={cidr}")]
        agent = lab.start_agent("--cleanup", "--on-miss", "pass", *cidrs, config=lab.no_config)
    else:
        agent = lab.start_agent("--cleanup", "--on-miss", mode)
    before = len(lab.ipcache())
    say(f"{mode}: {plan.connections} TCP connections, {plan.connections} UDP exchanges")
    exchanges = probe(lab.pods[0].namespace, plan.probe)
    after = len(lab.ipcache())
    agent.stop()
    return summarize(exchanges), {"before": before, "after": after}


def summarize(exchanges: Sequence[Exchange]) -> Numbers:
    """Count and rank the client's results."""
    tcp = [exchange for exchange in exchanges if exchange.protocol == "tcp"]
    udp = [exchange for exchange in exchanges if exchange.protocol == "udp"]
    return {
        "tcp": {"attempted": len(tcp), "connected": answered(tcp), **round_trips(tcp)},
        "udp": {"sent": len(udp), "answered": answered(udp), **round_trips(udp)},
    }


def answered(exchanges: Sequence[Exchange]) -> int:
    """Count the exchanges whose peer answered."""
    return sum(exchange.ok for exchange in exchanges)


def round_trips(exchanges: Sequence[Exchange]) -> Numbers:
    """Return the first packets' and the later round trips' percentiles."""
    first = [exchange.first_ms for exchange in exchanges if exchange.first_ms is not None]
    steady = [value for exchange in exchanges for value in exchange.steady_ms]
    return {"first_ms": percentiles(first), "steady_ms": percentiles(steady)}


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return p50 and p99 by nearest rank, None where there is nothing to rank."""
    ranked = sorted(values)
    return {
        f"p{percent}": round(ranked[math.ceil(percent / 100 * len(ranked)) - 1], 3) if ranked else None
        for percent in (50, 99)
    }


def shows_the_difference(results: Numbers) -> bool:
    """Return whether nothing passed without lazymesh, and everything with it."""
    without = results["without"]
    return without["tcp"]["connected"] == without["udp"]["answered"] == 0 and all(
        run["tcp"]["connected"] == run["tcp"]["attempted"] and run["udp"]["answered"] == run["udp"]["sent"]
        for mode, run in results["modes"].items()
        if mode != "off"
    )


def table(results: Numbers) -> str:
    """Return the results as a table."""
    sides: list[tuple[str, Callable[[Numbers], str]]] = [
        ("TCP connections made", lambda r: f"{r['tcp']['connected']} of {r['tcp']['attempted']}"),
        ("  first packet, p50 / p99", lambda r: milliseconds(r["tcp"]["first_ms"])),
        ("  then, p50 / p99", lambda r: milliseconds(r["tcp"]["steady_ms"])),
        ("UDP exchanges answered", lambda r: f"{r['udp']['answered']} of {r['udp']['sent']}"),
        ("  first packet, p50 / p99", lambda r: milliseconds(r["udp"]["first_ms"])),
        ("  then, p50 / p99", lambda r: milliseconds(r["udp"]["steady_ms"])),
    ]
    rows = [(name, *(show(results["modes"][mode]) for mode in MODES)) for name, show in sides]
    lines = [f"{name:<27}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in rows]
    head = f"{'pod to remote pods':<27}" + "".join(f"{name:>18}" for name in MODES.values())
    entries = results["ipcache"]
    verdict = (
        "Off: dropped by policy. With lazymesh: the first packet is slow, then it is normal."
        if shows_the_difference(results)
        else "Not as promised: nothing should pass with lazymesh off, and everything in each other mode."
    )
    return "\n".join(
        [
            head,
            "-" * len(head),
            *lines,
            "",
            verdict,
            f"ipcache entries: {entries['before']} before, {entries['after']} after (hold).",
            "First packet: time until its answer, retransmissions included.",
        ]
    )


def milliseconds(ranks: dict[str, float | None]) -> str:
    """Format a pair of percentiles."""
    if ranks["p50"] is None or ranks["p99"] is None:
        return "-"
    return f"{short(ranks['p50'])} / {short(ranks['p99'])} ms"


def short(value: float) -> str:
    """Format with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def say(words: str) -> None:
    """Report progress on standard error."""
    print(f"demo: {time.monotonic() - _BEGAN:4.1f} s  {words}", file=sys.stderr, flush=True)


def fail(words: str) -> int:
    """Report why the demo cannot run."""
    print(f"demo: {words}", file=sys.stderr)
    return 3


@dataclass(frozen=True)
class Show:
    """A scene."""

    run: Callable[[argparse.Namespace], Numbers]
    table: Callable[[Numbers], str]
    shows: Callable[[Numbers], bool]


SCENES = {
    "gap": Show(lambda options: run(Plan(options.connections), options.image), table, shows_the_difference),
    "restart": Show(
        lambda options: demo_restart.run(options.endpoints, say),
        demo_restart.table,
        demo_restart.shows_the_difference,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
