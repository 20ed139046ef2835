"""Every module with logic has a test file of its own: ``test_<module>*.py``, anywhere below tests/.

Two modules of one name are told apart by their package, in the twin's folder or name: ``core/test_model.py``.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "agent" / "lazymesh"

EXEMPT = {
    "errors.py": "exception classes without behaviour",
    "core/events.py": "plain data; every resolver test is made of it",
    "kvstore/etcd_pb2.py": "generated from etcd.proto",
}
"""Modules with functions or classes that need no test file of their own, each with the reason."""

MODULES = sorted(
    path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")
)


def twins(module: str) -> list[Path]:
    """Return the test files of a module."""
    path = Path(module)
    found = [twin.relative_to(ROOT) for twin in (ROOT / "tests").rglob(f"test_*{path.stem}*.py")]
    named = [
        twin
        for twin in found
        if twin.stem.startswith((f"test_{path.stem}", f"test_{path.parent.name}_{path.stem}"))
    ]
    shared = [other for other in MODULES if Path(other).name == path.name]
    return named if len(shared) == 1 else [twin for twin in named if path.parent.name in str(twin)]


def has_logic(path: Path) -> bool:
    """Tell whether a module defines a function or a method, not only names and data."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


@pytest.mark.parametrize("module", [name for name in MODULES if name not in EXEMPT])
def test_module_has_a_twin(module: str) -> None:
    """A module without a test file is a module whose next change nobody notices."""
    if not has_logic(PACKAGE / module):
        return
    assert twins(module), (
        f"{module} has no tests: add test_{Path(module).stem}.py, or exempt the module here with a reason"
    )


def test_exemptions_name_existing_modules() -> None:
    """A module that went away takes its exemption with it."""
    assert set(EXEMPT) <= set(MODULES)
