"""The DaemonSet's pod as the manifests describe it: its options, mounts, identity and capabilities, run by crun."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.cilium import Cilium
from tests.support.container import Container, Mount, filtered, in_lab, manifest, needed_capabilities
from tests.support.lab import METRICS_PORT, POLICY, AgentProcess, Lab, remote_address
from tests.support.namespaces import stop_process
from tests.support.node import connect, filters, metric, options, pins

if TYPE_CHECKING:
    from collections.abc import Iterator

NEEDED = needed_capabilities()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab for each pod."""
    with Lab(pods=1) as built:
        yield built


def sources(lab: Lab) -> dict[str, str]:
    """Return where the volumes of the DaemonSet are in a lab."""
    for name in ("run", "kvstoremesh", "options"):
        (lab.directory / name).mkdir()
    return {
        "bpffs": str(lab.bpffs),
        "tun": "/dev/net/tun",
        "run": str(lab.directory / "run"),
        "config": str(lab.directory / "options"),
        "clustermesh": str(lab.config),
        "kvstoremesh": str(lab.directory / "kvstoremesh"),
    }


def pod(
    lab: Lab, image: Path, capabilities: tuple[str, ...] | None, **changes: Any
) -> tuple[Container, list[str]]:
    """Return the agent's container of the plain manifests, and its arguments; changes: of its options."""
    where = sources(lab)
    given = yaml.safe_load(manifest("ConfigMap")["data"]["config.yaml"])
    lab_options = {
        "datapath": "standalone",
        "interface": ["lxc+"],
        "uplink": ["eth0"],
        "policy": "/etc/lazymesh/policy.yaml",
        "cluster-name": "a",
        "cluster-id": 1,
        "metrics-address": f"127.0.0.1:{METRICS_PORT}",
    }
    config = {key: value for key, value in (given | lab_options | changes).items() if value is not None}
    Path(where["config"], "config.yaml").write_text(yaml.safe_dump(config))
    Path(where["config"], "policy.yaml").write_text(POLICY)
    (spec,) = manifest("DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert spec["securityContext"]["readOnlyRootFilesystem"]
    mounts = tuple(
        Mount(where[each["name"]], each["mountPath"], each.get("readOnly", False))
        for each in spec["volumeMounts"]
        if each["name"] != "tmp"
    )
    env = {each["name"]: each["value"] for each in spec.get("env", ())}
    env["LAZYMESH_DATAPATH"] = config["datapath"]  # the environment has the last word
    return Container(image, lab.directory / "containers", capabilities, mounts, env), spec["args"]


def start(lab: Lab, container: Container, args: list[str]) -> AgentProcess:
    """Start the pod's container on node a."""
    assert args[0] == "agent"
    return AgentProcess(lab.node_a, args[1:], lab.directory / "agent.log", None, container.command)


@pytest.mark.parametrize("capabilities", [None, NEEDED], ids=["privileged", "minimal"])
def test_pod_resolves_holds_and_leaves(lab: Lab, image: Path, capabilities: tuple[str, ...] | None) -> None:
    """A first connection is held and made; the word to uninstall is heeded; nothing is left."""
    agent = start(lab, *pod(lab, image, capabilities))
    try:
        agent.wait_ready()
        assert filtered(lab.node_a) is (capabilities is not None)
        peer = remote_address(0)
        lab.publish(peer)
        took = connect(lab.pods[0].namespace, peer)
        assert took is not None
        assert took < 0.9, "its SYN was held, not lost"
        assert metric(agent, "lazymesh_held_packets_total", outcome="held") >= 1
        status = json.loads(
            lab.cli("status", "--socket", str(lab.directory / "run/agent.sock"), "-o", "json").stdout
        )
        assert status["wrong"] == []
        (lab.directory / "options" / "uninstall").write_text("true")
        with pytest.raises(RuntimeError, match="marked to be uninstalled"):
            agent.get("/readyz")
        assert connect(lab.pods[0].namespace, peer) is not None, "until it is stopped it works on"
    finally:
        status_code = stop_process(agent.process)
    assert status_code == 0
    assert pins(lab) == []
    assert filters(lab.node_a) == []


SPLICE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.vmsplice(os.pipe()[1], None, 0, 0), os.strerror(ctypes.get_errno()))
"""
"""Makes a system call that needs no capability, and that the list refuses which Container gives."""


@pytest.mark.parametrize(
    ("capabilities", "answer"),
    [(None, "0 Success\n"), (NEEDED, "-1 Operation not permitted\n")],
    ids=["privileged", "minimal"],
)
def test_pod_without_privileges_has_the_default_system_calls(
    image: Path, tmp_path: Path, capabilities: tuple[str, ...] | None, answer: str
) -> None:
    """The filter under which the other tests run is one, and it refuses."""
    done = Container(image, tmp_path, capabilities, program="/usr/bin/python3").run("-c", SPLICE)
    assert (done.stdout, done.stderr) == (answer, "")


@pytest.mark.parametrize("without", NEEDED)
def test_check_names_the_capability_that_is_missing(lab: Lab, image: Path, without: str) -> None:
    """And so does the agent, in one line, before it does anything."""
    container = in_lab(lab, image, tuple(name for name in NEEDED if name != without))
    done = container.run("check", "--bpffs", str(lab.bpffs), "-o", "json")
    findings = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert done.returncode == 3
    assert findings["capabilities"]["verdict"] == "fail"
    assert findings["capabilities"]["text"].startswith(f"missing CAP_{without}, ")
    done = subprocess.run(
        lab.node_a.command(*container.command("agent", *options(lab))),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 3
    assert done.stderr.splitlines() == [f"lazymesh: {findings['capabilities']['text']}"]
    assert pins(lab) == []


@pytest.mark.needs("clang")
def test_minimal_set_is_enough_beside_cilium(lab: Lab, image: Path) -> None:
    """Its maps and programs are opened by number."""
    with Cilium(lab):
        lab.program = in_lab(lab, image, NEEDED).command
        words = options(lab, datapath="cilium", policy=None)
        agent = AgentProcess(
            lab.node_a, [*words, "--cleanup"], lab.directory / "agent.log", None, lab.program
        )
        try:
            agent.wait_ready()
            peer = remote_address(1)
            lab.publish(peer)
            assert connect(lab.pods[0].namespace, peer) is not None
            assert metric(agent, "lazymesh_entries_owned") == 1
        finally:
            assert stop_process(agent.process) == 0
