"""What an agent removes from its node when it ends."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import structlog

from lazymesh.datapath.hooks import detach_everywhere
from lazymesh.errors import DatapathError, LazymeshError
from lazymesh.roles.announce import is_marked
from lazymesh.roles.uninstall import take_out_everywhere

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.datapath.pins import Pins
    from lazymesh.settings import AgentSettings

log = structlog.get_logger()


class CleanUp:
    """Follows how far the agent gets, and cleans up accordingly.

    ==================  ===========================  ======================  =============================
    pins at the start   the agent got as far as      it cleans up            and removes
    ==================  ===========================  ======================  =============================
    none                loading                      always                  pins
    none                attaching                    always                  pins, programs, entries
    none                having attached everywhere   if asked to             pins, programs, entries
    some                pins that are not ours       never
    some                anything else                if asked to             pins, programs, entries
    ==================  ===========================  ======================  =============================

    So a first start that fails half-way leaves no program behind that denies what nothing resolves. Those who ask are
    ``--cleanup`` and the mark of ``--uninstall-mark``.
    """

    def __init__(self, pins: Pins, settings: AgentSettings) -> None:
        self._pins = pins
        self._settings = settings
        self._fresh = not any(pins.directory.iterdir())
        self._refused = False
        self._attaching = False
        self.attached = threading.Event()
        """Set once the programs are on the interfaces that were there at the start."""

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Note if what is done meanwhile fails over pins that were there at the start: they are not ours to remove."""
        try:
            yield
        except DatapathError:
            self._refused = not self._fresh
            raise

    def begin_attaching(self) -> None:
        """From now on programs may be attached."""
        self._attaching = True

    @property
    def wanted(self) -> bool:
        """Whether to clean up, if the agent ended now."""
        if self._refused:
            return False
        asked = self._settings.cleanup or is_marked(self._settings.uninstall_mark)
        return asked or (self._fresh and not self.attached.is_set())

    async def run(self) -> None:
        """Clean up if that is wanted; filters that cannot be ours (of an agent with other pins) stay."""
        if not self.wanted:
            return
        interfaces: list[str] = []
        if self._attaching or not self._fresh:
            try:
                interfaces = await detach_everywhere(self._pins)
            except LazymeshError as exc:
                log.error("clean-up", error=str(exc))
            # Also those of an earlier life, which this one may not have got round to reading.
            try:
                await take_out_everywhere(self._settings.datapath.bpffs)
            except (LazymeshError, OSError) as exc:
                log.error("clean-up", error=str(exc))
        self._pins.remove()
        if interfaces:
            log.info("cleaned up", detached=interfaces)
