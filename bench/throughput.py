"""Bulk TCP and 64-byte UDP from a pod to a pod of another cluster: with the program, and from a pod without it.

The two pods take turns of a second; what arrives at the other node is counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Part, Row
from bench.stage import fresh, running
from tests.support.lab import Lab
from tests.support.node import missed_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.lab import Pod
    from tests.support.namespaces import Namespace

ROUNDS, SECONDS, PORT = 10, 1.0, 5_201
LEAST = 0.97
_SINK = """
import socket, threading
def drain(sock):
    room = bytearray(1 << 20)
    while sock.recv_into(room): pass
server = socket.create_server(("", {port}))
print("ready", flush=True)
while True:
    threading.Thread(target=drain, args=(server.accept()[0],), daemon=True).start()
"""
_TCP = """
import socket, time
sock = socket.create_connection(("{ip}", {port}))
data = bytes(1 << 20)
end = time.monotonic() + {seconds}
while time.monotonic() < end: sock.sendall(data)
"""
_UDP = """
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("{ip}", 9))
data, end = bytes(64), time.monotonic() + {seconds}
while time.monotonic() < end:
    for _ in range(1000):
        try: sock.send(data)
        except ConnectionRefusedError: pass
"""


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    took: dict[str, list[float]] = {
        f"{who}_{what}": [] for what in ("mpps", "gbps") for who in ("bare", "lazymesh")
    }
    with Lab(pods=2) as lab, running(lab, interface="lxc0", uplink=None, policy=None):
        (ip,) = fresh(1)
        lab.publish(ip)
        missed_until(lab, ip, 131_073)
        words = {"ip": ip, "port": PORT, "seconds": SECONDS}
        sink = lab.node_b.popen(*_python(_SINK.format(**words)), stdout=subprocess.PIPE)
        assert sink.stdout
        sink.stdout.readline()
        say(f"{ROUNDS} rounds of {SECONDS:g} s each, TCP and UDP, with and without the program")
        for number in range(ROUNDS):
            pods = [("lazymesh", lab.pods[0]), ("bare", lab.pods[1])]
            for who, pod in pods if number % 2 else reversed(pods):  # so that going first is no advantage
                took[f"{who}_gbps"].append(_arrived(lab.node_b, pod, _TCP.format(**words))["bytes"] * 8 / 1e9)
                took[f"{who}_mpps"].append(_arrived(lab.node_b, pod, _UDP.format(**words))["packets"] / 1e6)
        sink.kill()
        sink.communicate()
    figures: dict[str, Any] = {name: round(statistics.median(values), 4) for name, values in took.items()}
    for what in ("mpps", "gbps"):
        figures[f"share_{what}"] = round(figures[f"lazymesh_{what}"] / figures[f"bare_{what}"], 4)
    return Part(figures, rows(figures), took)


def _arrived(node: Namespace, pod: Pod, code: str) -> dict[str, float]:
    """Run a sender in a pod; return the bytes and packets per second that arrived at the other node."""
    before, began = node.call(_received), time.monotonic()
    process = pod.namespace.popen(*_python(code))
    if process.wait():
        raise RuntimeError("the sender failed; see its output above")
    took, after = time.monotonic() - began, node.call(_received)
    return {name: (after[name] - before[name]) / took for name in before}


def _received() -> dict[str, int]:
    (line,) = (
        line
        for line in Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()
        if "eth0:" in line
    )
    numbers = line.partition(":")[2].split()
    return {"bytes": int(numbers[0]), "packets": int(numbers[1])}


def _python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def rows(figures: dict[str, Any]) -> list[Row]:
    """Return the comparisons; the budget is of the rate without the program by the rate with it."""
    return [
        Row(
            f"{words}: rate without the program by rate with it", f"{figures[f'lazymesh_{what}']:.3g} {unit}",
            f"bare {figures[f'bare_{what}']:.3g} {unit}",
            figures[f"bare_{what}"] / figures[f"lazymesh_{what}"], 1 / LEAST,
        )
        for words, what, unit in (("TCP", "gbps", "Gbit/s"), ("64-byte UDP", "mpps", "Mpps"))
    ]  # fmt: skip
