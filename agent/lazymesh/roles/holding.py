"""The agent's side of holding: keeps a holder process, sends it the answers, and shows the kernel that the agent lives.

Where holding is not possible the agent logs that once and runs as with ``--on-miss pass``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import structlog

from lazymesh.datapath.holdmaps import COOKIE_BITS, HoldLimits
from lazymesh.datapath.hooks import mend_tap, prepare_tap
from lazymesh.datapath.tap import NAMES
from lazymesh.errors import DatapathError
from lazymesh.roles.holdwire import (
    ANSWER,
    ANSWERS,
    BEGIN,
    CAUSE_NUMBERS,
    FAMILIES,
    GO,
    ON,
    QUIT,
    SETTINGS,
    UP,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lazymesh.core.hold import Cause
    from lazymesh.core.model import Address
    from lazymesh.datapath.holdmaps import HoldControl
    from lazymesh.datapath.netlinkthread import NetlinkThread
    from lazymesh.datapath.program import Datapath

log = structlog.get_logger()

BEAT_S = 0.03
"""Far less than the silence after which the kernel stops parking (HOLD_AGENT_STALE_NS)."""
RESTART_S = 1.0
RETRY_MOST_S = 60.0
"""While holding is not possible, each retry comes after twice the pause of the last one, up to this."""
BIRTH_S = 20.0
"""A holder that has not started by then is killed. (One starts in 0.2 s, ten times as long on emulated processors.)"""
HUNG_S = 1.0
HUNG_LOOKS = 5
"""A holder silent this long at this many looks in a row is killed. (One look may follow the agent's own silence.)"""
ANSWERS_PER_DATAGRAM = 1_000

State = Literal["off", "starting", "on", "failed"]


@dataclass(frozen=True, slots=True)
class HoldSettings:
    """What a user may set about holding; how much may be parked is fixed (``HoldLimits``)."""

    limit_s: float = 0.25
    """A packet that has waited this long without an answer is released."""
    drop_on_timeout: bool = False


class HolderProcess:
    """A holder that waits for BEGIN: the first one is started while the programs are compiled or loaded."""

    def __init__(self, pins: Path) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        """Our end of its socket."""
        self.ours.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 (the same interpreter, our module)
                [sys.executable, "-m", "lazymesh.roles.holder", str(theirs.fileno()), str(pins)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the agent, which ends the holder
            )

    async def end(self) -> None:
        """Have it give everything back, and wait for its end; harmless if it has ended."""
        with contextlib.suppress(OSError):
            self.ours.send(QUIT)
        self.ours.close()
        await asyncio.to_thread(_wait_for, self._process)


class Holding:
    """Keeps a holder process.

    first: the holder to begin with, if there is one already.
    """

    def __init__(
        self,
        datapath: Datapath,
        control: HoldControl,
        settings: HoldSettings,
        netlink: NetlinkThread,
        first: HolderProcess | None = None,
    ) -> None:
        self.state: State = "off"
        self.problem: str | None = None
        """Why packets are not held although they should be; set while the state is ``failed``."""
        self.restarts = 0
        self.answers_dropped = 0
        """Answers that a holder failed to take; its packets are released after the time limit."""
        self._wanted = asyncio.Event()
        self._datapath = datapath
        self._control = control
        self._settings = settings
        self._netlink = netlink
        self._first = first
        self._socket: socket.socket | None = None
        self._answers: list[bytes] = []

    @property
    def summary(self) -> str:
        """Return the state for people: off, starting, on, or what is wrong."""
        return self.problem or self.state

    def want(self) -> None:
        """Start holding."""
        if not self._wanted.is_set():
            self._set("starting")
            self._wanted.set()

    async def run(self) -> None:
        """Keep a holder until cancelled; then it gives everything back and ends."""
        await self._wanted.wait()
        beat = asyncio.create_task(self._beat())
        pause = RESTART_S
        try:
            while True:
                began = time.monotonic()
                try:
                    await self._one_life()
                except (DatapathError, OSError) as exc:
                    if self.problem != str(exc):
                        log.warning("cannot hold packets; missed ones are passed on", error=str(exc))
                    self._set("failed", str(exc))
                    pause = min(2 * pause, RETRY_MOST_S)
                else:
                    pause = RESTART_S
                    self.restarts += 1
                    self._set("failed", "the holder died and is being restarted")
                    log.error(
                        "the holder died, or was killed because it hung: the packets it held are lost, missed ones"
                        " are passed on meanwhile"
                    )
                await asyncio.sleep(max(0.0, pause - (time.monotonic() - began)))
        finally:
            beat.cancel()

    def answer(self, addresses: Iterable[Address], cause: Cause) -> None:
        """Release the packets that wait for these addresses."""
        if self._socket is None:
            return
        now_ns, number = time.monotonic_ns(), CAUSE_NUMBERS[cause]
        # A storm of misses may delay the next beat; this is as good a sign of life.
        self._control.beat(now_ns)
        for address in addresses:
            key = FAMILIES[len(address)] + address.ljust(16, b"\0")
            self._answers.append(ANSWER.pack(number, key, now_ns / 1e9))

    def flush(self) -> None:
        """Send the answers of one step of the agent: one datagram for all of them, if it holds them."""
        answers, self._answers = self._answers, []
        for at in range(0, len(answers), ANSWERS_PER_DATAGRAM):
            part = answers[at : at + ANSWERS_PER_DATAGRAM]
            try:
                if self._socket is not None:
                    self._socket.send(ANSWERS + b"".join(part))
            except OSError:  # it hangs or is gone: the time limit, or its end, releases the packets
                self.answers_dropped += len(part)

    def _set(self, state: State, problem: str | None = None) -> None:
        self.state, self.problem = state, problem

    async def _beat(self) -> None:
        while True:
            self._control.beat(time.monotonic_ns())
            await asyncio.sleep(BEAT_S)

    async def _one_life(self) -> None:
        """Run one holder until it ends; DatapathError when it cannot begin."""
        holder, self._first = self._first or HolderProcess(self._datapath.pins.directory), None
        try:
            tap = await self._handshake(holder.ours)
            self._set("on")
            await self._watch(holder.ours, tap)
        except ConnectionError:
            return
        finally:
            self._socket = None
            await holder.end()

    async def _watch(self, ours: socket.socket, tap: int) -> None:
        """Return when the holder has ended or hangs for good; until then repair its TAP when it was changed."""
        looks = 0
        while looks < HUNG_LOOKS:
            try:
                async with asyncio.timeout(HUNG_S):
                    await asyncio.get_running_loop().sock_recv(ours, 1)
            except TimeoutError:
                silent_s = time.monotonic() - self._control.holder_beat() / 1e9
                looks = looks + 1 if silent_s > HUNG_S else 0
                if looks:
                    self._set("failed", "the holder hangs")
                else:
                    self._set("on")
                if await self._netlink.run(mend_tap(self._datapath, tap)):
                    log.warning("the holder's TAP device was changed, and has been repaired")
            else:
                return

    async def _handshake(self, ours: socket.socket) -> int:
        """Prepare the holder's TAP and let the holder start; return the TAP's index once packets are parked there."""
        ours.send(BEGIN)
        tap = json.loads(await _hear(ours, UP))
        if tap["name"] != NAMES[0]:
            log.warning(
                "the TAP's usual name is taken, by a hung holder or another device",
                name=tap["name"],
                usual=NAMES[0],
            )
        await self._netlink.run(prepare_tap(self._datapath, tap["ifindex"], tap["name"]))
        self._control.set_limits(HoldLimits(), self._settings.limit_s)
        self._datapath.config.change(hold_cookie=secrets.randbelow((1 << COOKIE_BITS) - 1) + 1)
        words = {"limit_s": self._settings.limit_s, "drop_on_timeout": self._settings.drop_on_timeout}
        ours.send(SETTINGS + json.dumps(words).encode())
        ours.send(GO)
        self._socket = ours  # it may park before we hear of it, and wants the answers to that
        await _hear(ours, ON)
        return int(tap["ifindex"])


async def _hear(ours: socket.socket, expected: bytes) -> bytes:
    """Return what follows the holder's next word; DatapathError with the reason if it is another, or none."""
    try:
        async with asyncio.timeout(BIRTH_S):
            datagram = await asyncio.get_running_loop().sock_recv(ours, 65_536)
    except TimeoutError as exc:
        raise DatapathError(f"the holder has not started in {BIRTH_S:g} s") from exc
    if datagram[:1] != expected:
        raise DatapathError(datagram[1:].decode() or "the holder ended without giving a reason")
    return datagram[1:]


def _wait_for(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
