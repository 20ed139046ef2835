"""Check each promise of lazymesh beside an unmodified cilium-agent, with measurements.

Run by scripts/real-cilium, which builds what is needed. The agent, its programs, its policy, the kube-apiserver and
both etcds are real; the lab writes the other cluster's records as its clustermesh-apiserver would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support import tcx
from tests.support.bpfobject import program_info_by_id
from tests.support.cilium_boot import FILLED, PINNED, SWITCHED
from tests.support.cilium_ipcache import pack_key, pack_value, unpack_key, unpack_value
from tests.support.cilium_world import CiliumSettings, RemoteNode, World, pod_record
from tests.support.etcd import wait_until
from tests.support.lab import ETCD_PORT, NODE_A, OTHER_IDENTITY, Lab, Store, remote_address
from tests.support.namespaces import tidy_signals
from tests.support.node import launched, metric, options, packets, status
from tests.support.pulse import Pulse, Sender
from tests.support.real_cilium import Build, RealCilium
from tests.support.restart import addresses
from tests.support.traffic import Probe, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.lab import AgentProcess
    from tests.support.pulse import Fates

_BEGAN = time.monotonic()
_TAG = b"lm"
PUSHED, UNKNOWN = 50, 60_100
"""The number of pods that the agent knows in the scenarios, and the first number of a pod that it does not know."""
HEARTBEAT_EVERY_S = 20.0


class Report:
    """The results: a line for each check, and figures by name."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.wrong: list[str] = []

    def check(self, ok: bool, promise: str, seen: object = "") -> None:
        """Record whether a promise was kept, and what was observed."""
        print(f"{'ok' if ok else 'NO':<3} {promise}" + (f": {seen}" if seen != "" else ""), flush=True)
        if not ok:
            self.wrong.append(promise)

    def note(self, name: str, value: object) -> None:
        """Record a figure."""
        self.figures[name] = value
        print(f"    {name}: {value}", flush=True)


def say(text: str) -> None:
    """Report progress on standard error."""
    print(f"[{time.monotonic() - _BEGAN:5.1f} s] {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run all scenarios; return 0 if every promise was kept."""
    arguments = parse_arguments()
    build = Build(arguments.version, arguments.binaries, arguments.sources, arguments.tools)
    report = Report()
    extra = [f"--clustermesh-sync-timeout={arguments.wait:g}s", *arguments.option]
    with tidy_signals(), Lab(pods=2) as lab, beating(lab):
        lab.publish_many(addresses(PUSHED))
        say(f"cilium-agent {build.version} starts for the first time")
        with (
            RealCilium(lab, build, *extra, tunnel=arguments.tunnel) as cilium,
            keeping_logs(lab, cilium, arguments.logs),
        ):
            cilium.wait_synced()
            if not arguments.restart_only:
                compare_with_stand_in(report, lab, cilium)
                without_lazymesh(report, lab, cilium)
                with_lazymesh(report, lab, cilium)
                uninstalled(report, lab, cilium)
            if arguments.endpoints:
                restarts(report, lab, cilium, arguments.endpoints, compare=not arguments.with_only)
    if arguments.json:
        arguments.json.write_text(json.dumps({"version": build.version, **report.figures}, indent=2) + "\n")
    print(f"\n{len(report.wrong)} promises broken" if report.wrong else "\nevery promise kept")
    return 1 if report.wrong else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    for name in ("binaries", "sources", "tools"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check-arguments", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--endpoints", type=int, default=100_000, help="at the restart; 0 skips it")
    parser.add_argument("--restart-only", action="store_true", help="only the restart")
    parser.add_argument("--with-only", action="store_true", help="only the restart with lazymesh")
    parser.add_argument("--wait", type=float, default=5, help="clustermesh-sync-timeout, in seconds")
    parser.add_argument("--tunnel", action="store_true", help="VXLAN between the nodes instead of routes")
    parser.add_argument("--option", action="append", default=[], help="another option for cilium-agent")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--logs", type=Path, help="keep the agents' logs in this directory")
    options = parser.parse_args()
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.absolute().parent}")
    if options.check_arguments:  # before the half hour of building
        parser.exit()
    return options


