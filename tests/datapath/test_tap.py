"""The TAP device: made with every offload, gone with its descriptor, patient with a holder that is still leaving."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.tap import NAMES, open_tap, try_tap
from lazymesh.errors import DatapathError
from tests.datapath.conftest import open_descriptors
from tests.support.namespaces import Namespace, NamespaceSet

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def node() -> Iterator[Namespace]:
    """Return a namespace of the tests' own."""
    with NamespaceSet(["node"]) as spaces:
        yield spaces["node"]


def test_a_device_lives_as_long_as_its_descriptor(node: Namespace) -> None:
    """It starts down, and no child inherits it."""
    tap = node.call(open_tap)
    assert tap.name == NAMES[0]
    assert f"{tap.ifindex}: {tap.name}: <BROADCAST,MULTICAST> mtu 1500" in node.run("ip", "link")
    assert not os.get_inheritable(tap.fd)
    os.close(tap.fd)
    assert tap.name not in node.run("ip", "link")


def test_a_name_is_waited_for(node: Namespace) -> None:
    """The last holder needs a moment to give back what it has."""
    old = node.call(open_tap)
    timer = threading.Timer(0.2, os.close, [old.fd])
    timer.start()
    new = node.call(open_tap)
    timer.join()
    assert new.name == NAMES[0]
    os.close(new.fd)


def test_another_name_is_taken_if_it_never_comes_free(node: Namespace) -> None:
    """A holder that hangs keeps its device."""
    old = node.call(open_tap)
    new = node.call(open_tap)
    assert new.name == NAMES[1]
    os.close(new.fd)
    os.close(old.fd)


def test_a_name_that_somebody_else_has_is_passed_over(node: Namespace) -> None:
    """A device that is no TAP never comes free; when all names are taken, that is what is said."""
    node.ip([f"link add {NAMES[0]} type veth peer name other"])
    try:
        new = node.call(open_tap)
        assert new.name == NAMES[1]
        os.close(new.fd)
        with pytest.raises(DatapathError, match=r"cannot make a TAP device: lm_hold0 and other are taken"):
            node.call(lambda: open_tap((NAMES[0], "other")))
    finally:
        node.ip([f"link del {NAMES[0]}"])


def test_a_kernel_without_udp_segments_is_asked_for_the_rest(
    node: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before 6.2; any other refusal means that no device will do, and leaves none."""
    asked: list[int] = []
    refusal, ioctl = errno.EINVAL, fcntl.ioctl

    def refusing(fd: int, request: int, argument: int | bytes) -> object:
        if not isinstance(argument, int):
            return ioctl(fd, request, argument)
        asked.append(argument)
        if argument & 0x60:
            raise OSError(refusal, os.strerror(refusal))
        return ioctl(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", refusing)
    new = node.call(open_tap)
    assert (new.udp_gso, asked) == (False, [0x6F, 0x0F])
    os.close(new.fd)
    refusal = errno.EPERM
    with pytest.raises(DatapathError, match="with all offloads: Operation not permitted"):
        node.call(open_tap)
    assert "lm_" not in node.run("ip", "link")


def test_trying_leaves_nothing(node: Namespace) -> None:
    """The check makes one and lets it go."""
    node.call(try_tap)
    assert "lm_" not in node.run("ip", "link")


def test_what_is_missing_is_named(node: Namespace, tmp_path: Path) -> None:
    """No device file, or one that is something else; nothing stays open."""
    before = open_descriptors()
    with pytest.raises(DatapathError, match=r"cannot open .*nowhere"):
        open_tap(path=tmp_path / "nowhere")
    with pytest.raises(DatapathError, match="cannot make the TAP device lm_hold0"):
        open_tap(path=Path("/dev/null"))
    assert open_descriptors() == before
