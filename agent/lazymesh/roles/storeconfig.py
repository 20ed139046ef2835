"""What a cluster's store says about itself: its cluster-config, and whether everything it announces is there yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lazymesh.core import keys
from lazymesh.core.records import decode_cluster_config

if TYPE_CHECKING:
    from lazymesh.core.records import ClusterConfig
    from lazymesh.kvstore.client import EtcdClient

RETRY_S = 0.5
"""Between looks for a cluster-config or a canary that is not there yet."""


class StoreDescription(NamedTuple):
    """A store's description of itself."""

    config: ClusterConfig | None
    revision: int
    """The store's revision at that moment."""
    missing: str | None
    """What the store still lacks to be complete."""


async def describe_store(client: EtcdClient, cluster: str) -> StoreDescription:
    """Read a store's cluster-config and check its sync canaries; KvstoreError, or RecordError for a bad config."""
    answer = await client.read_many([keys.cluster_config_key(cluster)])
    found, revision = answer.values[0], answer.revision
    if found is None:
        return StoreDescription(None, revision, "no cluster-config in its store yet")
    config = decode_cluster_config(found.value)
    if not config.synced_canaries:
        return StoreDescription(config, revision, None)
    wanted = [keys.canary_key(what, config.cached, cluster) for what in ("nodes", "identities", "ip")]
    result = await client.read_many(wanted)
    for key, canary in zip(wanted, result.values, strict=True):
        if canary is None:
            return StoreDescription(config, revision, f"its store is not complete yet: no {key.decode()}")
    return StoreDescription(config, revision, None)
