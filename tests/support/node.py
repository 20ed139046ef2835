"""Looks at a running node from outside: its map through bpftool, its metrics, its stream of misses, its kernel.

Byte layouts and metric names are spelled out here: what is compared with the program must not come from it.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import json
import os
import re
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support import tcx
from tests.support.bpfobject import program_info_by_id
from tests.support.etcd import wait_until
from tests.support.lab import ETCD_PORT, METRICS_PORT, AgentProcess
from tests.support.traffic import PORT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.support.lab import Lab
    from tests.support.namespaces import Namespace


@dataclass(frozen=True)
class MapEntry:
    """One entry of the ipcache, decoded from its bytes as cilium-formats 1.2 and 1.3 have them."""

    identity: int
    endpoint: str | None
    encrypt_key: int
    flags: int


def options(lab: Lab, **changes: str | None) -> list[str]:
    """Return the usual options of the lab's agent with some changed; None leaves one out."""
    usual = {
        "datapath": "standalone",
        "interface": "lxc+",
        "uplink": "eth0",
        "clustermesh_config": str(lab.config),
        "cluster_name": "a",
        "cluster_id": "1",
        "policy": str(lab.policy),
        "bpffs": str(lab.bpffs),
        "socket": str(lab.socket),
        "metrics_address": f"127.0.0.1:{METRICS_PORT}",
    }
    chosen = (usual | changes).items()
    return [word for name, value in chosen if value is not None for word in (_flag(name), value)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def launched(lab: Lab, *argv: str, env: Mapping[str, str] | None = None) -> Iterator[AgentProcess]:
    """Start an agent with exactly these options, not waiting for it; stopped at the end."""
    agent = AgentProcess(lab.node_a, list(argv), lab.directory / "agent.log", env)
    try:
        yield agent
    finally:
        agent.stop()


@contextlib.contextmanager
def beside_cilium(lab: Lab, *argv: str, **changes: str | None) -> Iterator[AgentProcess]:
    """Run an agent beside the stand-in for Cilium until the end of the block; it leaves nothing behind."""
    words = options(lab, **{"datapath": "cilium", "policy": None, **changes})
    with launched(lab, *words, "--cleanup", *argv) as agent:
        agent.wait_ready()
        yield agent


def dump(pin: Path) -> dict[bytes, bytes]:
    """Return a map's keys and values as bpftool reads them from its pin."""
    argv = ["bpftool", "--json", "map", "dump", "pinned", pin]
    rows = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout or "[]")
    # An element that was removed after its key had been read has {"error": "No such file or directory"} for a value.
    gone = {"error": os.strerror(errno.ENOENT)}
    return {_bytes(row["key"]): _bytes(row["value"]) for row in rows if row.get("value", gone) != gone}


def raw_entries(lab: Lab, name: str = "lm_ipcache") -> dict[bytes, bytes]:
    """Return the same of a map of ours."""
    return dump(lab.bpffs / "lazymesh" / name)


def is_alive(pid: int) -> bool:
    """Tell whether a process has not ended, files closed and all, whether or not anybody has asked how."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return False


def memory_mib(pid: int, what: str = "VmRSS") -> float:
    """Return what /proc/PID/status says of a process' memory, in MiB."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text("ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the kernel does not tell {what} of process {pid}")
    return int(found[1]) / 1024


def entries(lab: Lab) -> dict[str, MapEntry]:
    """Return the ipcache's entries by address (single addresses) or prefix."""
    return {_prefix(key): _entry(value) for key, value in raw_entries(lab).items()}


def identity_of(lab: Lab, ip: str) -> int | None:
    """Return the identity of an address's own entry, None if it has none."""
    found = entries(lab).get(ip)
    return found.identity if found else None


def wait_identity(lab: Lab, ip: str, identity: int | None, timeout_s: float = 5) -> float:
    """Wait until the address's entry has this identity (None: is gone); return how many seconds it took."""
    began = time.monotonic()
    what = f"{ip} with identity {identity}"
    wait_until(lambda: identity_of(lab, ip) == identity, timeout_s, what)
    return time.monotonic() - began


def missed_until(lab: Lab, ip: str, identity: int, timeout_s: float = 5) -> None:
    """Send packets to the address until its entry has this identity: the agent may not know its cluster yet."""

    def look() -> bool:
        send_udp(lab.pods[0].namespace, ip, 1)
        return identity_of(lab, ip) == identity

    wait_until(look, timeout_s, f"{ip} resolved with identity {identity}")


def insert_foreign(lab: Lab, key: bytes, value: bytes) -> None:
    """Write an entry as somebody else would."""
    _bpftool_words(lab, "update", ["key", "hex", *_hex(key), "value", "hex", *_hex(value)])


def delete_entry(lab: Lab, key: bytes) -> None:
    """Delete an entry as somebody else would."""
    _bpftool_words(lab, "delete", ["key", "hex", *_hex(key)])


