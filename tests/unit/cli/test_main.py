"""Every failure is one line and an exit code."""

from __future__ import annotations

import json

import click
import pytest

from lazymesh.cli import main as main_module
from lazymesh.errors import DatapathError, LazymeshError, SettingsError


def exits(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Run main with a command line that raises; return the exit code."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main_module.cli, "main", fail)
    with pytest.raises(SystemExit) as caught:
        main_module.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("wrong\nwords"), 2),
        (DatapathError("no bpffs"), 3),
        (LazymeshError("taken"), 3),
        (click.UsageError("no such option"), 2),
        (click.FileError("x", "hint"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_error_becomes_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    """Whatever line breaks the message had."""
    assert exits(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == (code != 130)


def test_commands_are_found_by_name_and_only_then_imported() -> None:
    """Each name in the table leads to a command; others to none."""
    context = click.Context(main_module.cli)
    for name in main_module.cli.list_commands(context):
        command = main_module.cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert json.dumps(command.help)
    assert main_module.cli.get_command(context, "frobnicate") is None
