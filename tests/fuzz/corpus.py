"""The inputs that a decoder is tried with: a text file for each target, an input a line in base64."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType, FrameType

    Arc = tuple[CodeType, int, int]
    """From a line to a line of some code; to -1 when it raises."""

FOLDER = Path(__file__).parent / "corpus"
MOST_BYTES = 12 << 10
"""Of a target's file: what is found more often is found again soon."""


def kept(target: str) -> list[bytes]:
    """Return the inputs kept in the repository."""
    path = FOLDER / f"{target}.txt"
    return (
        [base64.b64decode(line) for line in path.read_text(encoding="ascii").split()] if path.exists() else []
    )


def keep(target: str, found: Iterable[bytes]) -> int:
    """Keep what reaches all that these do, the shortest for each step, and then others while there is room.

    Return how many. Much is decoded in C, of whose steps nothing is known here.
    """
    seen: set[Arc] = set()
    lines: list[str] = []
    others: list[str] = []
    for data in sorted({*found, *kept(target), *TARGETS[target].seeds}, key=lambda one: (len(one), one)):
        line = base64.b64encode(data).decode() + "\n"
        arcs = _arcs(TARGETS[target].try_one, data) - seen
        seen |= arcs
        (lines if arcs else others).append(line)
    chosen: list[str] = []
    room = MOST_BYTES
    for line in lines + others:
        if len(line) <= room:
            chosen.append(line)
            room -= len(line)
    (FOLDER / f"{target}.txt").write_text("".join(chosen), encoding="ascii")
    return len(chosen)


def _arcs(try_one: Callable[[bytes], None], data: bytes) -> set[Arc]:
    """Return which steps from line to line of our code, and of what it decodes with, an input takes."""
    arcs: set[Arc] = set()

    def enter(frame: FrameType, _event: str, _arg: object) -> object:
        code, last = frame.f_code, [0]
        if not any(word in code.co_filename for word in ("lazymesh", "hpack", "yaml")):
            return None

        def step(frame: FrameType, event: str, _arg: object) -> object:
            if event == "line":
                arcs.add((code, last[0], frame.f_lineno))
                last[0] = frame.f_lineno
            elif event == "exception":
                arcs.add((code, frame.f_lineno, -1))
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        try_one(data)
    finally:
        sys.settrace(before)
    return arcs
