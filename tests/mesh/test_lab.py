"""The lab itself: pods reach remote pods, etcd speaks Cilium's language, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import namespaces
from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address, sweep
from tests.support.namespaces import Namespace, NamespaceSet
from tests.support.traffic import Probe, probe

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab for the tests that only look at it."""
    with Lab(pods=2) as built:
        yield built


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_every_pod_reaches_remote_pods(lab: Lab, protocol: str, family: int) -> None:
    """Without an agent traffic flows, and answers come from the address that was asked."""
    peers = tuple(remote_address(number, family) for number in (0, 1, 999))
    for pod in lab.pods:
        exchanges = probe(pod.namespace, Probe(**{protocol: peers}, echoes=2))
        assert [exchange.error for exchange in exchanges] == [None] * 3
        assert all(exchange.ok and len(exchange.steady_ms) == 2 for exchange in exchanges)


def test_refused_connection_is_reported(lab: Lab) -> None:
    """A peer that refuses is a result of the client, not its crash; pods of one node reach each other."""
    nobody = lab.pods[1].ipv4
    (exchange,) = probe(lab.pods[0].namespace, Probe(tcp=(nobody,), timeout=0.5))
    assert not exchange.ok
    assert exchange.error == "ConnectionRefusedError"


def test_remote_side_sees_pods_by_their_own_address(lab: Lab) -> None:
    """Native routing: no address is translated on the way."""
    route = json.loads(lab.node_b.run("ip", "-json", "route", "get", lab.pods[0].ipv4))
    assert route[0]["gateway"] == "192.168.100.1"
    assert Path(f"/proc/{os.getpid()}/ns/net").stat().st_ino != lab.node_b.path.stat().st_ino


def test_records_have_ciliums_shape(lab: Lab) -> None:
    """Keys and values are those that a clustermesh-apiserver writes."""
    lab.publish("10.2.0.77", OTHER_IDENTITY)
    lab.publish("fd00:10:2::77", space="ondemand")
    pair = json.loads(lab.store.get("cilium/state/ip/v1/default/10.2.0.77") or "")
    assert (pair["IP"], pair["ID"], pair["HostIP"], pair["Mask"]) == (
        "10.2.0.77",
        OTHER_IDENTITY,
        "192.168.100.2",
        None,
    )
    assert lab.store.get("cilium/state/ip/v1/ondemand/fd00:10:2::77")
    assert json.loads(lab.store.get("cilium/cluster-config/b") or "")["id"] == 2
    node = json.loads(lab.store.get("cilium/state/nodes/v1/b/b-1") or "")
    assert node["IPv4AllocCIDR"] == {"IP": "10.2.0.0", "Mask": "//8AAA=="}
    assert lab.store.get(f"cilium/state/identities/v1/id/{SERVER_IDENTITY}") == (
        "k8s:app=server;k8s:io.cilium.k8s.policy.cluster=b;k8s:io.kubernetes.pod.namespace=default;"
    )
    lab.withdraw("10.2.0.77", "fd00:10:2::77")
    assert lab.store.get("cilium/state/ip/v1/default/10.2.0.77") is None
    assert lab.store.get("cilium/state/ip/v1/ondemand/fd00:10:2::77") is None


def test_many_records_go_out_in_batches(lab: Lab) -> None:
    """More records than one transaction holds arrive, the last one too."""
    ips = [remote_address(number) for number in range(1000, 1300)]
    lab.publish_many(ips)
    assert lab.store.get(f"cilium/state/ip/v1/default/{ips[-1]}")
    lab.withdraw(*ips)
    assert lab.store.get(f"cilium/state/ip/v1/default/{ips[0]}") is None


def test_bpffs_is_private_and_mounted(lab: Lab) -> None:
    """Pins go to a file system of the lab's own, away from the machine's."""
    assert lab.bpffs.is_mount()
    assert lab.bpffs.stat().st_dev != lab.directory.stat().st_dev
    assert not (lab.bpffs / "lazymesh").exists()


def test_teardown_leaves_nothing() -> None:
    """Namespaces, mounts, files and processes go, also a process that the lab did not start itself."""
    with Lab(pods=1) as lab:
        etcd = (lab.directory / "etcd").resolve()
        spaces = [lab.node_a, lab.node_b, lab.pods[0].namespace]
        stray = lab.node_a.popen("sleep", "600")
        wait_until(lambda: stray.pid in lab.node_a.pids(), what="the stray process inside")
    assert stray.wait(5) == -signal.SIGKILL
    assert not any(space.path.exists() for space in spaces)
    assert not lab.directory.exists()
    assert not etcd.exists()
    assert str(lab.directory) not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_lab_leaves_nothing(sent: signal.Signals) -> None:
    """Ctrl-C, or a service manager's SIGTERM, in the middle of it all cleans up the same."""
    child = _lab_in_child()
    try:
        child.send_signal(sent)
        assert child.wait(20) != 0
    finally:
        _end(child)
    assert _left_of(child.pid) == []


def test_next_lab_sweeps_what_a_killed_one_left() -> None:
    """SIGKILL leaves everything in place; the next start removes it, with the processes inside."""
    child = _lab_in_child()
    _end(child)
    assert _left_of(child.pid)
    sweep()
    assert _left_of(child.pid) == []


def test_namespace_call_brings_errors_home() -> None:
    """What a function raises inside a namespace is raised outside, and the caller stays where it was."""
    before = _where_am_i()
    with NamespaceSet(["one"]) as spaces:
        assert spaces["one"].call(_where_am_i) != before
        with pytest.raises(ZeroDivisionError):
            spaces["one"].call(lambda: 1 // 0)
    assert _where_am_i() == before


def test_failed_ip_line_is_named() -> None:
    """A batch that stops says at which line."""
    with NamespaceSet(["one"]) as spaces, pytest.raises(RuntimeError, match="ip link set nowhere up"):
        spaces["one"].ip(["link set lo up", "link set nowhere up"])


def _where_am_i() -> Path:
    return Path("/proc/thread-self/ns/net").readlink()


_CHILD = """
import time
from tests.support.lab import Lab
from tests.support.namespaces import tidy_signals
with tidy_signals(), Lab(pods=1):
    print("up", flush=True)
    time.sleep(600)
"""


def _lab_in_child() -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdout
    assert child.stdout.readline() == "up\n"
    return child


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout
    child.stdout.close()


def _left_of(pid: int) -> list[str]:
    names = [path.name for path in namespaces.RUN_DIR.glob(f"lm-{pid}-*")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"/lm-{pid}-" in line]
    processes = [str(inside) for name in names for inside in Namespace(name).pids()]
    return names + mounts + processes
