"""What the options of all commands share: types, environment names, the YAML file, how to reach map and agent."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import click
from click.core import ParameterSource

from lazymesh.core.plainyaml import read_plain_yaml
from lazymesh.errors import SettingsError
from lazymesh.settings import DEFAULT_BPFFS, DEFAULT_SOCKET


class SomePath(click.Path):
    """A path that need not exist; not the empty one, which pathlib takes for the current directory.

    Whether it can be read is left to the code that reads it and knows why: click would report wrong usage.
    """

    def __init__(self, *, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, readable=False, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if value == "":
            self.fail("'' is not a path: name one, or leave the option out", param, ctx)
        return super().convert(value, param, ctx)


PATH = SomePath()


class Period(click.ParamType[float]):
    """A period as people write it, in seconds."""

    name = "period"
    _UNITS: ClassVar = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    _FORM = re.compile("".join(rf"(?:(\d{{1,9}}){unit})?" for unit in _UNITS))

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        found = self._FORM.fullmatch(str(value))
        if found is None or not found[0]:
            self.fail(f"{value!r} is not a period: write 90s, 15m, 1h30m or 7d", param, ctx)
        return sum(
            int(count or 0) * each for count, each in zip(found.groups(), self._UNITS.values(), strict=True)
        )


class Milliseconds(click.ParamType[float]):
    """A number of milliseconds, with or without the unit."""

    name = "milliseconds"

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return milliseconds."""
        try:
            number = float(str(value).removesuffix("ms"))
        except ValueError:
            number = math.nan
        if not self._least <= number <= self._most:
            words = f"write milliseconds, from {self._least:,} to {self._most:,}: 250, or 250ms"
            self.fail(f"{value!r}: {words}", param, ctx)
        return number


DATAPATHS = click.Choice(["auto", "standalone", "cilium"])


class SettingsCommand(click.Command):
    """A command whose options may all come from ``LAZYMESH_<OPTION>``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if isinstance(param, click.Option) and param.name and param.envvar is None:
                param.envvar = f"LAZYMESH_{param.name.upper()}"
                param.show_envvar = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Make an error name the command, and where the option's value came from: flag, environment or file."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as exc:
            exc.ctx = exc.ctx or ctx
            if isinstance(exc, click.BadParameter) and isinstance(exc.param, click.Option):
                exc.param_hint = exc.param_hint or _hint(ctx, exc.param)
            raise


_CONFIG = "lazymesh.config"
"""Key in a context's meta: the file that has the defaults."""


def _hint(ctx: click.Context, option: click.Option) -> str | None:
    """Name an option as it was given; None leaves it to click, which names the environment variable, too."""
    source = ctx.get_parameter_source(str(option.name))
    if source is ParameterSource.DEFAULT_MAP:
        return f"{option.opts[0].removeprefix('--')!r} in --config {ctx.meta[_CONFIG]}"
    return repr(option.opts[0]) if source is ParameterSource.COMMANDLINE else None


def _read_config(ctx: click.Context, me: click.Parameter, path: Path | None) -> None:
    """Make the file's values the defaults of this command's options."""
    if path is None:
        return
    try:
        content = read_plain_yaml(path.read_text(encoding="utf-8"), unique_keys=True) or {}
    except OSError as exc:
        raise SettingsError(f"--config {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise SettingsError(f"--config {path}: {exc}") from exc
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: expected `option: value` lines")
    options = {param.opts[0].removeprefix("--"): param for param in ctx.command.params if param is not me}
    unknown = sorted(str(key) for key in content if key not in options)
    if unknown:
        raise SettingsError(
            f"--config {path}: no option is called {unknown[0]!r}; keys are the options' names, without --"
        )
    ctx.meta[_CONFIG] = path
    ctx.default_map = {
        str(options[key].name): _as_words(path, options[key], value)
        for key, value in content.items()
        if value is not None
    }


def _as_words(path: Path, option: click.Parameter, value: object) -> object:
    """Return a YAML value as on the command line: a word, or several if the option is repeatable."""
    if isinstance(value, list) and option.multiple:
        return [_word(path, option, item) for item in value]
    return [_word(path, option, value)] if option.multiple else _word(path, option, value)


def _word(path: Path, option: click.Parameter, value: object) -> str:
    if isinstance(value, str):
        return value
    raise SettingsError(f"--config {path}: {option.opts[0].removeprefix('--')} takes one word, not {value!r}")


config_option = click.option(
    "--config",
    type=SomePath(dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file whose keys are the options listed here, without the leading dashes.",
)

bpffs_option = click.option(
    "--bpffs",
    type=PATH,
    default=DEFAULT_BPFFS,
    show_default=True,
    help="Mounted BPF file system; pins are in its directory lazymesh/.",
)

socket_option = click.option(
    "--socket",
    type=PATH,
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Control socket of the agent.",
)
