"""What people are told: readiness, what is wrong, one cluster's line."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from lazymesh.core.model import Direction, Reason
from lazymesh.errors import DatapathError
from lazymesh.roles.status import Parts, Starting, Status

if TYPE_CHECKING:
    from lazymesh.settings import AgentSettings


def link(
    state: str,
    *,
    tried: bool = True,
    problem: str | None = None,
    read_problem: str | None = None,
    last_error: str | None = None,
    owner_problem: str | None = None,
) -> Any:
    """Return what status looks at of a link; last_error: there is no connection, for this reason."""
    endpoint = None if last_error else "e"
    info = SimpleNamespace(
        endpoint=endpoint, cluster_id=0xAB, revision=3, reconnects=1, last_error=last_error
    )
    return SimpleNamespace(
        state=state, tried=tried, problem=problem, sizes=(1, 2),
        owner=SimpleNamespace(problem=owner_problem),
        addresses=SimpleNamespace(problem=read_problem, watched_keys=3, watched_ranges=1),
        client=SimpleNamespace(info=info),
    )  # fmt: skip


def status(links: dict[str, Any], *, attached: bool = True, **mesh: Any) -> Status:
    """Return a status over fakes."""
    event = asyncio.Event()
    if attached:
        event.set()
    parts = SimpleNamespace(
        settings=SimpleNamespace(
            uninstall_mark=mesh.get("mark"),
            datapath=SimpleNamespace(interfaces=("lxc+",), uplinks=mesh.get("uplinks", ())),
        ),
        attached=event,
        mesh=SimpleNamespace(
            links=links,
            file_errors=mesh.get("file_errors", {}),
            problem=mesh.get("problem"),
            unread=mesh.get("unread"),
            no_cluster=mesh.get("no_cluster"),
            unknown_owners=mesh.get("unknown_owners", set()),
            table=SimpleNamespace(cluster=lambda _: None),
        ),
        follower=SimpleNamespace(
            attached=mesh.get("carried", {"lxc0": Direction.EGRESS}) if attached else {},
            behind=[],
            failed=mesh.get("failed", []),
        ),
        reader=SimpleNamespace(crowded=mesh.get("muted", False)),
        shadow=None,
        holding=SimpleNamespace(state=mesh.get("holding", "on"), problem=None, answers_dropped=3),
        resolver=SimpleNamespace(
            clusters={},
            absent=mesh.get("absent", {}),
            stale=mesh.get("stale", {}),
            admission=SimpleNamespace(share=mesh.get("admitted", 1.0), p99=0.08),
        ),
        ipcaches=SimpleNamespace(problems=lambda: iter(mesh.get("problems", ())), shared=False),
        datapath=SimpleNamespace(
            pins=SimpleNamespace(directory="/bpf", missing=lambda own_ipcache: mesh.get("missing", []))
        ),
    )
    return Status(cast("Parts", parts))


def test_ready_when_attached_and_every_cluster_was_tried() -> None:
    """A cluster that is down does not keep the node unready."""
    assert status({}, attached=False).not_ready() == "programs are not attached yet"
    waiting = {
        "c": link("connecting", tried=False),
        "b": link("connecting", tried=False),
        "d": link("silent"),
    }
    assert status(waiting).not_ready() == "clusters not listed yet: b, c"
    assert status({"b": link("silent"), "c": link("ready")}).not_ready() is None


def test_agent_without_parts_says_what_it_waits_for() -> None:
    """For a moment the programs; Cilium for as long as it takes, which somebody may have to look into."""
    settings = SimpleNamespace(mesh=SimpleNamespace(cluster_name="a"))
    starting = Starting(cast("AgentSettings", settings), time.monotonic() - 7)
    assert (starting.not_ready(), starting.describe()["wrong"]) == ("programs are not attached yet", [])
    starting.wait_for_cilium(Path("/bpf/tc/globals"))
    answer = starting.describe()
    assert (answer["cluster"], answer["ready"], round(answer["uptimeSeconds"])) == ("a", False, 7)
    assert answer["notReady"] == "waiting for Cilium to pin its ipcache in /bpf/tc/globals"
    assert "check that its agent starts on this node" in answer["wrong"][0]
    assert answer["notReady"] in starting.refuse({"ask": "audit"})["error"]


def test_marked_to_be_uninstalled_is_not_ready(tmp_path: Path) -> None:
    """So that whoever announced it sees who has heard; without the file it is as ready as before."""
    mark = tmp_path / "uninstall"
    marked = status({"b": link("ready")}, mark=mark)
    assert marked.not_ready() is None
    mark.write_text("true")
    assert marked.not_ready() == "marked to be uninstalled: it cleans up when it is stopped"
    mark.write_text("false")
    assert marked.not_ready() is None


def test_everything_that_is_wrong_is_a_line() -> None:
    """Nothing wrong, no line."""
    assert list(status({"b": link("ready")})._wrong()) == []
    lines = list(
        status(
            {
                "b": link("silent", problem="gone"),
                "c": link("connecting"),
                "d": link("ready", read_problem="denied", owner_problem="no such host"),
            },
            file_errors={"e": "not YAML"},
            problem="no space",
            unread="cannot read it",
            unknown_owners={"z", "y"},
            muted=True,
            admitted=0.25,
            stale={"b": 7, "id 9": 4},
            absent={Reason.UNKNOWN_IDENTITY: 3, Reason.NOT_FOUND: 5, Reason.MAP_FULL: 7},
            missing=["lm_owned", "lm_ipcache"],
            problems=("two maps",),
            failed=[("lxc7", "no such luck")],
        )._wrong()
    )
    assert lines == [
        "cannot attach to lxc7: no such luck; its misses are not seen",
        "two maps",
        (
            "2 pins are gone from /bpf, lm_owned among them: this agent keeps working, but commands and the next agent"
            " find nothing; restart it to pin them again"
        ),
        (
            "7 addresses have no entry because the ipcache map is full: `lazymesh ipcache list` shows who owns its"
            " entries"
        ),
        "signals are muted: misses arrive faster than they can be resolved",
        (
            "misses are throttled to 25% of --signal-rate: they arrived faster than they could be answered"
            " (99th percentile 80 ms)"
        ),
        (
            "3 addresses are refused because their clusters do not publish their identities, so no policy can"
            " select them: `lazymesh misses` lists them"
        ),
        "the pod CIDRs in force are out of date: no space",
        "clusters are followed by their last known configuration: cannot read it",
        "--mesh-cidr names cluster y, which is not configured: its addresses cannot be resolved",
        "--mesh-cidr names cluster z, which is not configured: its addresses cannot be resolved",
        "cluster b is silent (7 entries are kept as last known): gone",
        "cluster c is connecting: not listed yet",
        "cluster d: the last read failed: denied",
        "cluster d: its own store is not followed: no such host",
        "cluster e: not YAML",
        "4 entries are kept as last known: their cluster (id 9) has not joined since this agent started",
    ]
    assert list(status({}, no_cluster="no cluster")._wrong()) == ["no cluster"]
    assert "not attached to any interface" in next(status({}, attached=False)._wrong())


def test_lines_of_what_is_wrong_are_counted_for_whoever_scrapes() -> None:
    """Also where they cannot all be told: a metric that fails would take all others with it."""
    assert status({"b": link("ready")}).problems() == 0
    several = {"b": link("silent", problem="gone"), "c": link("ready", owner_problem="no such host")}
    assert status(several, muted=True).problems() == 3
    spoiled = status(several, muted=True)

    def fail(**_: object) -> list[str]:
        raise DatapathError("cannot look")

    spoiled.parts.datapath.pins.missing = fail  # type: ignore[method-assign]
    assert spoiled.problems() == 1
    assert status({}, attached=False, no_cluster="no cluster").problems() == 2


def test_direction_that_was_asked_for_and_is_seen_nowhere_is_wrong() -> None:
    """A pattern that matches nothing, or the other's interfaces; an uplink need not be asked for."""
    pod, uplink = {"lxc0": Direction.EGRESS}, {"eth0": Direction.INGRESS}
    assert list(status({}, carried=pod)._wrong()) == []
    assert list(status({}, carried=pod | uplink, uplinks=("eth+",))._wrong()) == []
    (line,) = status({}, carried=pod, uplinks=("nosuch+",))._wrong()
    assert line.startswith("not attached to any uplink: incoming traffic is neither")
    (line,) = status({}, carried=uplink, uplinks=("eth+",))._wrong()
    assert line.startswith("not attached to any pod interface: pods' traffic is neither")


