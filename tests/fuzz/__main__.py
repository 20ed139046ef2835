"""``scripts/fuzz``: try decoders with bytes that nobody thought of, led by coverage; or the programs with frames."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import click

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".cache" / "fuzz"
"""Everything found so far, and inputs that broke something; not in the repository."""
FRAMES = "frames"
SLOW_S, MOST_MIB = 10, 2_048
"""An input that takes longer, or more memory, has broken something."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("targets", nargs=-1, metavar="[TARGET]...", type=click.Choice([*TARGETS, FRAMES]))
@click.option(
    "--seconds", default=60, show_default=True, type=click.IntRange(min=1), help="For each decoder."
)
@click.option(
    "--keep", is_flag=True, help="Then put the smallest corpus that reaches as much into the repository."
)
@click.option(
    "--replay", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Try this input alone."
)
@click.option("--count", default=1_000_000, show_default=True, type=click.IntRange(min=1), help="Of frames.")
@click.option("--seed", type=click.IntRange(min=0), help="Which frames.  [default: others each time]")
@click.option("--only", type=click.IntRange(min=0), help="Send the frame of this number alone.")
def main(
    targets: tuple[str, ...],
    *,
    seconds: int,
    keep: bool,
    replay: Path | None,
    count: int,
    seed: int | None,
    only: int | None,
) -> None:
    """Try decoders with bytes that others may write, led by coverage, or the TC programs with hostile frames.

    Without a TARGET all decoders are tried, not the frames. Exit 1 if something broke; the input is then named. Exit 3
    if something is missing.
    """
    decoders = [name for name in targets or TARGETS if name != FRAMES]
    if replay is not None:
        for name in decoders:
            TARGETS[name].try_one(replay.read_bytes())
            print(f"{name}: nothing broke")
        return
    broken = 0
    if decoders and importlib.util.find_spec("atheris") is None:
        print(
            "fuzz: needs atheris, which has packages for x86_64 only: fuzz there, or try `frames`",
            file=sys.stderr,
        )
        sys.exit(3)
    if decoders:
        print(
            f"{'TARGET':<18} {'EXECUTIONS':>12} {'PER SECOND':>11} {'CORPUS':>7} {'COVERAGE':>9}  RESULT",
            flush=True,
        )
    for name in decoders:
        broken += not fuzz(name, seconds)
        if keep:
            print(f"{name}: {corpus.keep(name, _found(name))} inputs kept", file=sys.stderr)
    if FRAMES in targets:
        broken += not send_frames(count, seed, only)
    sys.exit(1 if broken else 0)


def send_frames(count: int, seed: int | None, only: int | None) -> bool:
    """Send frames; False when what became of one is not what the reference says."""
    if os.geteuid() != 0:
        print("fuzz: frames need root, to load the programs", file=sys.stderr)
        sys.exit(3)
    from tests.fuzz import frames  # noqa: PLC0415 (loads BCC, which decoders do not need)

    chosen = secrets.randbits(32) if seed is None else seed
    print(f"frames of --seed {chosen}", flush=True)
    return frames.send(chosen, range(count) if only is None else range(only, only + 1))


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz a target for a time and print what came of it; False when something broke."""
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    for data in (*corpus.kept(name), *TARGETS[name].seeds):
        (folder / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    options = {
        "max_total_time": seconds,
        "timeout": SLOW_S,
        "rss_limit_mb": MOST_MIB,
        "max_len": TARGETS[name].longest,
        "print_final_stats": 1,
        "artifact_prefix": WORK / f"{name}.broken.",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.fuzz.one",
            name,
            *(f"-{key}={value}" for key, value in options.items()),
            folder,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    runs = _number(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
    covered = _number(r"cov: (\d+)", done.stdout)
    culprits = re.findall(r"Test unit written to (\S+)", done.stdout)
    result = f"BROKEN by {', '.join(culprits) or 'itself'}" if done.returncode else "nothing broke"
    size = len(list(folder.iterdir()))
    print(f"{name:<18} {runs:>12,} {runs / seconds:>11,.0f} {size:>7,} {covered:>9,}  {result}", flush=True)
    if done.returncode:
        (WORK / f"{name}.log").write_text(done.stdout, encoding="utf-8")
        print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)
    return done.returncode == 0


def _found(name: str) -> list[bytes]:
    return [path.read_bytes() for path in (WORK / name).iterdir()]


def _number(pattern: str, text: str) -> int:
    numbers = re.findall(pattern, text)
    return int(numbers[-1]) if numbers else 0


if __name__ == "__main__":
    main()
