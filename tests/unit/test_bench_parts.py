"""What the benchmark's parts make of their figures: which budgets they judge, and what no budget may hide."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from bench import first_packet, flood, memory, packet, restart, scan, storm
from tests.support.node import SIGNAL_OUTCOMES
from tests.support.pulse import Fates

if TYPE_CHECKING:
    from bench.report import Part, Row
    from tests.support.lab import AgentProcess


def over(rows: list[Row]) -> list[str]:
    """Return the figures that do not keep their budgets."""
    return [row.figure for row in rows if not row.kept]


# --- packet


def nanoseconds(**changes: float) -> dict[str, float]:
    """Return figures of the part packet that keep all budgets."""
    sizes = {
        f"{kind}_{size}_ns": took
        for size in packet.SIZES
        for kind, took in (
            ("bare", 20),
            ("lookup", 60),
            ("hit", 30),
            ("first", 75),
            ("hit_beside_cilium", 70),
        )
    }
    others = dict.fromkeys(
        ("hit_holding_ns", "suppressed_ns", "signalled_ns", "signalled_waking_ns", "not_mesh_ns"), 30.0
    )
    return {**sizes, **others, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hit_1k_ns": 71}, ["hit, 1,000 entries"]),
        ({"hit_512k_ns": 76}, ["hit, 511,000 entries"]),
        ({"hit_beside_cilium_1k_ns": 75}, []),
        ({"hit_beside_cilium_1k_ns": 76}, ["hit beside Cilium, holding, 1,000 entries"]),
        ({"hit_beside_cilium_100k_ns": 76}, ["hit beside Cilium, holding, 100,000 entries"]),
        ({"bare_512k_ns": 0}, []),
        ({"bare_1k_ns": -21}, ["hit, 1,000 entries"]),
    ],
)
def test_hits_are_judged_with_and_without_being_remembered(
    changes: dict[str, float], words: list[str]
) -> None:
    """Above the lookup alone at every size; remembered ones above an empty program, too, with a thousand entries."""
    assert over(packet.rows(nanoseconds())) == []
    assert over(packet.rows(nanoseconds(**changes))) == words


def test_packets_are_measured_as_the_agent_configures_them_beside_a_cilium() -> None:
    """Nothing is remembered, and a holder is there; afterwards all is as before."""
    seen = []
    config = SimpleNamespace(
        memory=1, cookie=0,
        remember=lambda on: setattr(config, "memory", int(on)),
        change=lambda hold_cookie: setattr(config, "cookie", hold_cookie),
    )  # fmt: skip
    stage = object.__new__(packet.Stage)
    stage._datapath = cast("Any", SimpleNamespace(config=config))

    def turn(*_names: str, peers: list[Any]) -> dict[str, list[float]]:
        seen.append((config.memory, bool(config.cookie)))
        return {"ours": [1.0]}

    stage.turn = turn  # type: ignore[method-assign]
    assert stage.beside_cilium([]) == stage.hold([]) == stage.unremembered([]) == [1.0]
    assert seen == [(0, True), (1, True), (0, False)]
    assert (config.memory, config.cookie) == (1, 0)


# --- storm


def stormed(missing: int = 0, wrong: int = 0, **counts: int) -> dict[str, Any]:
    """Return one storm of ten addresses."""
    counted = (
        dict.fromkeys(("missed", *SIGNAL_OUTCOMES, "installed", "absent", "failed", "shed", "evicted"), 0)
        | counts
    )
    return {
        "addresses": 10, "seconds": 1.0, "cpu_us_each": 1.0, "rounds": 1, "sent_s": 0.1, "wrong": wrong,
        "lost": missing, "counts": counted, "watched_keys": 0, "watches": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "in_a_row", "words"),
    [
        ({}, {}, []),
        ({"missing": 1, "shed": 50, "evicted": 50}, {}, ["addresses without an entry"]),
        ({}, {"missing": 1, "shed": 50}, ["addresses without an entry, 10 in a row"]),
        ({"wrong": 1}, {}, ["wrong entries"]),
        ({"missed": 3, "signalled": 2}, {}, ["misses without a cause"]),
        ({"missed": 2, "signalled": 3}, {}, ["misses without a cause"]),
        ({"missed": 5, **dict.fromkeys(SIGNAL_OUTCOMES, 1)}, {}, []),
    ],
)
def test_storm_has_to_give_every_address_its_entry(
    ours: dict[str, int], in_a_row: dict[str, int], words: list[str]
) -> None:
    """What was shed was sent again: it explains nothing that is missing at the end."""
    bare = {"found": 10, "seconds": 1.0, "cpu_s": 1.0}
    found = {"ours": [stormed(), stormed(**ours), stormed()], "bare": [bare] * 3, "go": []}
    part = storm.summary(found, stormed(**in_a_row))
    assert over(part.rows) == words


# --- scan


def scanned(**changes: int) -> dict[str, Any]:
    """Return figures of a scan in which all is well."""
    return {
        "quiet_ms": {"p50": 1, "p99": 2}, "beside_scan_ms": {"p50": 1, "p99": 2}, "misses": 9,
        "misses_without_cause": 0, "parked_bytes_peak_sampled": 1, "packets_unaccounted": 0, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("number", [-1, 1])
def test_misses_without_a_cause_are_too_many_and_too_few(number: int) -> None:
    """More causes than misses are as wrong as fewer."""
    assert over(scan.rows(scanned())) == []
    assert over(scan.rows(scanned(misses_without_cause=number))) == ["of 9 misses without a cause"]


def test_peak_that_is_not_read_fails_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero bytes would keep every bound; what failed before it is not hidden."""

    def unreadable(*_: object) -> float:
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(scan, "metric", unreadable)
    monkeypatch.setattr(scan, "LOOK_S", 0)
    peak = scan.Peak(cast("AgentProcess", None)).__enter__()
    peak._thread.join(10)
    with pytest.raises(RuntimeError, match=r"how much is parked could not be read: .*Connection refused"):
        peak.__exit__(None, None, None)
    peak.__exit__(KeyError, KeyError(), None)


