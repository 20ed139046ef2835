"""What docs/ has people type works: every shell block marked as runnable is run, as it stands.

``sh run``: in a checkout. ``sh run node``: on a node whose agent runs. ``sh run node stopped``: with the agent killed.
Those that need a cluster are run by test_cluster_life.py and test_cluster_api.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.docs import blocks, marks, shell
from tests.support.etcd import wait_until
from tests.support.lab import Lab, remote_address
from tests.support.node import connect, is_alive, pins

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
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
    here = {"run", "run node", "run node stopped"}
    theirs = {f"run {mark}" for mark in ("cluster", "helm", "kubectl", "keep", "no hooks", "aliases")}
    assert marks() == here | theirs


@pytest.mark.needs("helm")
@pytest.mark.parametrize(("page", "text"), blocks("run"))
def test_block_of_a_checkout_runs(image: Path, page: str, text: str) -> None:
    """From a clone, with nothing else at hand."""
    shell(text, [], {})


def test_blocks_of_a_node_run(lab: Lab) -> None:
    """Where the agent runs; and, last, where it has died."""
    env = {
        "LAZYMESH_BPFFS": str(lab.bpffs),
        "LAZYMESH_SOCKET": str(lab.socket),
        "LAZYMESH_CLUSTERMESH_CONFIG": str(lab.config),
    }
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
