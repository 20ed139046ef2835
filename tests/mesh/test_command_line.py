"""The command line against a running agent: shapes of the output, exit codes, and every way to set an option."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import METRICS_PORT, OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import (
    Misses,
    filters,
    http_status,
    insert_foreign,
    launched,
    missed_until,
    options,
    pack_key,
    pack_value,
    packets,
    pins,
    send_udp,
    status,
    wait_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

METRICS = {
    "cilium_ipcache_miss_signal_total",
    "cilium_ipcache_miss_resolution_duration_seconds_bucket",
    "cilium_ipcache_miss_resolution_duration_seconds_count",
    "cilium_ipcache_miss_resolution_errors_total",
    "lazymesh_resolutions_total",
    "lazymesh_entries_evicted_total",
    "lazymesh_entries_owned",
    "lazymesh_datapath_muted",
    "lazymesh_packets_total",
    "lazymesh_missed_packets_total",
    "lazymesh_missed_packets_dropped_total",
    "lazymesh_policy_packets_total",
    "lazymesh_addresses",
    "lazymesh_queue_addresses",
    "lazymesh_interfaces_attached",
    "lazymesh_interface_attach_errors_total",
    "lazymesh_signals_invalid_total",
    "lazymesh_stream_lines_dropped_total",
    "lazymesh_cluster_ready",
    "lazymesh_store_reconnects_total",
    "lazymesh_records_refused_total",
    "lazymesh_unexpected_errors_total",
}
SERVER, PEER6, ABSENT = remote_address(0), remote_address(1, 6), remote_address(2)


class Following:
    """A command that goes on until it is told to stop; its lines are read as they come."""

    def __init__(self, lab: Lab, *argv: str) -> None:
        words = lab.node_a.command(sys.executable, "-m", "lazymesh", *argv)
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(
            target=lambda: [self._lines.put(line) for line in self.process.stdout]
        )
        self._reader.start()

    def line(self, timeout_s: float = 10) -> str | None:
        """Return the next line, None if none comes in time."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self._reader.join()
        self.process.communicate()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab with two known peers, one absent one, and an entry of somebody else."""
    with Lab(pods=1) as built:
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent that has resolved something."""
    running = lab.start_agent()
    lab.publish(SERVER)
    lab.publish(PEER6, OTHER_IDENTITY)
    missed_until(lab, SERVER, SERVER_IDENTITY)
    missed_until(lab, PEER6, OTHER_IDENTITY)
    insert_foreign(lab, pack_key("10.99.0.0", 16), pack_value(2, flags=2))
    # Something of every kind has happened: no counter is missing for want of a first time.
    withdrawn = remote_address(40)
    lab.publish(withdrawn)
    missed_until(lab, withdrawn, SERVER_IDENTITY)
    lab.withdraw(withdrawn)
    wait_identity(lab, withdrawn, None)
    with Misses(lab.socket) as misses:
        assert misses.provoke(lab.pods[0].namespace, ABSENT)["outcome"] == "absent"
    yield running
    running.stop()


EXPECTED = {
    f"{SERVER}/32": {
        "identity": SERVER_IDENTITY,
        "tunnelEndpoint": "192.168.100.2",
        "encryptKey": 0,
        "flags": ["hastunnel"],
        "owner": "lazymesh",
    },
    f"{PEER6}/128": {
        "identity": OTHER_IDENTITY,
        "tunnelEndpoint": "192.168.100.2",
        "encryptKey": 0,
        "flags": ["hastunnel"],
        "owner": "lazymesh",
    },
    "10.99.0.0/16": {
        "identity": 2,
        "tunnelEndpoint": "192.168.100.2",
        "encryptKey": 0,
        "flags": ["hastunnel"],
        "owner": "other",
    },
}


def test_ipcache_list_has_ciliums_columns_and_an_owner(lab: Lab, agent: AgentProcess) -> None:
    """The object is keyed by prefix; the table is for people."""
    assert json.loads(lab.cli("ipcache", "list", "-o", "json").stdout).items() >= EXPECTED.items()
    header, *rows = lab.cli("ipcache", "list").stdout.splitlines()
    assert re.split(r" {2,}", header) == ["IP PREFIX/ADDRESS", "IDENTITY", "OWNER"]
    line = f"identity={SERVER_IDENTITY} encryptkey=0 tunnelendpoint=192.168.100.2 flags=hastunnel"
    assert [f"{SERVER}/32", line, "lazymesh"] in [re.split(r" {2,}", row) for row in rows]


