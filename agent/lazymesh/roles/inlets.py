"""What comes in to the resolver: the misses of the kernel, as many as are let in, and what the mesh tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from lazymesh.core import events

if TYPE_CHECKING:
    from lazymesh.datapath.maps import ConfigMap
    from lazymesh.datapath.signals import SignalReader
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh

log = structlog.get_logger()

_TO_BE_KEPT = (
    events.ClusterReady,
    events.ClusterSilent,
    events.ClusterGone,
    events.StoreReset,
    events.AllListed,
)
"""What the mesh tells before there is a resolver, and a resolver has to know."""


class Valve:
    """How much is signalled, and how much of it handed over: told to the kernel and to the reader of its signals."""

    def __init__(self, config: ConfigMap) -> None:
        self.reader: SignalReader | None = None
        self._config = config

    def pause(self, on: bool) -> None:
        """Have signals wait, or go on."""
        if self.reader is not None:
            self.reader.pause(on)

    def mute(self, on: bool) -> None:
        """Have nothing signalled, or go on."""
        self._config.mute(on)
        log.warning("the kernel is told to signal nothing" if on else "the kernel may signal again")

    def admit(self, share: float) -> None:
        """Let this share of the usual rates in."""
        self._config.admit(share)


class Inbox:
    """Takes what the mesh tells; keeps it while there is no driver yet."""

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._waiting: dict[events.Event, None] = {}
        """Each once, where it came last: a Cilium may be waited for for days, while stores come and go."""

    def feed(self, event: events.Event) -> None:
        """Pass an event on, now or later."""
        if self._driver is not None:
            self._driver.feed(event)
        elif isinstance(event, _TO_BE_KEPT):
            self._waiting.pop(event, None)
            self._waiting[event] = None

    def connect(self, driver: Driver, mesh: Mesh) -> None:
        """Tell a driver that knows nothing yet; the identities are the mesh's own, which it sees."""
        self._driver = driver
        driver.feed(events.TableChanged(mesh.table))
        waiting, self._waiting = self._waiting, {}
        for event in waiting:
            driver.feed(event)
