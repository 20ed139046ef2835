"""Entries whose cluster is silent: served for a while, marked, and gone or confirmed in the end."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import connect, entries, metric, send_udp, status, wait_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

KEPT, REUSED = remote_address(0), remote_address(1)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab for each story: their etcd is broken."""
    with Lab(pods=1) as built:
        built.publish_many([KEPT, REUSED])
        yield built


def silent(lab: Lab, *words: str) -> AgentProcess:
    """Start an agent, have both pods resolved, and take the etcd away."""
    agent = lab.start_agent(*words)
    for ip in (KEPT, REUSED):
        send_udp(lab.pods[0].namespace, ip, 1)
        wait_identity(lab, ip, SERVER_IDENTITY)
    assert metric(agent, "lazymesh_entries_stale") == 0
    lab.etcd.kill()
    wait_until(lambda: status(lab)["entries"]["stale"] == 2, 10, "stale entries")
    return agent


def owners(lab: Lab) -> dict[str, str]:
    """Return what the table says whose the entries are."""
    lines = lab.cli("ipcache", "list").stdout.splitlines()[1:]
    return {line.split("/", 1)[0]: line.rsplit("  ", 1)[1] for line in lines}


def test_stale_entries_are_marked_everywhere_until_their_cluster_confirms_them(lab: Lab) -> None:
    """Served meanwhile; what was re-used while nobody looked is corrected when the cluster is back."""
    agent = silent(lab)
    assert connect(lab.pods[0].namespace, KEPT) is not None
    assert metric(agent, "lazymesh_entries_stale", target_cluster="b") == 2
    assert owners(lab) == {KEPT: "lazymesh (stale)", REUSED: "lazymesh (stale)"}
    listed = json.loads(lab.cli("ipcache", "list", "-o", "json").stdout)
    assert listed[f"{KEPT}/32"]["stale"] is True
    assert "2 entries are kept as last known" in lab.cli("status", check=False).stdout
    lab.etcd.start()
    lab.publish(REUSED, OTHER_IDENTITY)
    wait_identity(lab, REUSED, OTHER_IDENTITY, 40)
    wait_until(lambda: status(lab)["entries"]["stale"] == 0, 10, "confirmed entries")
    assert owners(lab) == {KEPT: "lazymesh", REUSED: "lazymesh"}
    assert metric(agent, "lazymesh_entries_stale") == 0


def test_stale_entries_go_when_their_time_is_over(lab: Lab) -> None:
    """Not before, and for good: by now the address may be somebody else's."""
    agent = silent(lab, "--stale-limit", "3s")
    began = time.monotonic()
    assert len(entries(lab)) == 2
    wait_until(lambda: not entries(lab), 10, "no entry left")
    assert time.monotonic() - began > 1.5
    assert metric(agent, "lazymesh_entries_evicted_total", reason="expired") == 2
    assert connect(lab.pods[0].namespace, KEPT, 0.3) is None
