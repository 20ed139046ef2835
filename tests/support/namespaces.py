"""Network namespaces that never outlive the run: made in batches, entered by thread or child, always removed.

Names are ``lm-<pid>-<n>-<name>``, so runs side by side do not meet, and a later run can tell and remove what
a killed one left. ``ip netns exec`` is not used to enter: it remounts /sys, which hides bpffs from what runs
inside.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

P = ParamSpec("P")
T = TypeVar("T")

RUN_DIR = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_OURS = re.compile(r"lm-(\d+)-\d+-.*")
_SERIAL = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One network namespace by name; a thread or a child enters it, never the calling thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = RUN_DIR / name

    def __repr__(self) -> str:
        return f"<Namespace {self.name}>"

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in a short-lived thread inside the namespace; sockets it makes stay inside."""
        future: Future[T] = Future()

        def inside() -> None:
            try:
                self._enter()
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=inside, name=f"in {self.name}")
        thread.start()
        thread.join()
        return future.result()

    def command(self, *argv: str | os.PathLike[str]) -> list[str]:
        """Return the words that run a command inside; the pid is the command's own."""
        return ["nsenter", f"--net={self.path}", "--", *map(os.fspath, argv)]

    def popen(self, *argv: str | os.PathLike[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside, in a session of its own, so that Ctrl-C reaches it only through us."""
        return subprocess.Popen(self.command(*argv), start_new_session=True, **options)

    def run(self, *argv: str | os.PathLike[str], timeout: float = 60, check: bool = True) -> str:
        """Run a command inside to its end and return its stdout."""
        done = subprocess.run(
            self.command(*argv), check=False, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise RuntimeError(f"in {self.name}: {' '.join(map(str, argv))}: {done.stderr.strip()}")
        return done.stdout

    def ip(self, lines: Iterable[str]) -> None:
        """Run ``ip`` command lines inside, in one batch."""
        ip_batch(lines, inside=self)

    def sysctl(self, values: dict[str, int | str]) -> None:
        """Write settings below net/, given as ``ipv4/ip_forward``."""
        self.call(_write_sysctls, values)

    def pids(self) -> list[int]:
        """Return the processes that run inside: all of them were started by us, directly or not."""
        here = self.path.stat()
        return [pid for pid in _all_pids() if _netns_of(pid) == (here.st_dev, here.st_ino)]

    def _enter(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter network namespace {self.name}; needs root")
        finally:
            os.close(descriptor)


class NamespaceSet:
    """The namespaces of one lab, made together and removed together, with the processes still inside."""

    def __init__(self, names: Sequence[str]) -> None:
        prefix = f"lm-{os.getpid()}-{next(_SERIAL)}-"
        self._namespaces = {name: Namespace(prefix + name) for name in names}

    def __getitem__(self, name: str) -> Namespace:
        return self._namespaces[name]

    def __enter__(self) -> Self:
        atexit.register(self.remove)
        try:
            ip_batch(f"netns add {space.name}" for space in self._namespaces.values())
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Kill what still runs inside and delete the namespaces; safe to call twice."""
        atexit.unregister(self.remove)
        _remove([space for space in self._namespaces.values() if space.path.exists()])


def ip_batch(lines: Iterable[str], inside: Namespace | None = None) -> None:
    """Run ``ip`` command lines in one process; the first that fails is named in the error."""
    argv = ["ip", "-batch", "-"]
    text = "\n".join(lines) + "\n"
    argv = inside.command(*argv) if inside else argv
    done = subprocess.run(argv, check=False, input=text, capture_output=True, text=True, timeout=60)
    if done.returncode:
        failed = re.search(r"Command failed -:(\d+)", done.stderr)
        line = text.splitlines()[int(failed[1]) - 1] if failed else text
        raise RuntimeError(f"ip {line}: {done.stderr.strip()}")


def sweep() -> None:
    """Remove the namespaces of runs that were killed before they could clean up."""
    if not RUN_DIR.is_dir():
        return
    stale = [
        Namespace(path.name)
        for path in RUN_DIR.iterdir()
        if (ours := _OURS.fullmatch(path.name)) and not Path("/proc", ours[1]).exists()
    ]
    # Another lab may be sweeping too: what it has removed first is as gone.
    with contextlib.suppress(RuntimeError, FileNotFoundError):
        _remove(stale)


def stop_process(process: subprocess.Popen[Any], *, grace: float = 10) -> int:
    """Ask a child of ours to end, insist after the grace, and return its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()
    return code


@contextlib.contextmanager
def tidy_signals() -> Any:
    """Turn SIGTERM and SIGHUP into an ordinary exit, so that every ``with`` above gets to clean up.

    SIGINT becomes KeyboardInterrupt also where it was ignored: a shell's background job is started that way.
    """

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def uninterrupted() -> Any:
    """Hold back Ctrl-C and its kin while cleaning up: a second one must not leave half of it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove(namespaces: list[Namespace]) -> None:
    if not namespaces:
        return
    _kill_inside(namespaces)
    ip_batch(f"netns del {space.name}" for space in namespaces)


def _kill_inside(namespaces: list[Namespace]) -> None:
    homes = set()
    for space in namespaces:
        where = space.path.stat()
        homes.add((where.st_dev, where.st_ino))
    deadline = time.monotonic() + 5
    while left := [pid for pid in _all_pids() if _netns_of(pid) in homes]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - a Path for each is slow


def _netns_of(pid: int) -> tuple[int, int] | None:
    try:
        where = os.stat(f"/proc/{pid}/ns/net")  # noqa: PTH116 - as above
    except OSError:
        return None
    return where.st_dev, where.st_ino


def _write_sysctls(values: dict[str, int | str]) -> None:
    for name, value in values.items():
        Path("/proc/sys/net", name).write_text(f"{value}\n", encoding="ascii")
