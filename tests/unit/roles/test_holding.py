"""The agent's side of a holder that does not do its part; all else about it needs a kernel."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from lazymesh.core.hold import Cause
from lazymesh.roles import holding
from lazymesh.roles.holding import HolderProcess, Holding, HoldSettings
from lazymesh.roles.holdwire import ANSWERS

if TYPE_CHECKING:
    import pytest


def alive(process: str) -> bool:
    """Tell whether a process is there."""
    return Path("/proc", process).exists()


NETLINK = cast("Any", SimpleNamespace(run=lambda coroutine: coroutine))
"""Runs it in this thread."""
HOLDER = """#!/usr/bin/python3
import socket, sys, time
agent = socket.socket(fileno=int(sys.argv[3]))
assert agent.recv(9) == b"b"
agent.send(b'u{"ifindex": 7, "name": "lm_hold0"}')
while agent.recv(65536)[:1] != b"g":
    pass
time.sleep(0.4)
agent.send(b"o")
with open(sys.argv[4] + "/heard", "wb") as heard:
    heard.write(agent.recv(65536))
agent.recv(65536)
"""


def as_holder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Put a script in place of the interpreter that runs holders."""
    fake = tmp_path / "python"
    fake.write_text(script, encoding="ascii")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def keeper_at(pins: Path, first: HolderProcess | None = None) -> Holding:
    """Have an agent's side that begins at once, without a datapath."""
    datapath: Any = SimpleNamespace(
        pins=SimpleNamespace(directory=pins), config=SimpleNamespace(change=lambda **_: None)
    )
    control: Any = SimpleNamespace(beat=lambda _now: None, set_limits=lambda _limits, _seconds: None)
    keeper = Holding(datapath, control, HoldSettings(), NETLINK, first)
    keeper.want()
    return keeper


async def test_holding_is_on_when_the_holder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when it was told to: on a busy node that takes it a while, and missed packets pass until then.

    But what it parks before it is heard is answered, too.
    """
    as_holder(monkeypatch, tmp_path, HOLDER)
    prepared = asyncio.Event()

    async def prepare_tap(_datapath: object, index: int, name: str) -> None:
        assert (index, name) == (7, "lm_hold0")
        prepared.set()

    monkeypatch.setattr(holding, "prepare_tap", prepare_tap)
    keeper = keeper_at(tmp_path)
    running = asyncio.create_task(keeper.run())
    async with asyncio.timeout(20):
        await prepared.wait()
        told = time.monotonic()
        assert keeper.state == "starting"
        keeper.answer([bytes((10, 2, 0, 5))], Cause.INSTALLED)
        keeper.flush()
        while keeper.state == "starting":  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.01)
        while not (tmp_path / "heard").exists():  # noqa: ASYNC110 (the same)
            await asyncio.sleep(0.01)
    assert (keeper.state, time.monotonic() - told >= 0.4) == ("on", True)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert (tmp_path / "heard").read_bytes()[:1] == ANSWERS


async def test_a_holder_that_was_started_early_is_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second one is started, and it is told when to begin; one that has died by then is replaced."""
    as_holder(monkeypatch, tmp_path, HOLDER)
    monkeypatch.setattr(holding, "RESTART_S", 0.1)

    async def prepare_tap(*_: object) -> None:
        pass

    monkeypatch.setattr(holding, "prepare_tap", prepare_tap)
    started: list[Path] = []

    def start(pins: Path) -> HolderProcess:
        started.append(pins)
        return HolderProcess(pins)

    monkeypatch.setattr(holding, "HolderProcess", start)
    for killed in (False, True):
        first = HolderProcess(tmp_path)
        if killed:
            first._process.kill()
            first._process.wait()
        keeper = keeper_at(tmp_path, first)
        running = asyncio.create_task(keeper.run())
        async with asyncio.timeout(20):
            while keeper.state != "on":  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.01)
        assert (len(started), keeper.restarts) == (int(killed), int(killed))
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await first.end()
        assert first._process.returncode is not None


async def test_a_holder_that_never_starts_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped at its birth, say: the agent says so, and tries another."""
    as_holder(monkeypatch, tmp_path, "#!/bin/sh\necho $$ >>${0%/*}/born\nexec sleep 60\n")
    monkeypatch.setattr(holding, "BIRTH_S", 0.5)
    monkeypatch.setattr(holding, "RESTART_S", 0.1)
    keeper = keeper_at(tmp_path)
    running = asyncio.create_task(keeper.run())

    def born() -> list[str]:
        path = tmp_path / "born"
        return path.read_text(encoding="ascii").split() if path.exists() else []

    async with asyncio.timeout(20):
        while len(born()) < 2:
            assert not running.done()
            await asyncio.sleep(0.02)
    assert keeper.state == "failed"
    assert keeper.problem == keeper.summary == "the holder has not started in 0.5 s"
    assert not alive(born()[0])
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert not alive(born()[1])
