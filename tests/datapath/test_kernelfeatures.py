"""What is tried of a kernel is what it does."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Entry
from lazymesh.datapath import kernelfeatures
from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.datapath.libbpf import MAP_TYPE_LPM_TRIE
from tests.support.packets import NODE_B, POD_B1

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.datapath.libbpf import Map

ENTRY = Entry(131_073, NODE_B.address(4), 0, 2)
OTHER = Entry(131_074, NODE_B.address(4), 3, 2)
B1 = POD_B1.address(4)


def test_probe_of_noexist_agrees_with_the_kernel(make_map: Callable[..., Map]) -> None:
    """What the probe says is what an insert over an existing prefix does."""
    ipcache = IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, 24), Path("/a/pin"))
    ipcache.insert(B1, ENTRY)
    refused = not ipcache.insert(B1, OTHER)
    assert kernelfeatures.kernel_honours_noexist() is refused
    assert (ipcache.lookup(B1) == ENTRY) is refused


def test_version_is_the_numbers_of_the_release() -> None:
    """Compared as numbers: 5.10 came after 5.9."""
    assert kernelfeatures.version_of("6.1.0-18-amd64") == (6, 1, 0, 18, 64)
    assert kernelfeatures.version_of("5.10-rc7") > kernelfeatures.version_of("5.9.16")
    assert len(kernelfeatures.kernel_version()) == 2


def test_probes_agree_with_the_kernel_s_version() -> None:
    """What a probe tries came with a release, and no stable kernel was given it later."""
    version = kernelfeatures.kernel_version()
    assert kernelfeatures.has_lpm_batches() == (version >= (5, 13))
    assert kernelfeatures.has_tcx() == (version >= (6, 6))


def test_question_for_tcx_that_is_refused_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kernel does not know the question."""
    answers = [OSError(errno.EINVAL, "Invalid argument"), OSError(errno.EPERM, "Operation not permitted")]

    def ask(_ifindex: int) -> list[int]:
        raise answers.pop(0)

    monkeypatch.setattr(kernelfeatures, "tcx_programs", ask)
    assert not kernelfeatures.has_tcx.__wrapped__()
    with pytest.raises(PermissionError):
        kernelfeatures.has_tcx.__wrapped__()
