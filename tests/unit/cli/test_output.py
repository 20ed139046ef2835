"""Tables and JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lazymesh.cli.output import print_json, print_table

if TYPE_CHECKING:
    import pytest


def test_columns_are_as_wide_as_what_stands_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Three blanks apart, none at the end."""
    print_table(("A", "LONG"), [("wide one", 1), ("x", "")])
    assert capsys.readouterr().out == "A          LONG\nwide one   1\nx\n"


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Also with line breaks in the values."""
    print_json({"a": "b\nc"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": "b\nc"}