def pack_key(ip: str, bits: int | None = None) -> bytes:
    """Return the key of an address, or of a prefix."""
    address = ipaddress.ip_address(ip)
    family = 1 if address.version == 4 else 2
    length = 32 + (address.max_prefixlen if bits is None else bits)
    return struct.pack("=IHBB16s", length, 0, 0, family, address.packed)


def pack_value(identity: int, endpoint: str = "192.168.100.2", flags: int = 2) -> bytes:
    """Return the value of an entry with an IPv4 endpoint."""
    return struct.pack("=I16sHBB", identity, socket.inet_aton(endpoint), 0, 0, flags)


def metric(agent: AgentProcess, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels; 0 if there is none."""
    total = 0.0
    for line in agent.get("/metrics").splitlines():
        found = re.fullmatch(r"([a-zA-Z_:0-9]+)(?:\{(.*)\})? (\S+)", line)
        if found and found[1] == name:
            has = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
            if labels.items() <= has.items():
                total += float(found[3])
    return total


def assert_unharmed(agent: AgentProcess) -> None:
    """Insist that the agent is alive, and that nothing has happened to it which nobody expected."""
    assert agent.process.poll() is None, agent.log
    assert metric(agent, "lazymesh_unexpected_errors_total") == 0
    assert metric(agent, "lazymesh_cluster_link_crashes_total") == 0
    assert "Traceback" not in agent.log


SIGNAL_OUTCOMES = ("signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost")
"""What becomes of a packet that missed."""


def packets(agent: AgentProcess, counter: str, direction: str = "egress") -> int:
    """Return one of the kernel's packet counters, by its name in struct lm_counters."""
    if counter in SIGNAL_OUTCOMES:
        return int(metric(agent, "lazymesh_missed_packets_total", direction=direction, outcome=counter))
    if counter == "missed_drop":
        return int(metric(agent, "lazymesh_missed_packets_dropped_total", direction=direction))
    name = "lazymesh_policy_packets_total" if counter.startswith("policy_") else "lazymesh_packets_total"
    return int(metric(agent, name, direction=direction, verdict=counter.removeprefix("policy_")))


def child_of(agent: int) -> int | None:
    """Return the process id of an agent's holder, None if it has none."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (path / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
            if int(stat[1]) == agent and b"lazymesh.roles.holder" in (path / "cmdline").read_bytes():
                return int(path.name)
    return None


def http_status(node: Namespace, port: int, path: str) -> tuple[int, str]:
    """Fetch a page from loopback of a node; any status is an answer."""

    def fetch() -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    return node.call(fetch)


def have_wait(lab: Lab, first: Sequence[str], then: Sequence[str]) -> None:
    """While a cluster's etcd stands still: have the first eight misses take all its reads, and the others wait."""
    # By one socket: a busy machine has to be done with it before the first read has timed out.
    with lab.pods[0].namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number, ip in enumerate(first):
            sock.sendto(b"", (ip, 9))
            wait_until(
                lambda number=number: status(lab)["queue"]["inFlight"] == number + 1, 4, "a read in flight"
            )
        for ip in then:
            sock.sendto(b"", (ip, 9))
    wait_until(lambda: status(lab)["queue"]["waiting"] == len(then), 4, "misses that wait")


def etcd_calls(lab: Lab, method: str) -> int:
    """Return how many calls of a gRPC method (Txn, Range, Watch) the cluster's etcd has answered."""
    _, text = http_status(lab.node_a, ETCD_PORT, "/metrics")
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in text.splitlines()
        if line.startswith("grpc_server_handled_total{") and f'grpc_method="{method}"' in line
    )


def connect(
    namespace: Namespace, ip: str, timeout_s: float = 3.0, source: str | None = None, port: int = PORT
) -> float | None:
    """Open a TCP connection and echo one byte; return the seconds it took, None if it did not come about."""

    def attempt() -> float | None:
        began = time.monotonic()
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            if source:
                sock.bind((source, 0))
            try:
                sock.connect((ip, port))
                took = time.monotonic() - began
                sock.sendall(b"x")
                return took if sock.recv(1) == b"x" else None
            except OSError:
                return None

    return namespace.call(attempt)


def send_udp(namespace: Namespace, ip: str, count: int, port: int = 9) -> None:
    """Send datagrams and expect no answer."""

    def attempt() -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            for _ in range(count):
                # A "port unreachable" to an earlier datagram is reported here.
                with contextlib.suppress(ConnectionRefusedError):
                    sock.sendto(b"x", (ip, port))

    namespace.call(attempt)


