"""The resolver's inputs: buffered until there is a driver, throttled in the kernel and in the reader of signals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from lazymesh.core import events
from lazymesh.core.clusters import MeshState
from lazymesh.roles.inputs import MeshEventBuffer, MissThrottle

if TYPE_CHECKING:
    from lazymesh.datapath.settingsmap import SettingsMap
    from lazymesh.datapath.signals import SignalReader
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh


def test_events_from_before_there_is_a_driver_reach_it() -> None:
    """The table that is in force by then first; clusters in their order; identities it sees for itself."""
    told: list[events.Event] = []
    buffer = MeshEventBuffer()
    table = MeshState().table()
    for event in (
        events.TableChanged(MeshState(1).table()),
        events.IdentitiesKnown((131_073,)),
        events.ClusterReady("b"),
        events.ClusterSilent("b"),
        events.AllListed(),
    ):
        buffer.feed(event)
    mesh = cast("Mesh", SimpleNamespace(table=table))
    buffer.connect(cast("Driver", SimpleNamespace(feed=told.append)), mesh)
    mesh.on_event(events.IdentitiesKnown((131_074,)))
    assert told == [
        events.TableChanged(table),
        events.ClusterReady("b"),
        events.ClusterSilent("b"),
        events.AllListed(),
        events.IdentitiesKnown((131_074,)),
    ]


def test_stores_that_come_and_go_while_there_is_no_driver_cost_no_more_than_the_clusters() -> None:
    """A Cilium may be waited for for days; how a cluster ended is what counts."""
    told: list[events.Event] = []
    buffer = MeshEventBuffer()
    for _ in range(1_000):
        for event in (events.ClusterSilent("b"), events.StoreReset("b"), events.ClusterReady("b")):
            buffer.feed(event)
    buffer.feed(events.ClusterReady("c"))
    buffer.feed(events.ClusterSilent("b"))
    table = MeshState().table()
    buffer.connect(
        cast("Driver", SimpleNamespace(feed=told.append)), cast("Mesh", SimpleNamespace(table=table))
    )
    assert told[1:] == [
        events.StoreReset("b"),
        events.ClusterReady("b"),
        events.ClusterReady("c"),
        events.ClusterSilent("b"),
    ]


def test_kernel_is_told_what_is_admitted_and_the_reader_what_waits() -> None:
    """There may be no reader yet: then nothing is handed over anyway."""
    told: list[tuple[str, object]] = []
    config = SimpleNamespace(
        mute=lambda on: told.append(("mute", on)), admit=lambda share: told.append(("admit", share))
    )
    throttle = MissThrottle(cast("SettingsMap", config))
    throttle.pause(True)
    throttle.mute(True)
    throttle.admit(0.5)
    throttle.reader = cast("SignalReader", SimpleNamespace(pause=lambda on: told.append(("pause", on))))
    throttle.pause(False)
    assert told == [("mute", True), ("admit", 0.5), ("pause", False)]
