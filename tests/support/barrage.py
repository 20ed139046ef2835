"""Sends numbered frames through the loaded programs and holds what they do against the reference of frames.py.

Verdict and bytes are looked at after each frame, counters and signals after each small batch; when a batch is wrong its
frames are sent again one by one, so that the complaint names the frame by its number.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazymesh.core.model import Direction
from lazymesh.datapath.perfbuffer import PerfBuffer
from lazymesh.datapath.settingsmap import OnMiss
from tests.support import frames
from tests.support.misses import signal_of
from tests.support.prog_run import TC_ACT_SHOT, TC_ACT_UNSPEC, QuickRun, Tap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.datapath.conftest import Bench
    from tests.support.frames import Expected, Frame
    from tests.support.misses import Signal

BATCH = 64
_PAGES = 16
_ROOM = 32_768

SETTINGS: dict[str, dict[str, object]] = {
    "pass": {},
    "drop": {"on_miss": OnMiss.DROP},
    "policy": {"enforced": frozenset(Direction)},
}
"""Every packet goes on; missed ones are dropped; nobody in the mesh may talk to us."""

_POLICY = ("policy_allow", "policy_reply", "policy_fragment", "policy_deny")


@dataclass
class Tally:
    """What became of the frames, by cause; ``refused``: the kernel made no packet of them."""

    causes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {cause}" for cause, count in sorted(self.causes.items()))


class WrongError(AssertionError):
    """A batch did not become what the reference says; the words say how."""


class Barrage:
    """One campaign over a bench, which it fills and configures."""

    def __init__(self, bench: Bench, mode: str = "pass") -> None:
        self._bench = bench
        self._mode = mode
        self.tally = Tally()
        bench.wipe()
        bench.entries(frames.ENTRIES)
        bench.mesh(frames.MESH)
        unlimited = {"rearm_s": 0, "interface_rate": 0, "uplink_rate": 0, "global_rate": 0}
        bench.configure(**unlimited, **SETTINGS[mode])
        self._runs = {each: QuickRun(bench.datapath.program(each)[1], _ROOM) for each in Direction}
        self._signals: list[Signal | None] = []
        self._seen: Counter[tuple[Direction, str]] = Counter()

    def send(self, seed: int, numbers: Sequence[int]) -> None:
        """Send frames by test runs; AssertionError names the first that went wrong."""
        self._in_batches(seed, numbers, lambda each: self._check(each, frames.expected, self._run))

    def receive(self, tap: Tap, seed: int, numbers: Sequence[int]) -> None:
        """Have a device receive them, as what a pod sends: this one takes frames of any length, and tags off."""
        write = self._written_to(tap)
        self._in_batches(
            seed, numbers, lambda each: self._check(each, frames.expected_of_device, write), device=True
        )

    def _in_batches(
        self,
        seed: int,
        numbers: Sequence[int],
        check: Callable[[Sequence[Frame]], None],
        *,
        device: bool = False,
    ) -> None:
        def of(number: int) -> Frame:
            made = frames.frame(seed, number)
            return made._replace(direction=Direction.EGRESS, gso_size=0) if device else made

        with self._reading():
            for at in range(0, len(numbers), BATCH):
                batch = numbers[at : at + BATCH]
                try:
                    check([of(number) for number in batch])
                except WrongError as wrong:
                    for number in batch:
                        with self._blaming(seed, number, of(number)):
                            check([of(number)])
                    raise AssertionError(
                        f"seed {seed}, frames {batch[0]} to {batch[-1]} together: {wrong}"
                    ) from None

    @contextlib.contextmanager
    def _blaming(self, seed: int, number: int, frame: Frame) -> Iterator[None]:
        try:
            yield
        except WrongError as wrong:
            words = f"{frame.direction.name.lower()}, gso {frame.gso_size}, {len(frame.data)} bytes"
            shown = frame.data[:120].hex()
            raise AssertionError(f"seed {seed}, frame {number} ({words}): {wrong}\n{shown}") from None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        take = lambda records: self._signals.extend(map(signal_of, records))  # noqa: E731
        self._ring = PerfBuffer(self._bench.datapath.signals.events, _PAGES, take)
        try:
            self._seen = self._counts()
            yield
        finally:
            self._ring.close()

    def _check(
        self,
        batch: Sequence[Frame],
        expect: Callable[[Frame], Expected | None],
        send: Callable[[Frame], tuple[int, bool] | None],
    ) -> None:
        counts: Counter[tuple[Direction, str]] = Counter()
        signals: list[tuple[int, Direction, bytes]] = []
        judged = dropped = 0
        for frame in batch:
            sent = send(frame)
            wanted = expect(frame)
            if sent is None or wanted is None:
                self.tally.causes["refused"] += 1
                continue
            verdict, untouched = sent
            self.tally.causes[wanted.cause] += 1
            counts[frame.direction, wanted.cause] += 1
            if wanted.signal is not None:
                signals.append(wanted.signal)
            in_mesh = self._mode == "policy" and wanted.peer is not None and frames.in_mesh(wanted.peer)
            judged += in_mesh
            dropped += verdict == TC_ACT_SHOT
            drop = in_mesh or (self._mode == "drop" and wanted.cause == "missed")
            if not untouched or verdict not in (
                {TC_ACT_UNSPEC, TC_ACT_SHOT} if in_mesh else {_verdict(drop)}
            ):
                self._forget()
                raise WrongError(
                    f"verdict {verdict}, expected {_verdict(drop)} of {wanted}; untouched: {untouched}"
                )
        self._compare(counts, signals, judged, dropped)

    def _compare(
        self,
        counts: Counter[tuple[Direction, str]],
        signals: list[tuple[int, Direction, bytes]],
        judged: int,
        dropped: int,
    ) -> None:
        moved, told = self._forget()
        for direction in Direction:
            missed = counts[direction, "missed"]
            counts[direction, "signalled"] = missed
            counts[direction, "missed_drop"] = missed if self._mode == "drop" else 0
        policy = Counter({key: moved.pop(key) for key in list(moved) if key[1] in _POLICY})
        if +counts != +moved:
            raise WrongError(f"counted {dict(+moved)}, expected {dict(+counts)}")
        if told != sorted(signals):
            raise WrongError(f"signalled {told}, expected {sorted(signals)}")
        denied = sum(count for (_, name), count in policy.items() if name == "policy_deny")
        if self._mode == "policy" and (policy.total(), denied) != (judged, dropped):
            raise WrongError(
                f"policy counted {dict(policy)}, but {judged} were its business and {dropped} dropped"
            )

    def _forget(self) -> tuple[Counter[tuple[Direction, str]], list[tuple[int, Direction, bytes]]]:
        """Return how far the counters have moved, and what was signalled, since last time."""
        self._ring.consume()
        signals, self._signals[:] = list(self._signals), []
        before, self._seen = self._seen, self._counts()
        told = [(one.cluster_id, one.direction, one.address) for one in signals if one is not None]
        if len(told) != len(signals) or self._ring.lost:
            raise WrongError(f"{len(signals) - len(told)} signals are none, {self._ring.lost} were lost")
        moved = Counter({key: self._seen[key] - before[key] for key in self._seen})
        return moved, sorted(told)

    def _counts(self) -> Counter[tuple[Direction, str]]:
        return Counter(
            {
                (direction, name): count
                for direction in Direction
                for name, count in self._bench.counts(direction).items()
            }
        )

    def _run(self, frame: Frame) -> tuple[int, bool] | None:
        try:
            return self._runs[frame.direction](frame.data, frame.gso_size)
        except OSError:
            return None

    @staticmethod
    def _written_to(tap: Tap) -> Callable[[Frame], tuple[int, bool]]:
        def write(frame: Frame) -> tuple[int, bool]:
            tap.receive(frame.data)
            return TC_ACT_UNSPEC, True  # what becomes of it there, only the counters tell

        return write


def _verdict(drop: bool) -> int:
    return TC_ACT_SHOT if drop else TC_ACT_UNSPEC
