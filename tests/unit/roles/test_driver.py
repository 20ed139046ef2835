"""The driver: it carries commands out, reports outcomes, and ends with an error."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from lazymesh.core import events
from lazymesh.core.hold import Cause
from lazymesh.core.model import Entry, Reason, Space, parse_address
from lazymesh.datapath.abi import Signals
from lazymesh.metrics import Metrics
from lazymesh.roles.driver import Driver, Shadow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazymesh.core.resolver import Resolver
    from lazymesh.roles.driver import HasMaps

IP = parse_address("10.2.0.5")
ENTRY = Entry(131_073)
INSTALL = events.Install([IP], ENTRY, 2)
WATCH = events.Watch("b", (Space.PUSHED,), (IP,), 1)


class Scripted:
    """A resolver that answers each event by a table, and remembers its events."""

    def __init__(self, answers: dict[type, list[events.Command]]) -> None:
        self.answers = answers
        self.told: list[events.Event] = []

    def step(self, event: events.Event, _now: float, carry_out: Callable[[events.Command], None]) -> None:
        """Look the event up."""
        self.told.append(event)
        for command in self.answers.get(type(event), []):
            carry_out(command)

    def describe(self, _address: bytes) -> Any:
        """Know one entry."""
        return SimpleNamespace(entry=ENTRY)


def shadow(standing: Entry | None = None) -> Shadow:
    """Return a shadow over a map that says the same of every address."""
    ipcache = SimpleNamespace(lookup=lambda _address: standing)
    return Shadow(cast("HasMaps", SimpleNamespace(maps=(ipcache,))))


class Fixture:
    """A driver with fakes all around."""

    def __init__(
        self, answers: dict[type, list[events.Command]], links: dict[str, Any] | None = None
    ) -> None:
        self.resolver = Scripted(answers)
        self.metrics = Metrics()
        self.paused: list[bool] = []
        self.admitted: list[float] = []
        self.driver = Driver(
            cast("Resolver", self.resolver),
            shadow(),
            links or {},
            self.metrics,
            SimpleNamespace(pause=self.paused.append, admit=self.admitted.append),
        )

    def sample(self, name: str, **labels: str) -> float:
        """Return one of the metrics."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def test_signals_of_one_moment_are_one_event() -> None:
    """So that the reads of many addresses share a transaction."""
    fixture = Fixture({})
    fixture.driver.on_signals(Signals([IP, IP], [10**9, 10**9], inward=1))
    (told,) = fixture.resolver.told
    assert told == events.Misses((IP, IP), (1.0, 1.0))
    assert fixture.sample("cilium_ipcache_miss_signal_total", direction="egress") == 1
    assert fixture.sample("cilium_ipcache_miss_signal_total", direction="ingress") == 1


def test_result_of_an_install_comes_before_everything_else() -> None:
    """The resolver hears of it before the next event, were that waiting already."""
    fixture = Fixture({events.Tick: [events.Install([IP], ENTRY, 2)]})
    fixture.driver._events.append(events.Tick())
    fixture.driver.feed(events.ClusterReady("b"))
    kinds = [type(event) for event in fixture.resolver.told]
    assert kinds == [events.Tick, events.InstallsEnded, events.ClusterReady]