# --- restart


def restarted(lost_for_s: float = 0.0, first: float | None = 1.0) -> dict[str, Any]:
    """Return one side of a restart."""
    return {
        "flow_packets": {"sent": 9, "lost": 0}, "connections": {"attempted": 1_010, "failed": 10 if lost_for_s else 0},
        "lost_for_s": lost_for_s, "first_ms": None if first is None else {"p50": first, "p99": first},
        "overwritten": 0, "noticed_ms": 10,
    }  # fmt: skip


def test_restart_is_compared_also_where_nothing_is_lost() -> None:
    """With us that is to be, without us it may be."""
    rows = restart.rows({"with": restarted(), "without": restarted()})
    assert over(rows) == []
    rows = restart.rows({"with": restarted(0.5), "without": restarted()})
    assert over(rows) == ["packets lost", "first to last lost packet"]


def test_time_of_new_connections_says_of_which() -> None:
    """Those that failed have none; and without any there is nothing to compare."""
    last = restart.rows({"with": restarted(first=2.0), "without": restarted(5.0, first=1.0)})[-1]
    assert (last.ours, last.against) == ("2.0 ms (1,010 of 1,010)", "without 1.0 ms (1,000 of 1,010)")
    assert last.compared == 2
    for ours, alone in ((None, 1.0), (1.0, None)):
        rows = restart.rows({"with": restarted(first=ours), "without": restarted(first=alone)})
        assert not any("p50" in row.figure for row in rows)


# --- memory


def test_memory_of_the_holder_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a process of ours, too; without it the part fails instead of leaving it out."""
    figures = {"import_mib": 40.0} | {
        f"{who}_{size}_mib": mib for size in memory.SIZES for who, mib in (("rss", 60.0), ("holder", 20.0))
    }
    (line,) = [
        row for row in memory.rows(figures | {"holder_500k_mib": 22.0}) if row.figure.startswith("holder")
    ]
    assert (line.ours, line.against, line.compared) == ("22.0 MiB", "1,000: 20.0 MiB", 1.1)
    monkeypatch.setattr(memory, "child_of", {1: 5, 2: None}.get)
    assert memory.holder_of(1) == 5
    with pytest.raises(RuntimeError, match="no holder"):
        memory.holder_of(2)


# --- what --compare needs


def flooded() -> Part:
    """Return the part of three rounds."""
    ours = [Fates(flows=[(0.0, ms / 1_000)]) for ms in (3, 1, 2)]
    empty = [Fates(flows=[(0.0, 0.001)]), Fates(flows=[(0.0, None)]), Fates(flows=[(0.0, 0.001)])]
    counted = dict.fromkeys(("sent", "missed", *SIGNAL_OUTCOMES), 0)
    return flood._part(ours, empty, counted, {"ours": [1.0, 2.0, 3.0], "empty": [4.0, 5.0, 6.0]})


def test_rounds_of_a_flood_are_its_repeats() -> None:
    """A round without an answer has no time of one."""
    part = flooded()
    assert part.figures["round_trip_ms"] == {"p50": 2.0, "p99": 3.0}
    assert part.figures["packets_per_second_empty_program"] == 5
    assert part.repeats["round_trip_ms.p99"] == [3.0, 1.0, 2.0]
    assert part.repeats["round_trip_empty_program_ms.p50"] == [1.0, 1.0]
    assert part.repeats["packets_per_second"] == [1.0, 2.0, 3.0]
    assert part.repeats["known_peers_lost"] == [0.0, 0.0, 0.0]


def test_blocks_of_first_connections_are_their_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of them together the figure."""
    blocks = {"held": [[1.0], [2.0], [9.0]], "warm": [[0.1], [0.2], [0.3]]}
    monkeypatch.setattr(first_packet, "Lab", lambda pods: contextlib.nullcontext())
    monkeypatch.setattr(first_packet, "measure_dropped", lambda _: [1_000.0])
    monkeypatch.setattr(first_packet, "measure_held", lambda _: (blocks["held"], blocks["warm"], 0))
    monkeypatch.setattr(first_packet, "measure_slow", lambda _: ([51.0], 0))
    part = first_packet.run(lambda _: None)
    assert part.figures["hold_ms"] == {"p50": 2.0, "p99": 9.0}
    assert part.repeats["hold_ms.p50"] == [1.0, 2.0, 9.0]
    assert part.repeats["warm_ms.p99"] == [0.1, 0.2, 0.3]
