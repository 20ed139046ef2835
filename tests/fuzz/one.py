"""A process that fuzzes one target with atheris: ``python -m tests.fuzz.one TARGET [libFuzzer's options and folders]``.

atheris and its libFuzzer end the process, hence one for each target. Our code, and what it decodes with in Python, is
instrumented while it is imported, so nothing of it may be imported before.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["lazymesh", "hpack", "yaml"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run."""
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target.try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
