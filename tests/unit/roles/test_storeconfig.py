"""How a store describes itself."""

from __future__ import annotations

from typing import Any, cast

import pytest

from lazymesh.core.records import RecordError
from lazymesh.roles.storeconfig import describe_store
from tests.support.fakestore import FakeClient

KEY = b"cilium/cluster-config/b"
ANNOUNCES = b'{"id":2,"capabilities":{"syncedCanaries":true}}'
CANARIES = [b"cilium/synced/b/cilium/state/" + what for what in (b"nodes/v1", b"identities/v1", b"ip/v1")]


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        ({}, "no cluster-config in its store yet"),
        ({KEY: b'{"id":2}'}, None),
        ({KEY: ANNOUNCES}, f"its store is not complete yet: no {CANARIES[0].decode()}"),
        (
            {KEY: ANNOUNCES, CANARIES[0]: b"", CANARIES[1]: b""},
            f"its store is not complete yet: no {CANARIES[2].decode()}",
        ),
        ({KEY: ANNOUNCES} | dict.fromkeys(CANARIES, b""), None),
    ],
)
async def test_store_is_complete_when_all_it_announces_is_there(
    data: dict[bytes, bytes], missing: str | None
) -> None:
    """At the revision at which it described itself."""
    store = FakeClient()
    store.data = data
    config, revision, lacks = await describe_store(cast("Any", store), "b")
    assert (lacks, revision) == (missing, 7)
    assert (config is None) is (not data)


async def test_config_that_is_malformed_is_an_error() -> None:
    """Not a store that is incomplete."""
    store = FakeClient()
    store.data[KEY] = b"{"
    with pytest.raises(RecordError):
        await describe_store(cast("Any", store), "b")
