"""Which servers' reports on all watches may move them along."""

from __future__ import annotations

import pytest

from lazymesh.kvstore.hub import reports_are_ordered


@pytest.mark.parametrize(
    ("version", "ordered"),
    [
        ("3.4.23", False),
        ("3.4.25", True),
        ("3.5.0", False),
        ("3.5.7", False),
        ("3.5.8", True),
        ("3.5.21", True),
        ("3.6.0-rc.1", True),
        ("", False),
    ],
)
def test_report_on_all_watches_is_believed_from_the_fixed_versions_on(version: str, ordered: bool) -> None:
    """Before, it overtakes events (etcd issue 15220)."""
    assert reports_are_ordered(version) is ordered
