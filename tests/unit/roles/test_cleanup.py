"""What an agent removes when it ends: the table in cleanup.py, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.pins import Pins
from lazymesh.errors import DatapathError
from lazymesh.roles import cleanup as module
from lazymesh.roles.cleanup import CleanUp
from tests.support.agentsettings import settings

if TYPE_CHECKING:
    from pathlib import Path

PINS, ALL = {"pins"}, {"pins", "programs", "entries"}


@pytest.mark.parametrize(
    ("pinned", "reached", "by_itself", "asked"),
    [
        (False, "failed loading", PINS, PINS),
        (False, "loading", PINS, PINS),
        (False, "attaching", ALL, ALL),
        (False, "attached", set(), ALL),
        (True, "failed loading", set(), set()),
        (True, "loading", set(), ALL),
        (True, "attaching", set(), ALL),
        (True, "attached", set(), ALL),
    ],
)
@pytest.mark.parametrize("asks", ["nothing", "--cleanup", "--uninstall-mark"])
async def test_what_is_removed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    pinned: bool,
    reached: str,
    by_itself: set[str],
    asked: set[str],
    asks: str,
) -> None:
    """By what was there at the start, how far the agent got, and whether it is asked to."""
    removed: set[str] = set()

    async def detach(_pins: Pins) -> list[str]:
        removed.add("programs")
        return ["lxc0"]

    async def take_out(_bpffs: Path) -> int:
        removed.add("entries")
        return 1

    monkeypatch.setattr(module, "detach_everywhere", detach)
    monkeypatch.setattr(module, "take_out_everywhere", take_out)
    monkeypatch.setattr(Pins, "remove", lambda _: removed.add("pins"))
    pins = Pins.under(tmp_path)
    pins.directory.mkdir()
    if pinned:
        pins.path("lm_owned").touch()
    mark = tmp_path / "uninstall"
    if asks == "--uninstall-mark":
        mark.write_text("true")
    cleanup = CleanUp(pins, replace(settings(tmp_path), cleanup=asks == "--cleanup", uninstall_mark=mark))
    pins.path("lm_config").touch()  # pinned by this agent
    if reached == "failed loading":
        with pytest.raises(DatapathError), cleanup.loading():
            raise DatapathError("another layout")
    elif reached != "loading":
        cleanup.begin_attaching()
    if reached == "attached":
        cleanup.attached.set()
    await cleanup.run()
    assert removed == (by_itself if asks == "nothing" else asked)


async def test_failure_of_one_step_keeps_none_from_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each is in the log; the pins go in any case."""

    async def fail(_: object) -> list[str]:
        raise DatapathError("no such luck")

    monkeypatch.setattr(module, "detach_everywhere", fail)
    monkeypatch.setattr(module, "take_out_everywhere", fail)
    pins = Pins.under(tmp_path)
    pins.directory.mkdir()
    cleanup = CleanUp(pins, settings(tmp_path))
    pins.path("lm_config").touch()
    cleanup.begin_attaching()
    await cleanup.run()
    assert not pins.directory.exists()
