"""Values that leave the folder: they cannot be changed by those who get them."""

from __future__ import annotations

import pytest

from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Change, Connected, Disconnected, KeyValue, Page, ReadResult, WatchLoss


@pytest.mark.parametrize(
    "value",
    [
        ReadResult(1, []),
        Page(1, 0, []),
        Connected("http://a:1", 1, 1, reset=False),
        Disconnected(KvstoreError("gone")),
        WatchLoss("reset", KvstoreError("gone")),
        KeyValue(b"k", b"v", 5, 9),
        Change(b"k", b"v", 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen(value: object) -> None:
    """Several consumers share one value."""
    with pytest.raises(AttributeError):
        setattr(value, next(iter(value.__annotations__)), None)
