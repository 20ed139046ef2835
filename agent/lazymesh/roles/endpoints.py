"""Where the agent answers: the control socket for people, HTTP for the kubelet and Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.model import format_address
from lazymesh.metrics import HttpServer
from lazymesh.roles.control import ControlServer
from lazymesh.roles.export import Sources, export
from lazymesh.roles.status import Status

if TYPE_CHECKING:
    import contextlib

    from lazymesh.metrics import Metrics
    from lazymesh.roles.auditing import Auditor
    from lazymesh.roles.programsettings import ProgramSettings
    from lazymesh.roles.status import Parts, Starting
    from lazymesh.settings import AgentSettings


class Endpoints:
    """Answers from the first moment on, at first that the agent is starting: one that is silent is killed as dead."""

    def __init__(self, settings: AgentSettings, metrics: Metrics, starting: Starting) -> None:
        self._settings = settings
        self._metrics = metrics
        self._status: Starting | Status = starting
        answers = dict.fromkeys(("audit", "on-miss", "stale"), starting.refuse)
        self._control = ControlServer(
            settings.socket, {"status": lambda _request: starting.describe(), **answers}
        )

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Listen until the stack is left."""
        await self._control.start()
        stack.push_async_callback(self._control.close)
        if self._settings.metrics_address is not None:
            server = HttpServer(self._settings.metrics_address, self._metrics, self._not_ready)
            await server.start()
            stack.push_async_callback(server.close)

    def show(self, parts: Parts, auditor: Auditor, programs: ProgramSettings) -> Status:
        """Answer from these parts from now on; return what reports on them."""
        status = self._status = Status(parts)

        def stream(on: bool) -> None:
            parts.driver.publish = self._control.publish if on else None

        self._control.use(
            {
                "status": lambda _request: status.describe(),
                "stale": lambda _request: {
                    "addresses": [format_address(each) for each in parts.resolver.stale_addresses()]
                },
                "audit": lambda request: auditor.describe(float(request["since"])),
                "on-miss": lambda request: programs.switch_on_miss(
                    parts.datapath.config, parts.holding, request["action"]
                ),
            },
            stream,
        )
        export(self._metrics, Sources(status, self._control, auditor.log))
        parts.ipcaches.export(self._metrics)
        return status

    def _not_ready(self) -> str | None:
        return self._status.not_ready()
