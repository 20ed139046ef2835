"""The folder is the tier: marks tests by it, and says what a machine lacks to run them.

A missing need skips the test with the need named. Under CI (``CI=true``) the same skip is a failure: a
pipeline that silently runs nothing looks green.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from lazymesh.datapath import kernelfeatures
from lazymesh.datapath.kernelfeatures import kernel_honours_noexist
from tests.support.rtnl import has_userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).parent

# A test that takes long has a busy machine to thank, not the example that was drawn.
hypothesis.settings.register_profile("unhurried", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("unhurried")

os.environ.setdefault(
    "LAZYMESH_PROGRAM_CACHE", str(Path(tempfile.gettempdir(), "lazymesh-tests", "programs.json"))
)
"""Where agents keep what was compiled, if a test does not say: one of the first compiles for all the others."""

PATIENCE_SECONDS = int(os.environ.get("LAZYMESH_TEST_PATIENCE", "120"))
"""For one test; a hanging one must fail by name instead of taking the whole run with it."""

SKIPS_ALLOWED_IN_CI: dict[str, str] = {}
"""Needs that a build machine may lack, each with the reason."""


def _is_root() -> bool:
    return os.geteuid() == 0


def _has_bcc() -> bool:
    return importlib.util.find_spec("bcc") is not None


def _has_clang() -> bool:
    return shutil.which("clang-14") is not None


def _has_etcd() -> bool:
    return shutil.which("etcd") is not None


def _can_make_namespaces() -> bool:
    attempt = ["unshare", "--net", "true"]
    return _is_root() and subprocess.run(attempt, check=False, capture_output=True).returncode == 0


def _has_helm() -> bool:
    return shutil.which("helm") is not None or (TESTS.parent / ".cache/bin/helm").exists()


def _has_kubernetes() -> bool:
    return (TESTS.parent / ".cache/kubernetes/version").exists()


def _has_history() -> bool:
    words = ["git", "-C", str(TESTS), "rev-parse", "--is-shallow-repository"]
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout == "false\n"


def _can_build_images() -> bool:
    return all(shutil.which(name) for name in ("buildah", "mmdebstrap"))


def _has_crun() -> bool:
    return shutil.which("crun") is not None and shutil.which("capsh") is not None


def _has_tcx() -> bool:
    return kernelfeatures.has_tcx()


def _honours_noexist() -> bool:
    return kernel_honours_noexist()


def _has_machines() -> bool:
    return "LAZYMESH_VM_SYSTEM" in os.environ


NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    "root": ("run as root", _is_root),
    "bcc": ("install python3-bpfcc", _has_bcc),
    "clang": ("install clang-14", _has_clang),
    "etcd": ("install etcd-server", _has_etcd),
    "network namespaces": ("allow this container to make network namespaces", _can_make_namespaces),
    "earlier versions": ("clone the whole history: git fetch --unshallow", _has_history),
    "helm": ("run scripts/helm --build once", _has_helm),
    "Kubernetes": ("run scripts/kubernetes --build once", _has_kubernetes),
    "buildah": ("install buildah and mmdebstrap", _can_build_images),
    "crun": ("install crun and libcap2-bin", _has_crun),
    "tcx": ("run on kernel 6.6 or later", _has_tcx),
    "userfaultfd": ("allow this container to call userfaultfd", has_userfaultfd),
    "BPF_NOEXIST": (
        "run on a kernel that honours it on LPM tries: 6.13, or a later stable one",
        _honours_noexist,
    ),
    "virtual machines": ("run scripts/vm test, which installs and starts all of it", _has_machines),
}

TIERS: dict[str, tuple[str, ...]] = {
    "unit": (),
    "datapath": ("root", "bcc"),
    "mesh": ("root", "bcc", "etcd", "network namespaces"),
    "ship": ("root", "etcd", "network namespaces", "buildah", "crun"),
    "vm": ("root", "virtual machines"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run be repeated that found something."""
    parser.addoption(
        "--frames-seed", type=int, help="seed of the hostile frames; a failed test prints its own"
    )
    parser.addoption(
        "--fault-seed",
        type=int,
        default=6,
        help="what faults are drawn from; a run prints its own (default: 6)",
    )


@pytest.fixture(scope="session")
def fault_seed(request: pytest.FixtureRequest) -> int:
    """Return what faults are to be drawn from."""
    seed: int = request.config.getoption("--fault-seed")
    return seed


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks for a single test's further needs."""
    config.addinivalue_line("markers", "needs(name, ...): what this one test needs beyond its tier")
    config.addinivalue_line(
        "markers", f"patience(seconds): how long this test may take, if not {PATIENCE_SECONDS}"
    )


@pytest.hookimpl(trylast=True)  # after the order was drawn by chance
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the folder it lives in; files that take long come first, so that nobody waits for them."""
    for item in items:
        if item.path.is_relative_to(TESTS):
            tier = item.path.relative_to(TESTS).parts[0]
            if tier in TIERS:
                item.add_marker(tier)
    long = {item.path for item in items if item.get_closest_marker("patience")}
    # The image is made by the first file that needs it, and the others of its tier would wait for that.
    items.sort(key=lambda item: 0 if item.path in long else 2 if item.get_closest_marker("ship") else 1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, or fail if this is a build machine."""
    needs = [need for tier, wanted in TIERS.items() if item.get_closest_marker(tier) for need in wanted]
    needs += [need for mark in item.iter_markers("needs") for need in mark.args]
    lacking = [need for need in needs if not _met(need)]
    if not lacking:
        return
    words = "; ".join(f"needs {need}: {NEEDS[need][0]}" for need in lacking)
    if os.environ.get("CI") == "true" and not SKIPS_ALLOWED_IN_CI.keys() >= set(lacking):
        pytest.fail(f"{words} (a skip anywhere else, a failure under CI)", pytrace=False)
    pytest.skip(words)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a test that hangs."""
    mark = item.get_closest_marker("patience")
    seconds = mark.args[0] if mark else PATIENCE_SECONDS

    def give_up(_number: int, _frame: object) -> None:
        pytest.fail(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def _met(need: str) -> bool:
    return NEEDS[need][1]()
