"""Which kernel headers BCC gets to see, over trees as distributions lay them out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.headers import KernelHeaders, find_headers, merge_headers
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from pathlib import Path

ARCH = {"x86_64": "x86", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def install(modules: Path, release: str, *, split: bool = False, complete: bool = True) -> Path:
    """Lay out headers as a distribution does, Debian in two halves; returns the tree of the release."""
    tree, usr = modules / release, modules.parent / "usr" / release
    generated, rest = usr / "generated", usr / "common" if split else usr / "generated"
    files = {
        generated / "include/generated/autoconf.h": "generated",
        generated / f"arch/{ARCH}/include/generated/asm.h": "generated",
        rest / "include/linux/types.h": "rest",
        rest / f"arch/{ARCH}/include/uapi/asm.h": "rest",
    }
    for path, text in files.items():
        if complete or path.name != "autoconf.h":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    tree.mkdir(parents=True)
    (tree / "build").symlink_to(generated)
    if split:
        (tree / "source").symlink_to(rest)
    return tree


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """Return an empty /lib/modules."""
    path = tmp_path / "modules"
    path.mkdir()
    return path


def test_running_kernel_comes_first(modules: Path) -> None:
    """Even before newer ones: BCC finds those of the running kernel by itself."""
    install(modules, "6.1.0-5-amd64")
    install(modules, "6.12.0-1-amd64")
    found = find_headers(modules, "6.1.0-5-amd64")
    assert (found.release, found.running) == ("6.1.0-5-amd64", True)


def test_images_own_come_last(modules: Path, tmp_path: Path) -> None:
    """They are taken where the node has none that can be used, however new they are."""
    own = tmp_path / "own"
    own.mkdir()
    install(own, "6.1.0-56-amd64", split=True)
    install(modules, "5.10.0-30-amd64", complete=False)
    assert find_headers(modules, "6.18.44-fc", own).release == "6.1.0-56-amd64"
    install(modules, "5.10.0-31-amd64")
    assert find_headers(modules, "6.18.44-fc", own).release == "5.10.0-31-amd64"
    assert find_headers(tmp_path / "none", "6.18.44-fc", own).release == "6.1.0-56-amd64"


def test_newest_of_the_others_is_taken(modules: Path) -> None:
    """By number, not by alphabet."""
    for release in ("6.1.0-9-amd64", "6.1.0-56-cloud-amd64", "5.10.0-30-amd64"):
        install(modules, release)
    found = find_headers(modules, "6.18.44-fc")
    assert (found.release, found.running) == ("6.1.0-56-cloud-amd64", False)


def test_tree_without_generated_files_is_passed_over(modules: Path) -> None:
    """A kernel's modules without its headers, also for the running kernel."""
    install(modules, "6.1.0-5-amd64")
    install(modules, "6.12.0-1-amd64", complete=False)
    (modules / "6.13.0-1-amd64").mkdir()
    (modules / "6.14.0-1-amd64" / "build").parent.mkdir()
    (modules / "6.14.0-1-amd64" / "build").symlink_to("/nowhere")
    assert find_headers(modules, "6.12.0-1-amd64").release == "6.1.0-5-amd64"


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "no folder"])
def test_no_headers_at_all_name_the_package(modules: Path, there: bool) -> None:
    """The message says what to install, and that another kernel's will do."""
    with pytest.raises(
        DatapathError, match=r"install linux-headers-amd64.*another kernel than 6\.18\.44 will do"
    ):
        find_headers(modules if there else modules / "nowhere", "6.18.44")


def test_debian_s_two_halves_are_found(modules: Path) -> None:
    """The one called build has the generated files, source the rest."""
    install(modules, "6.1.0-5-amd64", split=True)
    found = find_headers(modules, "another")
    assert found.build.name == "generated"
    assert found.source.name == "common"


def test_single_tree_is_both_halves(modules: Path) -> None:
    """Everybody but Debian."""
    install(modules, "6.1.0")
    found = find_headers(modules, "another")
    assert found.build == found.source


@pytest.mark.parametrize("split", [True, False], ids=["two halves", "one tree"])
def test_merged_tree_has_the_files_of_both(modules: Path, tmp_path: Path, split: bool) -> None:
    """Generated ones and the rest, found where a kernel source has them."""
    install(modules, "6.1.0", split=split)
    merged = merge_headers(find_headers(modules, "another"), tmp_path / "merged")
    for path in (
        "include/generated/autoconf.h",
        "include/linux/types.h",
        f"arch/{ARCH}/include/generated/asm.h",
        f"arch/{ARCH}/include/uapi/asm.h",
    ):
        assert (merged / path).is_file(), path


def test_generated_half_wins_where_both_have_a_name(tmp_path: Path) -> None:
    """The build tree belongs to one configuration, the source to all of them."""
    for half in ("build", "source"):
        (tmp_path / half / "include/config").mkdir(parents=True)
        (tmp_path / half / "include/config/marker").write_text(half)
    headers = KernelHeaders("6.1.0", tmp_path / "build", tmp_path / "source", False)
    merged = merge_headers(headers, tmp_path / "merged")
    assert (merged / "include/config/marker").read_text() == "build"


def test_this_machine_s_headers_are_usable_or_named() -> None:
    """Whatever is installed here: a tree that exists, or the error for a person."""
    try:
        found = find_headers()
    except DatapathError as exc:
        assert "linux-headers" in str(exc)  # noqa: PT017
    else:
        assert (found.build / "include/generated/autoconf.h").is_file()
