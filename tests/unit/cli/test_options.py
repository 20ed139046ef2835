"""The YAML file: every value as the command line would have it, and nothing ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner

from lazymesh.cli.options import Milliseconds, SettingsCommand, config_option
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
@click.option("--wait", type=Milliseconds(1, 10_000), default=250)
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
        ("address: no", {"address": "no"}),
        ("address: 010", {"address": "010"}),
        ("address: 2024-13-45", {"address": "2024-13-45"}),
        ("number: 7\nshadow: yes", {"number": 7, "shadow": True}),
        ("shadow: false", {"shadow": False}),
        ("address:", {"address": "here"}),
        ("", {"interface": ()}),
    ],
)
def test_yaml_value_is_taken_as_the_word_it_stands_for(
    tmp_path: Path, text: str, expected: dict[str, Any]
) -> None:
    """What YAML takes for numbers, dates and truths is its business, not the user's."""
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
        ("a: [", "line 1: not YAML"),
        ("[" * 2_000, "nested too deeply"),
        ('address: "\\UFFFFFFFF"', "not YAML"),
        ("address: a\nnumber: 1\naddress: b", "line 3: not YAML ('address' occurs twice)"),
        ("address: [a]", "address takes one word"),
        ("interface: [{}]", "interface takes one word"),
        ("address: {a: b}", "address takes one word"),
        ("{[a]: b}", "line 1: not YAML"),
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


def refusal(path: Path, *argv: str) -> str:
    """Return the words with which the command refuses what it was given."""
    with pytest.raises(click.UsageError) as caught:
        command.main(["--config", str(path), *argv], standalone_mode=False, obj={})
    assert caught.value.ctx is not None
    return caught.value.format_message()


@pytest.mark.parametrize(
    ("argv", "variable", "hint"),
    [
        ((), None, "'number' in --config {path}: "),
        ((), "many", "'--number' (env var: 'LAZYMESH_NUMBER'): "),
        (("--number", "many"), "1", "'--number': "),
    ],
)
def test_bad_value_is_blamed_on_whoever_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], variable: str | None, hint: str
) -> None:
    """The file by its name, and a variable only where it counts."""
    path = tmp_path / "c.yaml"
    path.write_text("number: some")
    if variable is not None:
        monkeypatch.setenv("LAZYMESH_NUMBER", variable)
    assert refusal(path, *argv).startswith("Invalid value for " + hint.format(path=path))


@pytest.mark.parametrize(("text", "value"), [("250", 250), ("250ms", 250), ("1.5ms", 1.5), ("10000", 10_000)])
def test_milliseconds_may_say_that_they_are(tmp_path: Path, text: str, value: float) -> None:
    """In the file as anywhere else."""
    seen, _ = run(tmp_path / "c.yaml", f"wait: {text}")
    assert seen["wait"] == value


@pytest.mark.parametrize("text", ["", "ms", "250s", "0.5", "10001ms", "long", "nan"])
def test_other_times_are_told_the_unit_and_the_range(tmp_path: Path, text: str) -> None:
    """Whatever is wrong with them."""
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert refusal(path, "--wait", text).endswith("write milliseconds, from 1 to 10,000: 250, or 250ms")


def test_option_without_its_value_is_an_error_of_this_command(tmp_path: Path) -> None:
    """Its help is the one to look into, and click does not say so."""
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert "requires an argument" in refusal(path, "--address")
