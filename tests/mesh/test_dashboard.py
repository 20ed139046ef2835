"""Dashboard and alerts ask for what a running agent really exports, docs/metrics.md has it: names, labels, values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from lazymesh.core.model import Reason
from lazymesh.metrics import Metrics
from tests.support.cilium import Cilium
from tests.support.lab import Lab
from tests.support.node import beside_cilium

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path(__file__).parents[2] / "deploy" / "chart"
OF_OTHERS = {"kube_daemonset_status_number_unavailable"}
"""From kube-state-metrics."""
OF_PROMETHEUS = {"node", "instance", "pod", "le"}
"""Labels that the PodMonitor or a histogram adds."""

pytestmark = pytest.mark.needs("clang")


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """Scrape an agent that exports everything: beside Cilium, and in shadow mode."""
    with Lab(pods=1) as lab, Cilium(lab), beside_cilium(lab, "--shadow") as agent:
        yield agent.get("/metrics")


METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"
IN_FULL = {
    ("lazymesh_addresses", "state"),
    ("lazymesh_admission_cuts_total", "reason"),
    ("lazymesh_packets_total", "verdict"),
    ("lazymesh_missed_packets_total", "outcome"),
    ("lazymesh_policy_packets_total", "verdict"),
    ("lazymesh_held_packets_total", "outcome"),
    ("lazymesh_released_packets_total", "reason"),
}
"""Labels of which every value is exported from the start."""


def documented() -> dict[str, set[str]]:
    """Return the metrics of docs/metrics.md with their labels."""
    rows = re.findall(r"^\| `((?:lazymesh|cilium)_[a-z_]+)` \|([^|]*)\|", METRICS.read_text(), re.MULTILINE)
    assert len(dict(rows)) == len(rows), "one row for each"
    return {name: set(re.findall(r"`([a-z_]+)`", labels)) for name, labels in rows}


def documented_values() -> dict[tuple[str, str], set[str]]:
    """Return the values of docs/metrics.md by metric and label."""
    found = re.findall(
        r"^### `(\w+)` of `(\w+)`\n(.*?)(?=^#|\Z)", METRICS.read_text(), re.MULTILINE | re.DOTALL
    )
    return {
        (name, label): set(re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)) for label, name, text in found
    }


def queries() -> dict[str, str]:
    """Return every query by the panel or alert that it belongs to."""
    dashboard = json.loads((CHART / "dashboard.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    found["variable node"] = dashboard["templating"]["list"][1]["query"]
    alerts = yaml.safe_load((CHART / "alerts.yaml").read_text())["alerts"]
    return found | {alert["name"]: alert["expr"] for alert in alerts}


def values(page: str) -> dict[str, dict[str, set[str]]]:
    """Return which values each label of each sample has."""
    found: dict[str, dict[str, set[str]]] = {}
    for name in re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE):
        found.setdefault(name, {})
    for name, labels in re.findall(r"^([a-z_]+)\{([^}]*)\} ", page, re.MULTILINE):
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            found.setdefault(name, {}).setdefault(label, set()).add(value)
    # Of what has not happened yet there is no sample: these labels are the program's own.
    metrics = Metrics()
    for metric, name in (
        (metrics.signals, "cilium_ipcache_miss_signal_total"),
        (metrics.errors, "cilium_ipcache_miss_resolution_errors_total"),
        (metrics.outcomes, "lazymesh_resolutions_total"),
        (metrics.evictions, "lazymesh_entries_evicted_total"),
        (metrics.hung_up, "lazymesh_http_connections_dropped_total"),
    ):
        for label in metric._labelnames:
            found.setdefault(name, {}).setdefault(label, set())
    found["cilium_ipcache_miss_resolution_duration_seconds_bucket"] = {"outcome": set(), "le": set()}
    found["cilium_ipcache_miss_resolution_errors_total"]["reason"] |= {reason.value for reason in Reason}
    found["cilium_ipcache_miss_resolution_duration_seconds_bucket"]["outcome"].add("installed")
    return found


@pytest.mark.parametrize("name", sorted(queries()))
def test_query_finds_something(page: str, name: str) -> None:
    """A metric that was renamed leaves no panel empty and no alert silent."""
    query, known = queries()[name], values(page)
    found = re.findall(r"\b((?:lazymesh|cilium|kube)_[a-z_]+)(?:\{([^}]*)\})?", query)
    assert found, query
    for metric, matchers in found:
        if metric in OF_OTHERS:
            continue
        assert metric in known, f"{metric} is not exported"
        for label, words in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', matchers):
            if label in OF_PROMETHEUS:
                continue
            assert label in known[metric], f"{metric} has no label {label}"
            assert set(words.split("|")) <= known[metric][label], f"{metric}: {words}"
        kept_or_not = re.findall(r"\b(?:by|without) \(([^)]*)\)", query)
        for label in {word.strip() for words in kept_or_not for word in words.split(",")}:
            labels = {each for metric, _ in found for each in known.get(metric, {})}
            # Samples that a store or a refused record brings come later; they are labelled by these.
            assert label in labels | OF_PROMETHEUS | {"target_cluster", "kind", "file"}, (
                f"nothing is labelled {label}"
            )


def exported(page: str) -> dict[str, dict[str, set[str]]]:
    """Return what is exported under names of ours, without what the library adds to each."""
    return {
        name: labels
        for name, labels in values(page).items()
        if name.startswith(("lazymesh_", "cilium_")) and not name.endswith(("_created", "_bucket"))
    }


def test_every_metric_is_told_in_the_docs(page: str) -> None:
    """With its labels; and none is told of that nobody exports."""
    told, found = documented(), exported(page)
    missing = found.keys() - told.keys()
    assert not missing, f"docs/metrics.md has no row for {', '.join(sorted(missing))}"
    invented = told.keys() - found.keys()
    assert not invented, f"docs/metrics.md has a row for {', '.join(sorted(invented))}, which nobody exports"
    for name, labels in found.items():
        assert not labels.keys() - told[name] - {"le"}, f"docs/metrics.md: {name} has {', '.join(labels)}"


def test_every_value_of_a_label_is_told_in_the_docs(page: str) -> None:
    """Fates, causes and verdicts are what the kernel's counters are called: nobody guesses what they mean."""
    told, found = documented_values(), exported(page)
    assert told.keys() >= IN_FULL
    for (name, label), known in told.items():
        seen = found[name].get(label, set())
        assert not seen - known, f"docs/metrics.md: {label} of {name} lacks {', '.join(sorted(seen - known))}"
        if (name, label) in IN_FULL:
            assert seen == known, f"docs/metrics.md: {label} of {name} has {', '.join(sorted(known - seen))}"
