"""The scripts' command lines: help does nothing else, and wrong usage is reported in one line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo import parse_arguments
from vm import guest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


def run(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script until it ends."""
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=env)


def help_of(directory: Path, name: str, *words: str) -> str:
    """Return a script's help, with a PATH that has no program to install or build anything."""
    for program in ("sed", "dirname"):
        (directory / program).symlink_to(str(shutil.which(program)))
    done = run("/bin/bash", SCRIPTS / name, *words, "--help", env={"PATH": str(directory)})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [
        *(["real-cilium"], ["real-cilium", "1.19.5"], ["manifests"]),
        *(["kubernetes"], ["setup"], ["check"], ["helm"], ["image"]),
    ],
    ids=" ".join,
)
def test_help_is_all_that_it_does(words: list[str], tmp_path: Path) -> None:
    """It does not start to build for half an hour."""
    assert re.search(rf"^Usage: scripts/{words[0]}\b", help_of(tmp_path, *words), re.MULTILINE)


@pytest.mark.parametrize("script", ["setup", "check"])
@pytest.mark.parametrize("word", ["--nope", "agent"])
def test_unknown_argument_is_refused(script: str, word: str) -> None:
    """So that no one mistakes what the script does for something else."""
    done = run(SCRIPTS / script, word)
    told = f"{script}: takes no arguments, not {word}; see scripts/{script} --help\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_help_of_real_cilium_has_every_option(tmp_path: Path) -> None:
    """Another program reads them, which cannot run before everything is built."""
    text = (SCRIPTS / "real_cilium.py").read_text()
    told = re.findall(r"^  (--[a-z-]+) ", help_of(tmp_path, "real-cilium"), re.MULTILINE)
    assert told == re.findall(r'add_argument\("(--[a-z-]+)"(?!.*SUPPRESS)', text)


@pytest.mark.parametrize("script", ["setup", "check", "vm", "image", "demo"])
def test_script_is_found_from_where_it_stands(script: str) -> None:
    """Called by a path that is no longer true after a change of directory."""
    done = subprocess.run(
        [f"./{script}", "--help"], cwd=SCRIPTS, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert script in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["vm", "test", "--all", "6.1"], "test --all takes no kernels: it tries them all"),
        (["vm", "up", "6.1", "6.12"], "up takes one kernel, not up 6.1 6.12"),
        (["vm", "start"], "does not know: start"),
        (["image", "--nope"], "no option --nope"),
        (["demo", "--scene", "restart", "--picture", "/nonexistent/x.svg"], "no directory /nonexistent"),
    ],
    ids=" ".join,
)
def test_word_too_many_is_told_before_anything_is_done(words: list[str], told: str) -> None:
    """Usage is exit 2, in a line that says where to look."""
    done = run(SCRIPTS / words[0], *words[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_options_of_real_cilium_are_looked_at_before_anything_is_built(tmp_path: Path) -> None:
    """By the program that reads them, which is run for that alone."""
    words = [sys.executable, SCRIPTS / "real_cilium.py", "1.20.1", "--check-arguments"]
    env = {"PYTHONPATH": str(ROOT)}
    assert run(*words, "--json", tmp_path / "figures.json", env=env).returncode == 0
    assert run(*words, "--json", tmp_path / "none" / "figures.json", env=env).returncode == 2
    assert run(*words, "--nope", env=env).returncode == 2


def test_every_module_of_the_datapath_tier_runs_on_other_kernels_or_is_left_out_with_a_reason() -> None:
    """A new one would else be tried on one kernel alone, silently."""
    modules = {path.stem for path in (ROOT / "tests" / "datapath").glob("test_*.py")}
    run = [module for group in guest.GROUPS.values() for module in group]
    assert sorted([*run, *guest.LEFT_OUT_MODULES]) == sorted(modules)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--hlep", "unknown option --hlep; see scripts/manifests --help"),
        ("nowhere", "no directory nowhere"),
    ],
)
def test_manifests_need_an_existing_directory(word: str, said: str) -> None:
    """An option is not a directory."""
    done = run(SCRIPTS / "manifests", word)
    assert done.returncode == 2
    assert done.stderr.startswith(f"manifests: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.needs("helm")
def test_chart_is_rendered_without_a_kubernetes_version() -> None:
    """A version that is given is used: the chart refuses one that is older than it supports."""
    words = ("template", "lazymesh", ROOT / "deploy/chart", "--set=cluster.name=a,cluster.id=1")
    assert run(SCRIPTS / "helm", *words).returncode == 0
    done = run(SCRIPTS / "helm", *words, "--kube-version=1.20.0")
    assert done.returncode != 0
    assert "incompatible with Kubernetes v1.20.0" in done.stderr


def test_demo_finds_an_image_from_where_it_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The container has another working directory; a name that is not a directory is refused at once."""
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", "--image", "root"])
    assert parse_arguments().image == tmp_path / "root"
    monkeypatch.setattr(sys, "argv", ["demo", "--image", "nowhere"])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert "no directory nowhere" in capsys.readouterr().err
