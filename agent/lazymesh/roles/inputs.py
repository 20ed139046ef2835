"""The resolver's inputs: the kernel's misses, throttled, and the mesh's events, buffered until there is a driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from lazymesh.core import events

if TYPE_CHECKING:
    from lazymesh.datapath.settingsmap import SettingsMap
    from lazymesh.datapath.signals import SignalReader
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh

log = structlog.get_logger()

_BUFFERED = (
    events.ClusterReady,
    events.ClusterSilent,
    events.ClusterGone,
    events.StoreReset,
    events.AllListed,
)
"""Events from before there is a resolver that the resolver must know of."""


class MissThrottle:
    """Limits what the kernel signals, and how much of it the reader of signals hands over."""

    def __init__(self, config: SettingsMap) -> None:
        self.reader: SignalReader | None = None
        self._config = config

    def pause(self, on: bool) -> None:
        """Stop handing signals over, or resume."""
        if self.reader is not None:
            self.reader.pause(on)

    def mute(self, on: bool) -> None:
        """Stop all signals, or resume."""
        self._config.mute(on)
        log.warning("miss signals muted" if on else "miss signals unmuted")

    def admit(self, share: float) -> None:
        """Admit this share of the configured rates."""
        self._config.admit(share)


class MeshEventBuffer:
    """Keeps the mesh's events while there is no driver yet."""

    def __init__(self) -> None:
        self._waiting: dict[events.Event, None] = {}
        """Each event once, at its latest place: the wait for Cilium may take days, while stores come and go."""

    def feed(self, event: events.Event) -> None:
        """Keep an event, if a driver must know of it."""
        if isinstance(event, _BUFFERED):
            self._waiting.pop(event, None)
            self._waiting[event] = None

    def connect(self, driver: Driver, mesh: Mesh) -> None:
        """Pass on what a new driver must know; it sees the mesh's identities itself, and gets all later events."""
        mesh.on_event = driver.feed
        driver.feed(events.TableChanged(mesh.table))
        waiting, self._waiting = self._waiting, {}
        for event in waiting:
            driver.feed(event)