def test_ipcache_get_is_the_longest_prefix_answer(lab: Lab, agent: AgentProcess) -> None:
    """An address inside somebody's prefix gets that entry; none at all exits 1."""
    found = json.loads(lab.cli("ipcache", "get", SERVER, "-o", "json").stdout)
    assert found == {"address": SERVER, **EXPECTED[f"{SERVER}/32"]}
    inside = json.loads(lab.cli("ipcache", "get", "10.99.7.7", "-o", "json").stdout)
    assert (inside["identity"], inside["owner"]) == (2, "other")
    assert f"{SERVER} maps to identity" in lab.cli("ipcache", "get", SERVER).stdout
    none = lab.cli("ipcache", "get", ABSENT, check=False)
    assert (none.returncode, none.stdout) == (1, f"{ABSENT} does not map to any identity\n")
    silent = lab.cli("ipcache", "get", ABSENT, "-o", "json", check=False)
    assert (silent.returncode, silent.stdout) == (1, "")
    bad = lab.cli("ipcache", "get", "10.2.0", check=False)
    assert (bad.returncode, bad.stderr) == (2, "lazymesh: '10.2.0' is not an IP address\n")


@pytest.mark.parametrize("words", [("list",), ("list", "-o", "json"), ("get", SERVER)], ids=" ".join)
def test_ipcache_that_nobody_reads(lab: Lab, agent: AgentProcess, words: tuple[str, ...]) -> None:
    """141 for a reader that has left, 3 for output that has no place; neither is an answer."""
    command = lab.node_a.command(
        sys.executable, "-m", "lazymesh", "ipcache", *words, "--bpffs", str(lab.bpffs)
    )
    for into, expected in (("| true; exit ${PIPESTATUS[0]}", (141, 0)), (">/dev/full", (3, 1))):
        script = f"{shlex.join(command)} {into}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == expected, done.stderr


def test_ipcache_watch_tells_additions_changes_and_deletions(lab: Lab, agent: AgentProcess) -> None:
    """One object a line, as it happens; Ctrl-C ends it."""
    ip = remote_address(20)
    words = ("ipcache", "watch", "-o", "json", "--interval", "0.05", "--bpffs", str(lab.bpffs))
    with Following(lab, *words) as watcher:
        # It says nothing at its start: change things until it tells of one.
        for identity in itertools.cycle((SERVER_IDENTITY, OTHER_IDENTITY)):
            lab.publish(ip, identity)
            missed_until(lab, ip, identity)
            if watcher.line(0.2):
                break
        while watcher.line(0.3):
            pass
        expected = EXPECTED[f"{SERVER}/32"] | {"prefix": f"{ip}/32"}
        for other in (identity ^ 3, identity):  # the two are neighbours
            lab.publish(ip, other)
            changed = json.loads(watcher.line() or "")
            assert changed == {"event": "changed"} | expected | {"identity": other}
        lab.withdraw(ip)
        deleted = json.loads(watcher.line() or "")
        assert deleted == {"event": "deleted"} | expected | {"identity": identity}
        lab.publish(ip)
        assert json.loads(watcher.line() or "") == {"event": "added"} | expected
        watcher.process.send_signal(signal.SIGINT)
        assert watcher.process.wait(5) == 130


def test_misses_are_streamed_with_their_outcome(lab: Lab, agent: AgentProcess) -> None:
    """One object a line with address, cluster, outcome, reason and latency."""
    known, unknown = remote_address(30), remote_address(31)
    lab.publish(known)
    with Misses(lab.socket), Following(lab, "misses", "-o", "json", "--socket", str(lab.socket)) as stream:
        events: dict[str, dict[str, Any]] = {}
        for number in range(300, 400):  # until it listens
            send_udp(lab.pods[0].namespace, remote_address(number), 1)
            if stream.line(0.1):
                break
        for ip in (known, unknown):
            send_udp(lab.pods[0].namespace, ip, 1)
        while not events.keys() >= {known, unknown}:
            event = json.loads(stream.line() or "")
            events[event["address"]] = event
        stream.process.send_signal(signal.SIGINT)
        assert stream.process.wait(5) == 130
    assert {"address", "cluster", "outcome", "reason", "latency_ms"} <= events[known].keys()
    assert (events[known]["outcome"], events[known]["reason"], events[known]["cluster"]) == (
        "installed",
        None,
        "b",
    )
    assert 0 < events[known]["latency_ms"] < 1000
    assert (events[unknown]["outcome"], events[unknown]["reason"]) == ("absent", "not-found")


