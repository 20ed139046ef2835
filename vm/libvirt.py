"""A libvirt of our own, out of everybody's way.

    python vm/libvirt.py DIRECTORY

In network and mount namespaces of its own, so that bridges, firewall rules, sockets and settings are seen by nobody
else; who talks to it enters them by the process whose number is in DIRECTORY/pid, once it is ready. Ends with SIGTERM.

It reaps what is orphaned below it: libvirt asks QEMU what it can by a daemon whose end it waits for, and where PID 1
does not reap at once each question takes many seconds. And QEMU runs as root, like libvirt: where /dev/kvm is root's
alone the two see different machines otherwise, and libvirt asks again at each call.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS, CLONE_NEWNET = 0x0002_0000, 0x4000_0000
SETTINGS = """\
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
"""
PATIENCE_S = 30


def enter(state: Path) -> None:
    """Become a reaper in namespaces of our own, with libvirt's directories replaced by ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) or libc.unshare(CLONE_NEWNET | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _run("mount", "--make-rprivate", "/")
    _run("ip", "link", "set", "lo", "up")
    shutil.copytree("/etc/libvirt", state / "etc", dirs_exist_ok=True)
    (state / "etc/qemu.conf").write_text(SETTINGS, encoding="ascii")
    shutil.rmtree(state / "etc/qemu/networks", ignore_errors=True)
    for ours, theirs in (("etc", "/etc/libvirt"), ("run", "/run/libvirt"), ("lib", "/var/lib/libvirt")):
        (state / ours).mkdir(exist_ok=True)
        Path(theirs).mkdir(exist_ok=True)
        _run("mount", "--bind", str(state / ours), theirs)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


def make_ready(state: Path, ours: int) -> None:
    """Wait until libvirt answers, give it a place for disks, and say who to ask for."""
    (state / "pool").mkdir()
    until = time.monotonic() + PATIENCE_S
    virsh = ("virsh", "--quiet", "--connect", "qemu:///system")
    while subprocess.run([*virsh, "version"], capture_output=True, check=False).returncode:
        if time.monotonic() > until:
            raise SystemExit("vm: libvirt does not answer")
        time.sleep(0.2)
    _run(*virsh, "pool-define-as", "lazymesh", "dir", "--target", str(state / "pool"))
    _run(*virsh, "pool-start", "lazymesh")
    (state / "fresh").write_text(f"{ours}\n", encoding="ascii")
    (state / "fresh").rename(state / "pid")


def main() -> None:
    """Start the two daemons, reap, and end with them."""
    state = Path(sys.argv[1]).resolve()
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    enter(state)
    daemons = [
        subprocess.Popen([name, "-p", str(state / f"{name}.pid")]) for name in ("virtlogd", "libvirtd")
    ]

    def stop(*_: object) -> None:
        for daemon in daemons:
            daemon.terminate()

    signal.signal(signal.SIGTERM, stop)
    ours = os.getpid()
    if os.fork() == 0:
        make_ready(state, ours)
        os._exit(0)
    living = {daemon.pid for daemon in daemons}
    while living:
        try:
            living.discard(os.wait()[0])
        except ChildProcessError:
            break


if __name__ == "__main__":
    main()