@pytest.mark.parametrize("lone", [True, False])
def test_lone_entry_is_written_at_once_and_several_together(
    lone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the resolver still steps, if nothing can join it; else when the step is over."""
    addresses = (IP,) if lone else (IP, parse_address("10.2.0.6"))
    installs: list[events.Command] = [events.Install([each], ENTRY, 2) for each in addresses]
    fixture = Fixture({events.Answered: [*installs, WATCH]})
    driver, written = fixture.driver, list[tuple[int, bool]]()

    def install_many(some: Sequence[events.Install]) -> list[Reason | None]:
        written.append((len(some), bool(driver._later)))
        return [None] * len(some)

    monkeypatch.setattr(driver._installer, "install_many", install_many)
    values = (b"",) * len(addresses)
    driver.feed(events.Answered("b", (Space.PUSHED,), addresses, values, 1))
    assert written == [(len(addresses), not lone)]


def test_packets_are_let_go_before_anything_that_they_do_not_wait_for() -> None:
    """Watches, metrics and people come after them; good answers and bad ones alike, but no evictions."""
    other = parse_address("10.2.0.6")
    commands: list[events.Command] = [
        WATCH,
        events.Unwatch("b", other),
        events.Report([IP], "b", "installed", None, "", [None]),
        events.Report([other], "b", "absent", Reason.NOT_FOUND, "", [None]),
        events.Report([other], "b", "evicted", None, "", [None]),
    ]
    order: list[object] = []
    link = SimpleNamespace(watch=order.append, unwatch=order.append)
    fixture = Fixture({events.Tick: commands}, {"b": link})
    driver = fixture.driver
    driver.release = lambda addresses, cause: order.append((*addresses, cause))
    driver.released = lambda: order.append("released")
    driver.installed = lambda addresses: order.append(("installed", addresses))
    driver.feed(events.Tick())
    assert order == [
        (IP, Cause.INSTALLED), (other, Cause.NEGATIVE), "released", commands[0], other, ("installed", [IP]),
    ]  # fmt: skip


def test_read_of_a_cluster_that_has_left_is_answered_all_the_same() -> None:
    """No read is ever left without an answer."""
    fixture = Fixture({events.Tick: [events.Read("b", (Space.PUSHED,), (IP,))]})
    fixture.driver.feed(events.Tick())
    assert fixture.resolver.told[1] == events.ReadFailed("b", (IP,), "unavailable")


def test_bug_ends_the_driver_but_not_the_source_of_the_event() -> None:
    """An etcd watch must not die of it; the agent is told once, and nothing more is decided."""
    fixture = Fixture({events.Tick: [cast("events.Command", WATCH)]}, {"b": None})
    fixture.driver._links = cast("Any", {"b": object()})  # has no watch(): raises
    failures: list[Exception] = []
    fixture.driver.fail = failures.append
    fixture.driver.feed(events.Tick())
    fixture.driver.feed(events.Tick())
    assert len(failures) == 1
    assert len(fixture.resolver.told) == 1


def test_bug_is_raised_where_no_agent_is_told() -> None:
    """Never swallowed."""
    fixture = Fixture({events.Tick: [WATCH]})
    fixture.driver._links = cast("Any", {"b": object()})
    with pytest.raises(AttributeError):
        fixture.driver.feed(events.Tick())


def test_outcomes_are_counted_and_published() -> None:
    """Latency counts from the packet's miss; an answer from the cache has no duration."""
    missed = time.monotonic() - 0.25
    reports: list[events.Command] = [
        events.Report([IP], "b", "installed", None, "", [missed]),
        events.Report([IP], "b", "absent", Reason.FORGED, "identity 2 is reserved", [missed], cached=True),
        events.Report([IP], "b", "evicted", Reason.NOT_FOUND, "", [None]),
    ]
    fixture = Fixture({events.Tick: reports})
    told: list[dict[str, Any]] = []
    fixture.driver.publish = told.append
    fixture.driver.feed(events.Tick())
    assert [line["outcome"] for line in told] == ["installed", "absent", "evicted"]
    expected = {"address": "10.2.0.5", "cluster": "b", "reason": None, "identity": ENTRY.identity}
    assert told[0].items() >= expected.items()
    assert 250 <= told[0]["latency_ms"] < 5000
    assert told[2]["latency_ms"] is None
    assert fixture.sample("cilium_ipcache_miss_resolution_errors_total", reason="forged") == 1
    assert fixture.sample("cilium_ipcache_miss_resolution_errors_total", reason="not-found") == 0
    assert fixture.sample("cilium_ipcache_miss_resolution_duration_seconds_count", outcome="installed") == 1
    assert fixture.sample("cilium_ipcache_miss_resolution_duration_seconds_count", outcome="absent") == 0


@pytest.mark.parametrize("standing", [None, Entry(2), Entry(9), Entry(1 << 24 | 5)])
def test_shadow_counts_what_it_would_have_changed(standing: Entry | None) -> None:
    """Where the map has the world, or nothing, an entry would change what policy says."""
    one = shadow(standing)
    assert one.install_many([INSTALL]) == [None]
    assert one.changes_total == 1
    assert not one.evict(IP)


def test_shadow_leaves_alone_what_is_known_by_now() -> None:
    """As the installer would."""
    one = shadow(Entry(131_074))
    assert one.install_many([INSTALL]) == [Reason.TAKEN]
    assert one.changes_total == 0


def test_pauses_and_shares_reach_the_valve_and_evictions_are_counted() -> None:
    """Both come as commands."""
    commands = [events.Mute(True), events.Admit(0.5), events.Evict(IP, "deleted"), events.Mute(False)]
    fixture = Fixture({events.Tick: commands})
    fixture.driver.feed(events.Tick())
    assert (fixture.paused, fixture.admitted) == ([True, False], [0.5])
    assert fixture.sample("lazymesh_entries_evicted_total", reason="deleted") == 1


def test_installs_with_nothing_in_between_go_together() -> None:
    """One answer for all of them; an eviction keeps its place."""
    others = [parse_address(f"10.2.1.{number}") for number in range(4)]
    commands: list[events.Command] = [
        events.Install([others[0]], ENTRY, 2),
        events.Install([others[1]], ENTRY, 3),
        events.Evict(IP, "budget"),
        events.Install([others[2]], ENTRY, 2),
    ]
    fixture = Fixture({events.Tick: commands})
    order: list[object] = []
    installer = SimpleNamespace(
        install_many=lambda many: [order.append(address) for each in many for address in each.addresses],
        evict=order.append,
    )
    fixture.driver._installer = cast("Shadow", installer)
    fixture.driver.feed(events.Tick())
    assert order == [others[0], others[1], IP, others[2]]
    assert fixture.resolver.told[1:] == [
        events.InstallsEnded((others[2],), (None,)),
        events.InstallsEnded((others[0], others[1]), (None, None)),
    ]


def test_watches_of_a_store_that_is_no_more_are_forgotten() -> None:
    """They would start at its revisions, and belong to nothing; those of another cluster are kept."""
    of_c = events.Watch("c", (Space.PUSHED,), (IP,), 1)
    done: list[events.Watch] = []
    link = SimpleNamespace(watch=done.append)
    fixture = Fixture({events.Tick: [WATCH, of_c]}, {"b": link, "c": link})
    fixture.driver._events.append(events.Tick())
    fixture.driver.feed(events.StoreReset("b"))
    assert done == [of_c]


def test_one_cluster_with_many_bad_records_silences_itself_alone() -> None:
    """Each address is logged once, and a bounded number for each cluster."""
    bad: list[events.Command] = [
        events.Report([number.to_bytes(4)], "c", "absent", Reason.FORGED, "", [None])
        for number in range(3_000)
    ]
    good = events.Report([IP], "b", "absent", Reason.MALFORMED, "", [None])
    fixture = Fixture({events.Tick: [*bad, *bad, good, good]})
    with capture_logs() as logs:
        fixture.driver.feed(events.Tick())
    told = [entry for entry in logs if entry["event"] == "address refused"]
    assert len([entry for entry in told if entry["cluster"] == "c"]) <= 1_024
    assert [entry["address"] for entry in told if entry["cluster"] == "b"] == ["10.2.0.5"]
    assert fixture.sample("cilium_ipcache_miss_resolution_errors_total", reason="forged") == 6_000
