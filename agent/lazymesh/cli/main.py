"""The entry point: finds the command, and turns every failure into one line on stderr and an exit code.

0 ok, 1 the answer is no, 2 wrong usage, 3 something required is missing or taken; as in shells, 130 for Ctrl-C and 141
for a reader that left.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys

import click

from lazymesh import __version__
from lazymesh.cli.output import STDOUT, OutputError, check_stdout, print_words
from lazymesh.errors import LazymeshError

_COMMANDS = {
    "agent": "lazymesh.cli.agent",
    "audit": "lazymesh.cli.audit",
    "check": "lazymesh.cli.check",
    "config": "lazymesh.cli.config",
    "ipcache": "lazymesh.cli.ipcache",
    "misses": "lazymesh.cli.misses",
    "status": "lazymesh.cli.status",
    "uninstall": "lazymesh.cli.uninstall",
}


class _LazyGroup(click.Group):
    """Imports a command's module only when the command is used: `ipcache get` needs no gRPC."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        module = _COMMANDS.get(cmd_name)
        return None if module is None else getattr(importlib.import_module(module), cmd_name)


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="lazymesh")
def cli() -> None:
    """Demand paging for the Cilium ipcache: when a packet misses, its peer's identity is read from the mesh's etcd.

    Every option can also be given as LAZYMESH_<OPTION> in the environment; the agent also reads a YAML file (--config).
    Data goes to stdout, messages to stderr. Exit codes: 0 ok, 1 the answer is no, 2 wrong usage, 3 something required
    is missing or taken.
    """


def main() -> None:
    """Run the command line and exit."""
    if os.getpid() == 1:
        # The kernel does not deliver to a container's first process the signals that it does not handle, and its pod
        # would not stop. The agent replaces this handler by its own.
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    check_stdout()
    # Unless the user says so (no-color.org), it depends on the terminal.
    colour = False if os.environ.get("NO_COLOR") else None
    try:
        cli.main(prog_name="lazymesh", standalone_mode=False, color=colour)
    except click.exceptions.NoArgsIsHelpError as exc:
        _fail(exc.format_message(), 2)
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx else "lazymesh"
        _fail(_one_line(f"{command}: {exc.format_message()} (see `{command} --help`)"), 2)
    except click.ClickException as exc:
        _fail(_one_line(f"lazymesh: {exc.format_message()}"), 2)
    except LazymeshError as exc:
        _fail(_one_line(f"lazymesh: {exc}"), exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except OutputError as exc:
        # Discard what is still in the buffer: Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        if exc.errno == errno.EPIPE:
            sys.exit(141)  # the reader (head, less) has seen enough
        _fail(f"lazymesh: {exc}", 3)


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _fail(words: str, code: int) -> None:
    print_words(words)
    sys.exit(code)
