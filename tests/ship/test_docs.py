"""What docs/ has people type works: every shell block marked as runnable is run, as it stands.

``sh run``: in a checkout. ``sh run node``: on a node whose agent runs. ``sh run node stopped``: with the agent killed.
``sh run pods``: where kubectl reaches the agents' pods.
Those that need a cluster are run by test_cluster_life.py and test_cluster_api.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.docs import ROOT, blocks, marks, shell
from tests.support.etcd import wait_until
from tests.support.lab import Lab, remote_address
from tests.support.node import connect, is_alive, pins

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A node that has resolved something."""
    with Lab(pods=1) as built:
        peer = remote_address(0)
        built.publish(peer)
        built.start_agent()
        assert connect(built.pods[0].namespace, peer) is not None
        yield built


def test_no_block_is_marked_for_nobody() -> None:
    """Each mark is run by a test of this file, or of those with a cluster."""
    here = {"run", "run node", "run node stopped", "run pods"}
    theirs = {
        f"run {mark}" for mark in ("cluster", "helm", "kubectl", "keep", "no hooks", "aliases", "monitoring")
    }
    assert marks() == here | theirs


@pytest.mark.needs("helm")
@pytest.mark.parametrize(("page", "text"), blocks("run"))
def test_block_of_a_checkout_runs(image: Path, page: str, text: str) -> None:
    """From a clone, with Helm and nothing else at hand."""
    shell(text, [], {"PATH": f"{ROOT / '.cache' / 'bin'}:{os.environ['PATH']}"})


KUBECTL = """#!/bin/sh
case " $* " in
*" get pods "*" custom-columns="*) printf 'good node-a\\nbad node-b\\ngone node-c\\n' ;;
*" get pods "*) echo pod/good ;;
*" logs pod/good ") echo '{}' ;;
*" exec bad -- lazymesh status ") printf 'lazymesh 1\\nWRONG: it rains\\n' && exit 1 ;;
*" exec gone "*) echo 'error: unable to upgrade connection' >&2 && exit 1 ;;
*" exec good -- "* | *" exec pod/good -- "*) while [ "$1" != -- ]; do shift; done && shift && exec "$@" ;;
*) exit 64 ;;
esac
"""
"""Of three pods the lab's agent is the one that is good."""


def test_blocks_for_pods_find_who_is_wrong_and_gather_what_there_is(lab: Lab, tmp_path: Path) -> None:
    """With a kubectl that runs on the lab's node what is to be run in its pod."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    env = node_environment(lab) | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    wrong, gather = (shell(text, lab.node_a.command(), env).splitlines() for _, text in blocks("run pods"))
    assert wrong == ["node-b, bad", "WRONG: it rains", "node-c, gone", "error: unable to upgrade connection"]
    report = Path(gather[-1])
    names = {"status", "check", "audit", "ipcache", "log"}
    found = {name: json.loads((report / f"{name}.json").read_text()) for name in names}
    assert found["status"]["wrong"] == []
    assert found["check"]["ok"]
    assert f"{remote_address(0)}/32" in found["ipcache"]
    assert "lazymesh_entries_owned 1.0" in (report / "metrics.txt").read_text().splitlines()
    assert {path.name for path in report.iterdir()} == {"metrics.txt", *(f"{name}.json" for name in names)}


def node_environment(lab: Lab) -> dict[str, str]:
    """Return what tells commands on the lab's node where its things are."""
    return {
        "LAZYMESH_BPFFS": str(lab.bpffs),
        "LAZYMESH_SOCKET": str(lab.socket),
        "LAZYMESH_CLUSTERMESH_CONFIG": str(lab.config),
    }


def test_blocks_of_a_node_run(lab: Lab) -> None:
    """Where the agent runs; and, last, where it has died."""
    env = node_environment(lab)
    with_agent, without = blocks("run node"), blocks("run node stopped")
    assert with_agent
    assert without
    for _, text in with_agent:
        shell(text, lab.node_a.command(), env)
    agent = next(
        pid for pid in lab.node_a.pids() if b"\0agent\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    subprocess.run(["kill", "-KILL", str(agent)], check=True)
    wait_until(lambda: not is_alive(agent), what="the agent's end")  # it holds its pins until then
    for _, text in without:
        shell(text, lab.node_a.command(), env)
    assert pins(lab) == []
