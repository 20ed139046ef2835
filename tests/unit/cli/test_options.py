"""The YAML file: every value as the command line would have it, and nothing ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner

from lazymesh.cli.options import SettingsCommand, config_option
from lazymesh.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


@click.command(cls=SettingsCommand)
@config_option
@click.option("--interface", multiple=True)
@click.option("--size", type=click.Choice(["255", "511"]), default="255")
@click.option("--address", default="here")
@click.option("--number", type=int, default=0)
@click.option("--shadow", is_flag=True)
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Keep what it was given."""
    ctx.obj.update(options)


def run(
    path: Path, text: str, *argv: str, env: dict[str, str] | None = None
) -> tuple[dict[str, Any], Result]:
    """Run the command with a config file."""
    path.write_text(text)
    seen: dict[str, Any] = {}
    result = CliRunner().invoke(command, ["--config", str(path), *argv], obj=seen, env=env)
    return seen, result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interface: lxc+", {"interface": ("lxc+",)}),
        ("interface: [a, b]", {"interface": ("a", "b")}),
        ("size: 511", {"size": "511"}),
        ("address: off", {"address": "off"}),
        ("address: 9968", {"address": "9968"}),
        ("number: 7\nshadow: yes", {"number": 7, "shadow": True}),
        ("shadow: false", {"shadow": False}),
        ("address:", {"address": "here"}),
        ("", {"interface": ()}),
    ],
)
def test_yaml_value_is_taken_as_the_word_it_stands_for(
    tmp_path: Path, text: str, expected: dict[str, Any]
) -> None:
    """Numbers, booleans and lists are YAML's business, not the user's."""
    seen, result = run(tmp_path / "c.yaml", text)
    assert result.exception is None, result.output
    assert seen.items() >= expected.items()


def test_command_line_beats_environment_beats_file(tmp_path: Path) -> None:
    """From the nearest to the farthest."""
    text, env = "address: file\nnumber: 1\nsize: 511\n", {"LAZYMESH_ADDRESS": "env", "LAZYMESH_NUMBER": "2"}
    seen, _ = run(tmp_path / "c.yaml", text, "--address", "line", env=env)
    assert (seen["address"], seen["number"], seen["size"]) == ("line", 2, "511")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adress: x", "no option is called 'adress'"),
        ("config: x", "no option is called 'config'"),
        ("17: x", "no option is called '17'"),
        ("[1]", "expected `option: value` lines"),
        ("a: [", "not YAML"),
        ("address: [a]", "address takes one word"),
        ("interface: [{}]", "interface takes one word"),
        ("address: {a: b}", "address takes one word"),
    ],
)
def test_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """In one line that names the file."""
    path = tmp_path / "c.yaml"
    _, result = run(path, text)
    assert isinstance(result.exception, SettingsError)
    assert words in str(result.exception)
    assert str(path) in str(result.exception)
    assert "\n" not in str(result.exception)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    """Not every file is text."""
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    result = CliRunner().invoke(command, ["--config", str(path)], obj={})
    assert isinstance(result.exception, SettingsError)