@contextlib.contextmanager
def beating(lab: Lab) -> Iterator[None]:
    """Write the heartbeat of cluster b: an agent gives up a peer without one for two minutes."""
    stop = threading.Event()
    store = Store(lab.node_a, ETCD_PORT)

    def beat() -> None:
        while not stop.wait(HEARTBEAT_EVERY_S):
            store.put_many({"cilium/.heartbeat": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})

    thread = threading.Thread(target=beat, name="heartbeat of cluster b", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        store.close()


@contextlib.contextmanager
def keeping_logs(lab: Lab, cilium: RealCilium, directory: Path | None) -> Iterator[None]:
    """Keep copies of the logs, which are deleted with the lab."""
    try:
        yield
    finally:
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            for path in (cilium.log_path, lab.directory / "agent.log"):
                if path.exists():
                    (directory / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())


# The scenarios.


def compare_with_stand_in(report: Report, lab: Lab, cilium: RealCilium) -> None:
    """Compare what the stand-in would have written with what is in the agent's map."""
    world = World(CiliumSettings())
    world.learn_node_a(lab.pods)
    # The identity of the pods' labels is random, within the range of cluster a.
    mine = cilium.entries()[lab.pods[0].ipv4].identity
    report.check(mine >> 16 == 1, "the pods' identity is in the range of cluster a", mine)
    for pod in lab.pods:
        world.own |= {one: world.own[one]._replace(identity=mine) for one in (pod.ipv4, pod.ipv6)}
    world.learn_node(RemoteNode())
    world.pods.update({one: pod_record(one, 131_073, {}) for one in addresses(PUSHED)})
    expected = {
        pack_key(prefix): pack_value(cilium.layout, record, NODE_A)
        for prefix, record in world.listing()
        if record is not None
    }
    real = cilium.dump()
    missing = sorted(unpack_key(key) for key in expected.keys() - real.keys())
    more = {unpack_key(key): tuple(unpack_value(real[key])) for key in real.keys() - expected.keys()}
    differ = {
        unpack_key(key): (tuple(unpack_value(expected[key])), tuple(unpack_value(real[key])))
        for key in expected.keys() & real.keys()
        if expected[key] != real[key]
    }
    report.check(
        not (missing or more or differ),
        "the map is byte for byte what the stand-in would have written",
        {"missing": missing, "more": more, "differ": differ}
        if missing or more or differ
        else f"{len(real)} entries",
    )
    listing = json.loads(cilium.dbg("bpf", "ipcache", "list", "-o", "json"))
    report.check(
        len(listing) == len(real), "cilium-dbg lists what we read of the map", f"{len(listing)} entries"
    )


def without_lazymesh(report: Report, lab: Lab, cilium: RealCilium) -> None:
    """Without lazymesh, a pod that the agent does not know cannot be reached."""
    known, unknown = remote_address(0), remote_address(UNKNOWN)
    lab.publish(unknown, space="ondemand")
    pod = lab.pods[0].namespace
    denied = cilium.drops()
    seen = probe(pod, Probe(tcp=(known, unknown), udp=(known,), timeout=1.5, echoes=1))
    report.check(seen[0].ok and seen[2].ok, "without lazymesh: a pod that the agent knows is reached")
    report.check(not seen[1].ok, "without lazymesh: a pod that it does not know is not", seen[1].error)
    report.check(cilium.drops() > denied, "its policy denied that", f"{cilium.drops() - denied} packets")


def with_lazymesh(report: Report, lab: Lab, cilium: RealCilium) -> None:
    """First connections, ownership, reloads, a takeover; then our agent ends and leaves its pins."""
    before = cilium.dump()
    with beside(lab) as agent:
        is_at_home(report, lab, cilium)
        first_connections(report, lab, cilium, agent)
        is_polite(report, cilium, before)
        stays_first(report, lab, cilium)
        is_taken_over(report, lab, cilium)
        report.note("programs at the pod, in order", chain(lab, lab.pods[0].interface))
        for words in (["status"], ["check", *checked(lab)]):
            done = lab.cli(*words, check=False)
            print(f"\n$ lazymesh {words[0]}\n{done.stdout}{done.stderr}", flush=True)
            report.check(done.returncode == 0, f"lazymesh {words[0]} reports no problem", done.returncode)


def is_at_home(report: Report, lab: Lab, cilium: RealCilium) -> None:
    """--datapath auto has found Cilium's map, and our programs are first on the hooks."""
    shown = status(lab)
    ipcache = shown["datapath"]["ipcache"]
    report.check(
        [one["id"] for one in ipcache["maps"]] == [cilium.map_id],
        "--datapath auto works in the map behind Cilium's pin",
        ipcache["maps"],
    )
    for device in (*(pod.interface for pod in lab.pods), "eth0"):
        names = chain(lab, device)
        report.check(
            len(names) > 1 and names[0].startswith("lm_"), f"first on {device}", " then ".join(names)
        )
    report.check(shown["wrong"] == [], "status reports no problem", shown["wrong"])


def first_connections(report: Report, lab: Lab, cilium: RealCilium, agent: AgentProcess) -> None:
    """To pods that the agent does not know: the first packet arrives, and the policy still applies."""
    numbers = range(UNKNOWN + 1, UNKNOWN + 1 + 40)
    tcp = tuple(remote_address(n, 6 if n % 2 else 4) for n in numbers)
    udp = tuple(remote_address(n + 100, 6 if n % 2 else 4) for n in numbers)
    lab.publish_many((*tcp, *udp), space="ondemand")
    denied, pod = cilium.drops(), lab.pods[0].namespace
    seen = probe(pod, Probe(tcp=tcp, udp=udp, stagger=0.02))
    for protocol in ("tcp", "udp"):
        times = sorted(one.first_ms for one in seen if one.protocol == protocol and one.first_ms is not None)
        lost = sum(one.lost for one in seen if one.protocol == protocol)
        report.check(
            len(times) == 40 and lost == 0 and times[-1] < 900,
            f"first packets to 40 pods unknown to the agent arrive, {protocol}",
            f"{len(times)} of 40, p50 {statistics.median(times):.2f} ms, worst {times[-1]:.2f} ms"
            if times
            else 0,
        )
        if times:
            report.note(
                f"first packet {protocol}, ms",
                [round(one, 2) for one in (statistics.median(times), times[-1])],
            )
    held = [
        line
        for line in agent.get("/metrics").splitlines()
        if line.startswith(("lazymesh_held", "lazymesh_hold"))
    ]
    report.note("held packets", [line for line in held if not line.endswith(" 0.0")])
    report.check(cilium.drops() == denied, "the policy denied none of them", cilium.drops() - denied)
    report.check(metric(agent, "lazymesh_entries_owned") == 80, "lazymesh owns 80 entries")
    other = remote_address(UNKNOWN + 300)
    lab.publish(other, OTHER_IDENTITY, space="ondemand")
    refused = probe(pod, Probe(tcp=(other,), timeout=1.5))[0]
    report.check(
        not refused.ok and cilium.entries()[other].identity == OTHER_IDENTITY and cilium.drops() > denied,
        "a pod that the policy denies is still denied, by its own identity",
        f"identity {cilium.entries()[other].identity}, {cilium.drops() - denied} packets",
    )


def is_polite(report: Report, cilium: RealCilium, before: dict[bytes, bytes]) -> None:
    """Existing entries are unchanged, new ones have our tag, and cilium-dbg reads them all."""
    now = cilium.dump()
    report.check(
        all(now.get(key) == value for key, value in before.items()), "Cilium's entries are unchanged"
    )
    fresh = {key: value for key, value in now.items() if key not in before}
    report.check(
        len(fresh) == 81 and all(value[20:22] == _TAG for value in fresh.values()),
        "lazymesh's entries have its tag",
        len(fresh),
    )
    address = remote_address(UNKNOWN + 2)
    theirs = cilium.dbg("bpf", "ipcache", "get", address).strip()
    report.check(
        "identity=131073" in theirs and "hastunnel" in theirs, "cilium-dbg reads lazymesh's entry", theirs
    )


def stays_first(report: Report, lab: Lab, cilium: RealCilium) -> None:
    """After endpoints are regenerated our program is first, and the next unknown pod is reached."""
    for one in cilium.endpoints():
        cilium.dbg("endpoint", "regenerate", str(one["id"]))
    cilium.wait_regenerated()
    names = chain(lab, lab.pods[0].interface)
    peer = remote_address(UNKNOWN + 310)
    lab.publish(peer, space="ondemand")
    seen = probe(lab.pods[0].namespace, Probe(tcp=(peer,)))[0]
    report.check(
        names[0].startswith("lm_"), "after a regeneration lazymesh's program is first", " then ".join(names)
    )
    report.check(
        seen.ok and (seen.first_ms or 0) < 900, "and the next first connection succeeds", seen.first_ms
    )


def is_taken_over(report: Report, lab: Lab, cilium: RealCilium) -> None:
    """The agent learns of a pod that we resolved: its entry takes precedence, and we neither change nor remove it."""
    peer = remote_address(UNKNOWN + 320)
    lab.publish(peer, space="ondemand")
    seen = probe(lab.pods[0].namespace, Probe(tcp=(peer,)))[0]
    key = pack_key(peer)
    report.check(seen.ok and cilium.dump()[key][20:22] == _TAG, "an entry of lazymesh")
    lab.publish(peer)
    wait_until(lambda: cilium.dump()[key][20:22] == b"\0\0", what="the agent overwrites our entry")
    lab.withdraw(peer, space="ondemand")
    time.sleep(1)
    report.check(
        cilium.dump().get(key, b"")[20:22] == b"\0\0",
        "an entry that the agent has overwritten stays the agent's",
    )
    lab.withdraw(peer)
    wait_until(lambda: key not in cilium.dump(), what="the agent deletes its entry")
    report.check(True, "and the agent deletes it with its record")


def uninstalled(report: Report, lab: Lab, cilium: RealCilium) -> None:
    """Nothing of lazymesh is left, and nothing of Cilium is missing."""
    ours = sum(value[20:22] == _TAG for value in cilium.dump().values())
    theirs = {key: value for key, value in cilium.dump().items() if value[20:22] != _TAG}
    done = lab.cli("uninstall", check=False)
    report.check(done.returncode == 0, "uninstall", f"{ours} entries; {(done.stdout + done.stderr).strip()}")
    report.check(cilium.dump() == theirs, "the map is as it was without lazymesh", f"{len(theirs)} entries")
    for device in (*(pod.interface for pod in lab.pods), "eth0"):
        names = chain(lab, device)
        report.check(
            bool(names) and all(name.startswith("cil_") for name in names),
            f"only Cilium's programs are on {device}",
            names,
        )


def restarts(report: Report, lab: Lab, cilium: RealCilium, endpoints: int, *, compare: bool) -> None:
    """Restart with a large mesh, under established flows and new connections, without and with lazymesh."""
    peers = addresses(endpoints)
    say(f"publishing {endpoints:,} remote pods")
    lab.publish_many(peers)
    wait_until(lambda: cilium.remote().get("num-endpoints", 0) >= endpoints, 600, "the agent knows them all")
    if compare:
        say("restart without lazymesh")
        report_restart(report, "without", *restart_under_traffic(lab, cilium, peers))
    with beside(lab, "--cleanup") as agent:
        say("restart with lazymesh")
        fates, times = restart_under_traffic(lab, cilium, peers)
        shown = status(lab)["datapath"]["ipcache"]
        report_restart(report, "with", fates, times)
        report.check(
            fates.lost == 0, "a restart of the agent with lazymesh loses nothing", f"{fates.lost} packets"
        )
        known = {pack_key(one) for one in peers}
        over = sum(key in known and value[20:22] == _TAG for key, value in cilium.dump().items())
        report.check(over == 0, "no entry of lazymesh is in place of one of the agent", over)
        report.note("new map noticed after, ms", shown["noticedMs"])
        report.note("carried over", shown["lent"])
        report.note("misses", packets(agent, "missed"))
        wait_until(lambda: len(status(lab)["datapath"]["ipcache"]["maps"]) == 1, 60, "one map is left")
        # A problem of misses that were answered late is still reported for some seconds.
        settled = _within(60, lambda: status(lab)["wrong"] == [])
        report.check(settled, "status reports no problem after the restart", status(lab)["wrong"])
    report.check(
        not any(value[20:22] == _TAG for value in cilium.dump().values()),
        "--cleanup leaves no entry of lazymesh",
    )


def restart_under_traffic(
    lab: Lab, cilium: RealCilium, peers: Sequence[str]
) -> tuple[Fates, dict[str, float]]:
    """Restart the agent under 50 flows and new connections; return fates, and the seconds until each step."""
    in_order = sorted(peers)
    flows = in_order[:: max(1, len(in_order) // 50)][:50]
    fresh = in_order[:: max(1, len(in_order) // 997)]
    with Sender(lab.pods[0].namespace, Pulse(flows, fresh, fresh_every_s=0.02)) as sender:
        time.sleep(2)
        boot = cilium.restart()
        try:
            for step in (PINNED, SWITCHED, FILLED):
                boot.wait(step, 600)
                say(f"{step} after {boot.times[step]:.1f} s")
            cilium.wait_regenerated()
        finally:
            boot.close()
        time.sleep(2)
        return sender.stop(), boot.times


def report_restart(report: Report, side: str, fates: Fates, times: dict[str, float]) -> None:
    """Record the figures of one restart."""
    lost = [at for at, took in (*fates.flows, *fates.fresh) if took is None]
    report.note(f"{side}: steps, s", {name: round(at, 1) for name, at in times.items()})
    report.note(
        f"{side}: packets of established flows lost",
        f"{sum(took is None for _, took in fates.flows)} of {len(fates.flows)}",
    )
    report.note(
        f"{side}: new connections that lost their SYN",
        f"{sum(took is None for _, took in fates.fresh)} of {len(fates.fresh)}",
    )
    report.note(
        f"{side}: from the first lost packet to the last, s", round(max(lost) - min(lost), 2) if lost else 0
    )


# Helpers.


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Return whether something becomes true within this number of seconds."""
    with contextlib.suppress(TimeoutError):
        return bool(wait_until(holds, seconds))
    return False


@contextlib.contextmanager
def beside(lab: Lab, *more: str) -> Iterator[AgentProcess]:
    """Run our agent, which must detect by itself that there is a Cilium."""
    with launched(lab, *options(lab, datapath="auto", policy=None), *more) as agent:
        agent.wait_ready()
        yield agent


def checked(lab: Lab) -> list[str]:
    """Return the options of ``lazymesh check`` on this node."""
    return ["--clustermesh-config", str(lab.config), "--interface", "lxc+"]


def chain(lab: Lab, device: str) -> list[str]:
    """Return the names of the programs at a device's ingress, in the order in which they run."""
    return [program_info_by_id(one).name for one in lab.node_a.call(tcx.tcx_programs, device)]


if __name__ == "__main__":
    sys.exit(main())