def test_misses_table_and_the_agents_end() -> None:
    """The table has a header; when the agent goes, the stream says so and exits 3."""
    with Lab(pods=1) as other:
        agent = other.start_agent()
        with Following(other, "misses", "--socket", str(other.socket)) as stream:
            assert (stream.line() or "").split() == ["ADDRESS", "CLUSTER", "OUTCOME", "REASON", "LATENCY"]
            agent.stop()
            assert stream.process.wait(10) == 3
            assert "the agent" in stream.process.stderr.read()


def test_status_is_one_screen_and_one_object(lab: Lab, agent: AgentProcess) -> None:
    """Exit 0 while nothing is wrong; the object has what the screen shows."""
    done = lab.cli("status")
    for words in ("Datapath:", "Interfaces: eth0 (ingress), lxc0 (egress)", "Entries:", "Nothing is wrong."):
        assert words in done.stdout
    answer = json.loads(lab.cli("status", "--output", "json").stdout)
    assert answer["ready"] is True
    assert answer["cluster"] == "a"
    assert answer["entries"]["owned"] >= 2
    assert answer["wrong"] == []
    (cluster,) = answer["clusters"]
    assert (cluster["name"], cluster["id"], cluster["state"]) == ("b", 2, "ready")
    assert (cluster["nodes"], cluster["identities"], cluster["breaker"]) == (1, 2, "closed")
    assert cluster["endpoint"] == lab.etcd.url
    assert answer["datapath"]["packets"]["egress"]["hit"] >= 0


def test_check_finds_everything_in_order(lab: Lab, agent: AgentProcess) -> None:
    """A line each, exit 0; as JSON one object."""
    done = lab.cli("check", "--clustermesh-config", str(lab.config))
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok", "WARN")) for line in lines), done.stdout
    for need in ("root", "kernel", "headers", "bcc", "bpffs", "map layout", "cluster b"):
        assert any(need in line for line in lines), need
    report = json.loads(lab.cli("check", "--clustermesh-config", str(lab.config), "-o", "json").stdout)
    assert report["ok"] is True
    assert {finding["verdict"] for finding in report["findings"]} <= {"ok", "warn"}


def test_metrics_have_their_names_and_no_address(lab: Lab, agent: AgentProcess) -> None:
    """The CFP's names where it has them, ours otherwise; no label holds an address."""
    text = agent.get("/metrics")
    names = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert names >= METRICS, METRICS - names
    assert not re.search(r'="\d+\.\d+\.\d+\.\d+', text)
    assert not re.search(r'="[0-9a-f]+:[0-9a-f:]+"', text)
    assert 'le="+Inf",outcome="installed"' in text
    code, body = http_status(lab.node_a, METRICS_PORT, "/nowhere")
    assert (code, "try /metrics" in body) == (404, True)
    assert http_status(lab.node_a, METRICS_PORT, "/healthz") == (200, "ok\n")
    assert http_status(lab.node_a, METRICS_PORT, "/readyz") == (200, "ok\n")


def test_http_server_survives_strange_clients(lab: Lab, agent: AgentProcess) -> None:
    """Half a request, no request, garbage and a very long line cost nobody anything."""

    def bother() -> None:
        for words in (
            b"",
            b"GET",
            b"\x00\xff\r\n\r\n",
            b"GET /" + b"x" * 100_000,
            b"GET /metrics HTTP/1.1\r\n",
        ):
            with socket.create_connection(("127.0.0.1", METRICS_PORT), timeout=5) as sock:
                sock.sendall(words)

    lab.node_a.call(bother)
    assert http_status(lab.node_a, METRICS_PORT, "/healthz") == (200, "ok\n")
    assert json.loads(lab.cli("status", "-o", "json").stdout)["ready"] is True


