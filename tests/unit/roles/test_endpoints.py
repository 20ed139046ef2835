"""What the control socket answers, at first while the agent is starting; HTTP has its tests in the mesh tier."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.errors import LazymeshError
from lazymesh.metrics import Metrics
from lazymesh.roles import endpoints as module
from lazymesh.roles.control import ask
from lazymesh.roles.endpoints import Endpoints
from lazymesh.roles.status import Starting
from tests.support.agentsettings import settings

if TYPE_CHECKING:
    from pathlib import Path


class FakeDriver:
    """Notes each change of where outcomes are published."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[object] = asyncio.Queue()

    def __setattr__(self, name: str, value: object) -> None:
        """Note it."""
        if name == "publish":
            self.changes.put_nowait(value)
        super().__setattr__(name, value)


async def test_answers_are_those_of_the_start_until_there_are_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then those of the parts; whoever streams misses turns the driver's stream on, and off by leaving."""
    monkeypatch.setattr(module, "export", lambda *_: None)
    monkeypatch.setattr(
        module,
        "Status",
        lambda _parts: SimpleNamespace(describe=lambda: {"wrong": []}, not_ready=lambda: None),
    )
    given = replace(settings(tmp_path), socket=tmp_path / "agent.sock")

    def answer(what: str, **arguments: object) -> dict[str, Any]:
        return next(ask(given.socket, what, **arguments))

    endpoints = Endpoints(given, Metrics(), Starting(given, 0.0))
    async with contextlib.AsyncExitStack() as stack:
        await endpoints.open(stack)
        assert (await asyncio.to_thread(answer, "status"))["notReady"] == "programs are not attached yet"
        for what in ("audit", "on-miss", "stale"):
            with pytest.raises(LazymeshError, match="the agent is still starting"):
                await asyncio.to_thread(answer, what)
        driver = FakeDriver()
        parts = SimpleNamespace(
            driver=driver,
            datapath=SimpleNamespace(config="config"),
            holding="holding",
            resolver=SimpleNamespace(stale_addresses=lambda: [bytes([10, 2, 0, 5])]),
            ipcaches=SimpleNamespace(export=lambda _metrics: None),
        )
        auditor = SimpleNamespace(log=None, describe=lambda since: {"windows": [], "since": since})
        programs = SimpleNamespace(switch_on_miss=lambda *words: {"words": words})
        endpoints.show(cast("Any", parts), cast("Any", auditor), cast("Any", programs))
        assert await asyncio.to_thread(answer, "status") == {"wrong": []}
        assert await asyncio.to_thread(answer, "stale") == {"addresses": ["10.2.0.5"]}
        assert (await asyncio.to_thread(answer, "audit", since=60))["since"] == 60
        words = await asyncio.to_thread(answer, "on-miss", action="drop")
        assert words == {"words": ["config", "holding", "drop"]}
        _, writer = await asyncio.open_unix_connection(given.socket)
        writer.write(b'{"ask": "misses"}\n')
        assert await driver.changes.get() is not None
        writer.close()
        assert await driver.changes.get() is None
    assert not given.socket.exists()
