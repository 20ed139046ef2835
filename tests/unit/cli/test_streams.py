"""What the shell and the terminal see: output that nobody reads or that has no place, help, colours."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.cli.test_status import ANSWER

if TYPE_CHECKING:
    from collections.abc import Iterator

EVERYTHING = ANSWER | {"wrong": [], "windows": [], "recordedSince": "2026-11-21T06:00:00.000+00:00"}
"""What is asked for, and the answers to other questions."""
COMMANDS = [
    ("--help",),
    ("--version",),
    ("agent", "--help"),
    ("check",),
    ("check", "-o", "json"),
    ("status",),
    ("status", "-o", "json"),
]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The path of a socket on which somebody answers as an agent does with which nothing is wrong."""
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer() -> None:
            with contextlib.suppress(OSError):  # it is closed
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(json.dumps(EVERYTHING).encode() + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield str(path)
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def lazymesh(command: tuple[str, ...], agent: str, stdout: int) -> tuple[int, str]:
    """Run it with its output going there; return exit code and stderr."""
    words = [sys.executable, "-m", "lazymesh", *command]
    env = os.environ | {"LAZYMESH_SOCKET": agent, "LAZYMESH_CLUSTERMESH_CONFIG": str(Path(agent).parent)}
    done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, check=False, env=env, timeout=60)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_reader_that_has_left_is_told_apart_from_a_no(command: tuple[str, ...], agent: str) -> None:
    """Quietly, and with what the shell has for it, where 1 would be an answer."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert lazymesh(command, agent, writer) == (141, "")
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_output_without_a_place_is_one_line(command: tuple[str, ...], agent: str) -> None:
    """Here a device that is always full."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code, words = lazymesh(command, agent, full)
    finally:
        os.close(full)
    assert (code, words) == (3, "lazymesh: cannot write to standard output: No space left on device\n")


def test_words_that_nobody_can_read_do_not_change_an_answer(agent: str) -> None:
    """They are for people."""
    with Path("/dev/full").open("wb") as full:
        words = [sys.executable, "-m", "lazymesh", "audit", "--socket", agent]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_terminals_and_not_for_everyone(agent: str, no_colour: str, coloured: bool) -> None:
    """NO_COLOR counts if it is not empty; the agent's log heeds it, too."""
    log = "from lazymesh.roles.logs import *; configure_logging('text', 'info'); structlog.get_logger().info('x')"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", no_colour)
        check, words = (
            on_terminal("-m", "lazymesh", "check", agent=agent),
            on_terminal("-c", log, agent=agent),
        )
    assert ("kernel" in check, "x" in words) == (True, True)
    assert ("\x1b[" in check, "\x1b[" in words) == (coloured, coloured)


def on_terminal(*words: str, agent: str) -> str:
    """Run Python at a terminal; return what is to be seen there."""
    master, slave = os.openpty()
    env = os.environ | {"LAZYMESH_CLUSTERMESH_CONFIG": str(Path(agent).parent), "TERM": "xterm"}
    seen = b""
    with (
        os.fdopen(master, "rb", buffering=0) as terminal,
        subprocess.Popen([sys.executable, *words], stdout=slave, stderr=slave, env=env),
    ):
        os.close(slave)
        with contextlib.suppress(OSError):  # nobody has it open any more
            while piece := terminal.read(4096):
                seen += piece
    return seen.decode()


@pytest.mark.parametrize("command", [(), ("ipcache",), ("config",)], ids=" ".join)
def test_command_that_wants_another_word_shows_its_help(command: tuple[str, ...], agent: str) -> None:
    """As it is laid out, a line for each command; it is wrong usage all the same."""
    code, words = lazymesh(command, agent, subprocess.DEVNULL)
    assert code == 2
    assert words.startswith(f"Usage: {' '.join(('lazymesh', *command))} [OPTIONS] COMMAND")
    assert "\nCommands:\n" in words