class Talk:
    """A TCP connection to an echo server that stays open while other things happen."""

    def __init__(self, namespace: Namespace, ip: str, source: str | None = None) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._sock: socket.socket = namespace.call(socket.socket, family, socket.SOCK_STREAM)
        self._sock.settimeout(5)
        if source:
            self._sock.bind((source, 0))
        self._sock.connect((ip, PORT))

    def say(self, timeout_s: float = 5) -> bool:
        """Echo one byte; tell whether it came back in time."""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.sendall(b"x")
            return self._sock.recv(1) == b"x"
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()


class Misses:
    """The agent's stream of outcomes, read from its socket; up once entered."""

    def __init__(self, path: Path) -> None:
        self._rest = b""
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(10)
        self._sock.connect(str(path))
        self._sock.sendall(b'{"ask": "misses"}\n')
        assert self.line() == {"streaming": "misses"}

    def line(self, timeout_s: float = 10) -> dict[str, Any]:
        """Return the next outcome; TimeoutError when none comes."""
        self._sock.settimeout(timeout_s)
        while b"\n" not in self._rest:
            data = self._sock.recv(65536)
            if not data:
                raise RuntimeError("the agent closed the stream")
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\n")
        event: dict[str, Any] = json.loads(text)
        return event

    def next(self, address: str) -> dict[str, Any]:
        """Return the next outcome of this address; others are passed over."""
        while (event := self.line())["address"] != address:
            pass
        return event

    def provoke(self, namespace: Namespace, address: str) -> dict[str, Any]:
        """Send packets until the address has an outcome: it may have been signalled a moment ago."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            send_udp(namespace, address, 1)
            with contextlib.suppress(TimeoutError):
                while (event := self.line(0.1))["address"] != address:
                    pass
                return event
        raise TimeoutError(f"no outcome of {address}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()


def status(lab: Lab) -> dict[str, Any]:
    """Ask the agent how it is, over its socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(lab.socket))
        sock.sendall(b'{"ask": "status"}\n')
        with sock.makefile("r", encoding="utf-8") as lines:
            answer: dict[str, Any] = json.loads(lines.readline())
            return answer


def wait_well(lab: Lab, timeout_s: float) -> None:
    """Wait until nothing is wrong; TimeoutError names what still is."""
    wait_until(
        lambda: status(lab)["wrong"] == [],
        timeout_s,
        lambda: f"the end of: {'; '.join(status(lab)['wrong'])}",
    )


def cluster(lab: Lab, name: str) -> dict[str, Any]:
    """Return what the agent says of one cluster; empty if it does not know it."""
    return next((one for one in status(lab)["clusters"] if one["name"] == name), {})


def programs(namespace: Namespace, interface: str) -> list[str]:
    """Return the names of our programs on an interface's ingress, however attached; none if it is not there."""
    try:
        chain = [program_info_by_id(one).name for one in namespace.call(tcx.tcx_programs, interface)]
    except OSError:
        return []
    shown = namespace.run("tc", "filter", "show", "dev", interface, "ingress", check=False)
    return [name for name in chain if name.startswith("lm_")] + re.findall(r"\blm_\w+", shown)


def filters(namespace: Namespace) -> list[str]:
    """Return a word for every program of ours on an interface and every clsact qdisc in a namespace."""
    found = []
    for link in json.loads(namespace.run("ip", "-json", "link")):
        name = link["ifname"]
        if name.startswith("lm_hold"):
            continue  # the holder's TAP, which goes with the holder
        found += [f"{name}: {program}" for program in programs(namespace, name)]
        if "clsact" in namespace.run("tc", "qdisc", "show", "dev", name):
            found.append(f"{name}: clsact")
    return sorted(set(found))


def pins(lab: Lab) -> list[str]:
    """Return the names of everything pinned in the lab's BPF file system, but for what the kernel puts there."""
    return sorted(path.name for path in lab.bpffs.rglob("*") if path.suffix != ".debug")


def _bpftool_words(lab: Lab, verb: str, words: list[str]) -> None:
    pin = str(lab.bpffs / "lazymesh/lm_ipcache")
    subprocess.run(["bpftool", "map", verb, "pinned", pin, *words], check=True, capture_output=True)


def _bytes(words: list[str]) -> bytes:
    return bytes(int(word, 16) for word in words)


def _hex(data: bytes) -> list[str]:
    return [f"{byte:02x}" for byte in data]


def _prefix(key: bytes) -> str:
    length, _, _, family, address = struct.unpack("=IHBB16s", key)
    size, full = (4, 64) if family == 1 else (16, 160)
    text = str(ipaddress.ip_address(address[:size]))
    return text if length == full else f"{text}/{length - 32}"


def _entry(value: bytes) -> MapEntry:
    identity, endpoint, _, encrypt_key, flags = struct.unpack("=I16sHBB", value)
    size = 16 if flags & 4 else 4
    text = str(ipaddress.ip_address(endpoint[:size])) if any(endpoint) else None
    return MapEntry(identity, text, encrypt_key, flags)