def test_control_socket_survives_strange_clients(lab: Lab, agent: AgentProcess) -> None:
    """Questions that make no sense get an answer that says so."""
    for words in (b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"ask": "moon"}\n', b"[" * 60_000 + b"\n"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(lab.socket))
            sock.sendall(words)
            assert b"ask for misses, " in sock.recv(4096)
    assert (lab.socket.stat().st_mode & 0o777) == 0o600
    assert status(lab)["ready"] is True


def test_readyz_waits_for_the_clusters() -> None:
    """503 with the reason, then 200; an unreachable cluster does not keep the node unready for ever."""
    with Lab(pods=1) as other:
        other.etcd.freeze()
        try:
            with launched(other, *options(other)) as agent:
                answers: list[tuple[int, str]] = []

                def asked() -> bool:
                    try:
                        answers.append(http_status(other.node_a, METRICS_PORT, "/readyz"))
                    except OSError:
                        return False
                    return answers[-1][0] == 503 and "b" in answers[-1][1]

                wait_until(asked, 20, "unready")
                assert answers[-1] == (503, "clusters not listed yet: b\n")
                assert http_status(other.node_a, METRICS_PORT, "/healthz")[0] == 200
                other.etcd.thaw()
                agent.wait_ready()
        finally:
            other.etcd.thaw()


def test_every_option_by_environment() -> None:
    """LAZYMESH_<OPTION>; several values are separated by blanks; the command line wins."""
    with Lab(pods=1) as other:
        env = {
            "LAZYMESH_DATAPATH": "standalone",
            "LAZYMESH_INTERFACE": "nosuch+ lxc+",
            "LAZYMESH_UPLINK": "eth0",
            "LAZYMESH_CLUSTERMESH_CONFIG": str(other.config),
            "LAZYMESH_REMOTE_CONFIG": str(other.no_config),
            "LAZYMESH_CLUSTER_NAME": "from-the-environment",
            "LAZYMESH_CLUSTER_ID": "7",
            "LAZYMESH_MAX_CONNECTED_CLUSTERS": "255",
            "LAZYMESH_MESH_CIDR": "b=10.77.0.0/16 b=fd77::/64",
            "LAZYMESH_CLUSTER_REGION": "eu-1",
            "LAZYMESH_ON_MISS": "drop",
            "LAZYMESH_POLICY": str(other.policy),
            "LAZYMESH_SIGNAL_RATE": "100",
            "LAZYMESH_SHADOW": "false",
            "LAZYMESH_CLEANUP": "true",
            "LAZYMESH_BPFFS": str(other.bpffs),
            "LAZYMESH_SOCKET": str(other.socket),
            "LAZYMESH_METRICS_ADDRESS": f"127.0.0.1:{METRICS_PORT}",
            "LAZYMESH_LOG_FORMAT": "json",
            "LAZYMESH_LOG_LEVEL": "debug",
        }
        with launched(other, "--cluster-name", "a", env=env) as agent:
            agent.wait_ready()
            answer = status(other)
            assert (answer["cluster"], answer["datapath"]["onMiss"]) == ("a", "drop")
            assert answer["datapath"]["interfaces"] == {"eth0": "ingress", "lxc0": "egress"}
            assert answer["datapath"]["policy"] == str(other.policy)
            lines = [json.loads(line) for line in agent.log.splitlines()]
            assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
            assert agent.stop() == 0
        assert (pins(other), filters(other.node_a)) == ([], [])


def test_every_option_by_config_file() -> None:
    """The same in YAML: lists, and words."""
    with Lab(pods=1) as other:
        path = other.directory / "agent.yaml"
        path.write_text(
            f"""\
datapath: standalone
interface: [lxc+]
uplink: eth0
clustermesh-config: {other.config}
remote-config: {other.no_config}
cluster-name: a
cluster-id: 1
max-connected-clusters: 255
mesh-cidr:
  - b=10.77.0.0/16
cluster-region: eu-1
on-miss: drop
policy: {other.policy}
signal-rate: 100
shadow: true
cleanup: yes
bpffs: {other.bpffs}
socket: {other.socket}
metrics-address: 127.0.0.1:{METRICS_PORT}
log-format: json
log-level: info
"""
        )
        with launched(other, "--config", str(path)) as agent:
            agent.wait_ready()
            answer = status(other)
            assert answer["cluster"] == "a"
            assert answer["datapath"]["shadow"]
            assert answer["datapath"]["interfaces"] == {"eth0": "ingress", "lxc0": "egress"}
            assert packets(agent, "missed") == 0
            assert agent.stop() == 0
        assert (pins(other), filters(other.node_a)) == ([], [])


