"""Every failure is one line and an exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from lazymesh.cli import main as main_module
from lazymesh.errors import DatapathError, LazymeshError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def path_options(command: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    """Yield the words that lead to each option that takes a path, of a command and those below it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from path_options(below, *words, name)
    for param in command.params:
        if isinstance(param, click.Option) and isinstance(param.type, click.Path):
            yield *words, param.opts[0]


PATHS = sorted(path_options(main_module.cli))


@pytest.mark.parametrize("words", PATHS, ids=" ".join)
def test_nothing_is_no_path(words: tuple[str, ...]) -> None:
    """A variable of the shell that is not set: nobody has meant the directory where we are."""
    done = CliRunner().invoke(main_module.cli, [*words, ""])
    assert done.exit_code == 2
    assert f"Invalid value for '{words[-1]}': '' is not a path" in done.output


def test_paths_are_where_they_were_looked_for() -> None:
    """Of the command itself, and of those in groups."""
    assert {("status", "--socket"), ("ipcache", "get", "--bpffs"), ("agent", "--config")} <= set(PATHS)
