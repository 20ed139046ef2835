"""Findings as lines and as an object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from lazymesh.cli import check as module
from lazymesh.roles.checkresult import CheckResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("warn", 0), ("fail", 3)])
def test_exit_code_is_3_only_if_a_need_is_missing(
    monkeypatch: pytest.MonkeyPatch, verdict: str, code: int
) -> None:
    """A warning is no failure."""

    async def results(*_: object) -> AsyncIterator[CheckResult]:
        yield CheckResult("bpffs", verdict, "words")

    monkeypatch.setattr(module, "check_node", results)
    monkeypatch.setattr(module, "configure_logging", lambda *_: None)
    table = CliRunner().invoke(module.check)
    assert (table.exit_code, table.output.split()) == (
        code,
        ["ok" if verdict == "ok" else verdict.upper(), "bpffs", "words"],
    )
    report = CliRunner().invoke(module.check, ["-o", "json"])
    assert json.loads(report.output) == {
        "ok": code == 0,
        "findings": [{"name": "bpffs", "verdict": verdict, "text": "words"}],
    }
