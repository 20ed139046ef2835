"""What is in the image, and that it is enough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazymesh import __version__
from tests.support.container import Container

ROOT = Path(__file__).parents[2]
MOST_BYTES = 400_000_000


def test_no_bigger_than_promised(image: Path) -> None:
    """Unpacked, as a node has it."""
    files = [path.lstat() for path in image.rglob("*") if path.is_symlink() or path.is_file()]
    assert sum({stat.st_ino: stat.st_size for stat in files}.values()) < MOST_BYTES


def test_nothing_in_it_installs_packages_or_becomes_root(image: Path) -> None:
    """What is not there needs no update, and is of no use to anybody who gets in."""
    programs = {path.name for place in ("bin", "sbin") for path in (image / "usr" / place).iterdir()}
    assert not programs & {"apt-get", "dpkg", "perl", "pip", "pip3", "gcc", "curl", "wget", "su", "sudo"}
    setuid = [path for path in image.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o6000]
    assert [path.name for path in setuid if path.is_file()] == []


def test_nothing_of_this_machine_is_in_it(image: Path) -> None:
    """No source list, no resolver, no path of the place where it was built."""
    assert not [*(image / "etc").glob("apt/*"), *(image / "etc").glob("pip.conf")]
    for path in (image / "opt/lazymesh").rglob("*"):
        if path.is_file() and path.suffix in {"", ".cfg", ".json", ".pth", ".py"}:
            assert str(ROOT).encode() not in path.read_bytes(), path


def test_bill_of_materials_names_what_is_there(image: Path) -> None:
    """Every Python distribution and Debian package, each with an address by which scanners know it."""
    document = json.loads((image.parent / "sbom.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    addresses = [part["purl"] for part in document["components"]]
    assert len(set(addresses)) == len(addresses)
    packages = {path.name for path in (image / "var/lib/dpkg/status.d").iterdir()}
    named = {part["name"] for part in document["components"] if part["purl"].startswith("pkg:deb/debian/")}
    assert named == packages >= {"libbpfcc", "libllvm14", "python3-bpfcc", "libbpf1", "libc6"}
    assert f"pkg:pypi/lazymesh@{__version__}" in addresses
    assert document["metadata"]["component"]["name"] == "lazymesh"


def test_runs_as_it_is(image: Path, tmp_path: Path) -> None:
    """Read-only, with nothing mounted: it finds headers of its own, and says what it lacks."""
    done = Container(image, tmp_path, ("NET_ADMIN", "SYS_ADMIN")).run("check", "-o", "json")
    assert done.returncode == 3
    findings = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    wrong = {name for name, each in findings.items() if each["verdict"] == "fail"}
    assert wrong == {"bpffs"}, findings
    assert findings["headers"]["text"].startswith("/usr/lib/lazymesh/modules/")


@pytest.mark.needs("earlier versions")
def test_image_says_what_it_was_made_from(image: Path) -> None:
    """Its version, and the commit, by which somebody finds the sources of what runs on a node."""
    archive = image.parent / "lazymesh.tar"

    def read(name: str) -> Any:
        words = ["tar", "-xOf", archive, name]
        return json.loads(subprocess.run(words, check=True, capture_output=True).stdout)

    def blob(described: dict[str, Any]) -> Any:
        return read(f"blobs/{described['digest'].replace(':', '/')}")

    (described,) = read("index.json")["manifests"]
    labels = blob(blob(described)["config"])["config"]["Labels"]
    told = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert told["version"] == __version__
    commit = told["revision"].removesuffix("-dirty")
    known = ["git", "-C", ROOT, "merge-base", "--is-ancestor", commit, "HEAD"]
    assert subprocess.run(known, check=False).returncode == 0, told["revision"]
    assert "@" not in told["source"].partition("://")[2], "nobody's password"


def test_archive_is_what_runtimes_load(image: Path) -> None:
    """An OCI archive with the entry point; as buildah, skopeo and podman read it."""
    names = subprocess.run(
        ["tar", "-tf", image.parent / "lazymesh.tar"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert {"oci-layout", "index.json"} <= set(names)


@pytest.mark.patience(300)
def test_demo_comes_out_right_with_the_agent_inside(image: Path) -> None:
    """The table of the README: nothing passes without, everything with."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/demo.py", "--image", image, "--connections", "4", "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["modes"]["off"]["tcp"]["connected"] == 0
    assert results["modes"]["hold"]["tcp"]["connected"] == 4
    assert results["ipcache"] == {"before": 0, "after": 8}
