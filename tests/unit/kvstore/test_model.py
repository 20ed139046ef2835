"""Values that leave the folder: they cannot be changed by those who get them."""

from __future__ import annotations

import dataclasses

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
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen(value: object) -> None:
    """Several consumers share one value."""
    name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_a_listed_key_is_told_as_a_change_by_its_first_three_fields() -> None:
    """The follower relies on the two tuples beginning alike."""
    assert Change(*KeyValue(b"k", b"v", 5, 9)[:3]) == Change(b"k", b"v", 5)
    assert Change._fields == KeyValue._fields[:3]
