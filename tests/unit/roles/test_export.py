"""What is read at a scrape: from the parts, once for each series."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core.audit import AuditLog
from lazymesh.core.model import Direction
from lazymesh.kvstore.config import parse_config
from lazymesh.metrics import Metrics
from lazymesh.roles.export import Sources, certificates_of, export
from lazymesh.roles.link import LinkConfig
from tests.support.etcd import Authority

if TYPE_CHECKING:
    from pathlib import Path

PACKETS = {"hit": 7, "not_mesh": 0, "not_parsed": 0, "missed": 2, "missed_again": 0, "missed_drop": 1}


def link(state: str, owner: str | None = None, owner_problem: str | None = None) -> Any:
    """Return what is read of a link; owner: it is behind a cache of that cluster's."""
    return SimpleNamespace(
        state=state,
        config=SimpleNamespace(names_owner=owner is not None, stores=()),
        owner=SimpleNamespace(problem=owner_problem),
        refused_total={"node": 2, "identity": 0},
        client=SimpleNamespace(info=SimpleNamespace(reconnects=4)),
    )


def samples(name: str, *, shadow: int | None = None) -> dict[tuple[str, ...], float]:
    """Export fakes, and return what a scrape of one metric shows, by label values."""
    links = {"b": link("ready", "b", "no such host"), "c": link("silent")}
    parts = SimpleNamespace(
        holding=SimpleNamespace(answers_dropped=3),
        mesh=SimpleNamespace(links=links, file_errors={"d": "not YAML"}),
        reader=SimpleNamespace(crowded=True),
        resolver=SimpleNamespace(stale={"c": 9}),
        shadow=None if shadow is None else SimpleNamespace(changes_total=shadow),
    )
    status = SimpleNamespace(
        parts=parts,
        packets=lambda direction: PACKETS if direction is Direction.EGRESS else dict.fromkeys(PACKETS, 0),
    )
    sources = Sources(
        cast("Any", status), cast("Any", SimpleNamespace(dropped=4)), AuditLog(forgotten_total=5)
    )
    metrics = Metrics()
    export(metrics, sources)
    found = metrics.registry.restricted_registry([name]).collect()
    return {tuple(each.labels.values()): each.value for family in found for each in family.samples}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lazymesh_hold_answers_dropped_total", 3),
        ("lazymesh_stream_lines_dropped_total", 4),
        ("lazymesh_open_windows_forgotten_total", 5),
    ],
)
def test_what_gets_lost_is_exported(name: str, count: int) -> None:
    """Each is counted where it happens, and read at the scrape."""
    assert samples(name) == {(): count}


def test_each_form_of_a_reading_becomes_samples() -> None:
    """One value; one for each value of the only label; samples with several labels."""
    assert samples("lazymesh_datapath_muted") == {(): 1}
    assert samples("lazymesh_entries_stale") == {("c",): 9}
    assert samples("lazymesh_store_reconnects_total") == {("b",): 4, ("c",): 4}
    assert samples("lazymesh_records_refused_total") == {
        ("b", "node"): 2, ("b", "identity"): 0, ("c", "node"): 2, ("c", "identity"): 0,
    }  # fmt: skip


def test_packets_are_told_apart_by_direction() -> None:
    """By what the lookup said, and those dropped."""
    shown = samples("lazymesh_packets_total")
    assert (shown["egress", "hit"], shown["egress", "missed"], shown["ingress", "hit"]) == (7, 2, 0)
    assert samples("lazymesh_missed_packets_dropped_total") == {("egress",): 1, ("ingress",): 0}


def test_cluster_without_a_link_is_not_ready() -> None:
    """Its file was refused from the start. Only those behind a cache have an owner's store."""
    assert samples("lazymesh_cluster_ready") == {("b",): 1, ("c",): 0, ("d",): 0}
    assert samples("lazymesh_owner_ready") == {("b",): 0}


def test_shadow_changes_exist_in_shadow_mode_only() -> None:
    """Otherwise there is nothing that was not written."""
    assert samples("lazymesh_shadow_changes_total") == {}
    assert samples("lazymesh_shadow_changes_total", shadow=6) == {(): 6}


def test_each_client_certificate_is_shown_once_however_many_clusters_have_it(tmp_path: Path) -> None:
    """Behind a cache that is all of them; what cannot be read has no series, and status says why."""
    pair = Authority(tmp_path / "ca").issue("remote")
    words = "endpoints: ['https://{host}:1']\ncert-file: {cert}\nkey-file: {key}\n"
    stores = [
        parse_config(words.format(host=host, cert=cert, key=pair.key), str(tmp_path / host))
        for host, cert in (("b", pair.cert), ("c", pair.cert), ("d", tmp_path / "none"))
    ]
    links = {
        "b": SimpleNamespace(config=LinkConfig("b", stores[0])),
        "c": SimpleNamespace(config=LinkConfig("c", stores[1], stores[2])),
    }
    (((path,), end),) = certificates_of(cast("Any", links))
    assert path == str(pair.cert)
    assert 0 < end - time.time() < 3 * 86_400