def ready(lab: Lab) -> bool:
    """Tell whether the agent answers on its socket that it is; it may not listen there yet."""
    with contextlib.suppress(OSError):
        return bool(status(lab)["ready"])
    return False


def test_metrics_can_be_switched_off_in_yaml_too() -> None:
    """YAML would take a bare off for a boolean."""
    with Lab(pods=1) as other:
        path = other.directory / "agent.yaml"
        path.write_text("metrics-address: off\n")
        with launched(other, *options(other, metrics_address=None), "--config", str(path)):
            wait_until(lambda: ready(other), 20, "ready")
            with pytest.raises(OSError, match="refused"):
                http_status(other.node_a, METRICS_PORT, "/metrics")


def test_ipcache_works_with_no_agent_running() -> None:
    """The map outlives the agent, and so do the commands that read it."""
    with Lab(pods=1) as other:
        agent = other.start_agent()
        other.publish(SERVER)
        missed_until(other, SERVER, SERVER_IDENTITY)
        agent.stop()
        prefix = f"{SERVER}/32"
        assert json.loads(other.cli("ipcache", "list", "-o", "json").stdout) == {prefix: EXPECTED[prefix]}
        assert other.cli("ipcache", "get", SERVER).returncode == 0
        assert other.cli("status", check=False).returncode == 3


@pytest.fixture
def compiling() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An agent in a process group of its own that has begun, and its compiler, which is stopped until then."""
    with Lab(pods=1) as other:
        words = [sys.executable, "-m", "lazymesh", "agent", *options(other, program_cache="off"), "--cleanup"]
        with subprocess.Popen(
            other.node_a.command(*words), stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as agent:
            try:
                wait_until(lambda: compiler_of(agent.pid) is not None, 10, "the compiler")
                compiler = compiler_of(agent.pid)
                assert compiler is not None
                os.kill(compiler, signal.SIGSTOP)
                wait_until((other.bpffs / "lazymesh/lm_config").exists, 10, "the agent at work")
                yield agent, compiler
            finally:
                agent.kill()
        assert (pins(other), filters(other.node_a)) == ([], [])


def stopped_well(agent: subprocess.Popen[str], compiler: int) -> None:
    """Insist that it ends as after any other stop, once what it was about to load is done."""
    os.kill(compiler, signal.SIGCONT)
    _, log = agent.communicate(timeout=60)
    assert (agent.returncode, " stopped " in log) == (0, True), log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_for_the_process_group_while_the_datapath_is_compiled(
    compiling: tuple[subprocess.Popen[str], int], number: signal.Signals
) -> None:
    """As Ctrl-C at a terminal is one: the compiler is not in that group."""
    agent, compiler = compiling
    os.killpg(agent.pid, number)
    stopped_well(agent, compiler)


def test_stop_for_every_process_while_the_datapath_is_compiled(
    compiling: tuple[subprocess.Popen[str], int],
) -> None:
    """As systemd stops a service: the compiler hears it, and ends with the agent all the same."""
    agent, compiler = compiling
    agent.terminate()
    os.kill(compiler, signal.SIGTERM)
    stopped_well(agent, compiler)


def compiler_of(agent: int) -> int | None:
    """Return the process id of an agent's compiler, once that ignores being told to stop."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (path / "status").read_text(encoding="ascii")
            found = dict(line.split(":\t", 1) for line in text.splitlines())
            ignored = int(found["SigIgn"], 16) >> (signal.SIGTERM - 1) & 1
            of_agent = int(found["PPid"]) == agent
            if of_agent and ignored and b"lazymesh.datapath.compiler" in (path / "cmdline").read_bytes():
                return int(path.name)
    return None
