"""``lazymesh audit`` and ``lazymesh config`` where they are used wrongly."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from lazymesh.cli.main import cli


@pytest.mark.parametrize("period", ["1", "h", "1w", "-1h", "1.5h"])
def test_a_period_needs_a_number_and_a_unit(period: str) -> None:
    """Anything else is wrong usage, and the message shows how to write it."""
    done = CliRunner().invoke(cli, ["audit", f"--since={period}"])
    assert done.exit_code == 2
    assert "write 90s, 15m, 1h30m or 7d" in done.output


def test_an_unknown_action_is_wrong_usage() -> None:
    """There are three."""
    assert CliRunner().invoke(cli, ["config", "on-miss", "keep"]).exit_code == 2