def test_store_that_does_not_come_back_has_its_latest_reason() -> None:
    """The connection was lost, and by now the certificate has expired: that is what has to be put right."""
    silent = link("silent", problem="the connection was lost", last_error="the certificate has expired")
    assert list(status({"b": silent})._wrong()) == ["cluster b is silent: the certificate has expired"]
    assert status({"b": silent})._cluster("b")["problem"] == "the certificate has expired"
    back = link("ready", last_error="the certificate has expired")
    assert list(status({"b": back})._wrong()) == []


def test_line_of_a_cluster_names_its_store() -> None:
    """And a cluster whose file is refused has a line too."""
    shown = status({"b": link("ready")})._cluster("b")
    assert (shown["endpoint"], shown["etcdClusterId"], shown["nodes"], shown["problem"]) == (
        "e",
        "ab",
        1,
        None,
    )
    assert shown["ownerProblem"] is None
    cut_off = status({"b": link("ready", owner_problem="no such host")})._cluster("b")
    assert (cut_off["state"], cut_off["ownerProblem"]) == ("ready", "no such host")
    assert status({"b": link("ready")}, stale={"b": 7, "c": 9})._cluster("b")["staleEntries"] == 7
    refused = status({}, file_errors={"b": "not YAML"})._cluster("b")
    assert (refused["state"], refused["problem"], refused["endpoint"]) == ("refused", "not YAML", None)
