"""The benchmark's command: a part that fails, an interruption, and what the exit code says of them."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from bench import __main__ as command
from bench.__main__ import PARTS, run, why
from bench.report import Part, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEPT = Part({"us": 1.0}, [Row("first", "1 us", "2 us", 0.5, 1)], {"us": [1.0]})
OVER = Part({"us": 3.0}, [Row("first", "3 us", "2 us", 1.5, 1)])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return how the command ends, with the parts that it is given instead of the real ones, as root."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def started(*words: str, **parts: Part | BaseException) -> int:
        def part(name: str) -> Callable[..., Part]:
            def measure(_say: Callable[[str], None]) -> Part:
                found = parts[name]
                if isinstance(found, BaseException):
                    raise found
                return found

            return measure

        for name in PARTS:
            monkeypatch.setitem(PARTS, name, part(name))
        only = [word for name in parts for word in ("--only", name)]
        with pytest.raises(SystemExit) as left:
            run(*only, *words)
        return int(left.value.code or 0)

    return started


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what was printed as JSON."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_budgets_decide_when_every_part_has_figures(bench: Callable[..., int]) -> None:
    """One that is not kept is the answer no."""
    assert bench(packet=KEPT, scan=KEPT) == 0
    assert bench(packet=KEPT, scan=OVER) == 1


def test_part_that_fails_takes_no_other_figures_with_it(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not those before it, and not those behind it; and it is not the answer no, which would be of a budget."""
    failure = RuntimeError("the agent ended with exit code 3:\nready\nlazymesh: no etcd\n")
    assert bench("-o", "json", packet=KEPT, memory=failure, scan=OVER) == 4
    out, err = capsys.readouterr()
    found = json.loads(out)
    words = "the agent ended with exit code 3: lazymesh: no etcd"
    assert found["memory"] == {"failed": words}
    assert (found["packet"], found["scan"]["us"]) == ({"us": 1.0, "repeats": {"us": [1.0]}}, 3.0)
    assert err == f"bench: memory: {words}\n"


def test_table_has_a_line_for_what_has_failed(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the others' lines."""
    assert bench(packet=KEPT, memory=ValueError("x")) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["PART", "packet", "memory"]
    assert lines[2].split()[1:] == ["failed", "ValueError:", "x"]


def test_traceback_is_for_who_asks(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """A person wants a line."""
    bench(packet=ValueError("x"))
    assert "Traceback" not in capsys.readouterr().err
    bench("-v", packet=ValueError("x"))
    assert "Traceback" in capsys.readouterr().err


def test_interruption_prints_what_there_is(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As shells have it, 130; whatever has failed or is over before, and no picture is waited for."""
    words = ("-o", "json", "--plot", str(tmp_path / "pictures"))
    assert bench(*words, packet=OVER, memory=OSError("x"), scan=KeyboardInterrupt(), flood=KEPT) == 130
    assert set(figures(capsys)) == {"load", "packet", "memory"}
    assert not (tmp_path / "pictures").exists()


def test_interruption_outside_of_a_part_is_one_too(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Click would make exit code 1 of it."""

    def interrupt(_results: dict[str, Part]) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "table", interrupt)
    assert bench(packet=KEPT) == 130


def test_picture_that_cannot_be_drawn_is_a_failure(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Told in a line, behind the figures."""
    (tmp_path / "file").touch()
    assert bench("-o", "json", "--plot", str(tmp_path / "file" / "below"), packet=KEPT) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["packet"]["us"] == 1.0
    assert err.startswith("bench: plot: ")
    assert err.count("\n") == 1


def test_parts_that_have_failed_are_not_drawn(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """They have no figures."""
    assert bench("--plot", str(tmp_path), memory=OSError("x")) == 4
    err = capsys.readouterr().err
    assert "no memory.png: there are no figures of the part memory" in err
    assert "bench: plot: " not in err.replace("plot: no ", "")
    assert list(tmp_path.iterdir()) == []


def test_it_needs_root(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A need that is missing, and no answer."""
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    assert bench(packet=KEPT) == 3
    assert capsys.readouterr().err == "bench: needs root, for network namespaces and BPF\n"


@pytest.mark.parametrize("text", ['{"load": 5}', "[]", "", "[" * 100_000, "\udcff"])
def test_file_that_is_no_earlier_run_is_wrong_usage(
    text: str, bench: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Told before anything is measured."""
    old = tmp_path / "old.json"
    old.write_bytes(text.encode(errors="surrogateescape"))
    assert bench("--compare", str(old), packet=AssertionError("measured")) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"bench: {old} is no JSON of an earlier run: ")


def test_unknown_part_is_wrong_usage(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """In a line, as all else."""
    assert bench("--only", "nothing") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_own_json_can_be_compared_with(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also that of a run in which a part has failed or has left something out."""
    left_out = Part({"us": 3.0}, left_out={"Go": "no go on the PATH"})
    bench("-o", "json", packet=KEPT, memory=OSError("x"), storm=left_out)
    old = tmp_path / "old.json"
    old.write_text(capsys.readouterr().out)
    assert bench("--compare", str(old), packet=KEPT, memory=KEPT, storm=left_out) == 0
    assert "storm    +0.0%    no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("one line"), "one line"),
        (RuntimeError("first:\nsecond\n third\n\n"), "first: third"),
        (FileNotFoundError(2, "No such file or directory", "etcd"), "[Errno 2] No such file or directory: 'etcd'"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("hold"), "KeyError: 'hold'"),
        (AssertionError(), "AssertionError"),
        (subprocess.CalledProcessError(2, ["image"]), "Command '['image']' returned non-zero exit status 2."),
    ],
)  # fmt: skip
def test_failure_is_told_in_a_line(error: Exception, words: str) -> None:
    """What was not said for a person is told with its kind."""
    assert why(error) == words
