"""The two ways to run that are not the usual one: looking on, and letting nothing unresolved through."""

from __future__ import annotations

import pytest

from tests.support.lab import ETCD_PORT, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import (
    Misses,
    connect,
    delete_entry,
    entries,
    insert_foreign,
    launched,
    metric,
    options,
    pack_key,
    pack_value,
    packets,
    raw_entries,
    send_udp,
    status,
    wait_identity,
)
from tests.support.proxy import Proxy

PROXY_PORT = 12_381


def test_shadow_resolves_and_reports_but_changes_no_packet_and_no_map() -> None:
    """Even with a policy and --on-miss drop: somebody who only looks on must harm nobody."""
    with Lab(pods=1) as lab:
        agent = lab.start_agent("--shadow", "--on-miss", "drop")
        known, unknown = remote_address(0), remote_address(1)
        lab.publish(known)
        with Misses(lab.socket) as misses:
            took = connect(lab.pods[0].namespace, known)
            assert (misses.next(known)["outcome"], took is not None and took < 0.9) == ("installed", True)
            assert connect(lab.pods[0].namespace, unknown) is not None
            assert misses.next(unknown)["reason"] == "not-found"
        assert entries(lab) == {}
        assert raw_entries(lab, "lm_owned") == {}
        assert packets(agent, "policy_deny") == packets(agent, "missed_drop") == 0
        assert status(lab)["datapath"]["shadow"]
        assert metric(agent, "lazymesh_resolutions_total", outcome="installed") >= 1


def test_on_miss_drop_lets_nothing_through_until_it_is_resolved() -> None:
    """Without any policy: the first SYN is dropped, the next passes; who cannot be resolved gets nothing."""
    with Lab(pods=1) as lab, launched(lab, *options(lab, policy=None), "--on-miss", "drop") as agent:
        agent.wait_ready()
        known, unknown = remote_address(0), remote_address(1)
        lab.publish(known)
        took = connect(lab.pods[0].namespace, known)
        assert took is not None
        assert 0.9 < took < 1.5
        assert packets(agent, "missed_drop") == 1
        assert connect(lab.pods[0].namespace, unknown, 1.3) is None
        assert packets(agent, "missed_drop") == 3
        later = connect(lab.pods[0].namespace, known)
        assert later is not None
        assert later < 0.9


@pytest.mark.needs("BPF_NOEXIST")  # elsewhere nothing tells a /32 that says world from a route
def test_entry_of_somebody_else_is_never_touched() -> None:
    """A stranger's /32 stands in the way: refused, counted, left alone, and again after our eviction."""
    with Lab(pods=1) as lab:
        agent = lab.start_agent()
        ip = remote_address(0)
        foreign = pack_value(2, flags=0)
        insert_foreign(lab, pack_key(ip), foreign)
        lab.publish(ip)
        with Misses(lab.socket) as misses:
            send_udp(lab.pods[0].namespace, ip, 1)
            assert misses.next(ip)["reason"] == "not-ours"
        assert raw_entries(lab) == {pack_key(ip): foreign}
        lab.withdraw(ip)
        assert raw_entries(lab) == {pack_key(ip): foreign}
        assert metric(agent, "cilium_ipcache_miss_resolution_errors_total", reason="not-ours") == 1
        other = remote_address(1)
        lab.publish(other)
        send_udp(lab.pods[0].namespace, other, 1)
        wait_identity(lab, other, SERVER_IDENTITY)
        # Ours is replaced behind our back: it is theirs from now on.
        delete_entry(lab, pack_key(other))
        insert_foreign(lab, pack_key(other), pack_value(77))
        lab.withdraw(other)
        lab.publish(remote_address(2))
        send_udp(lab.pods[0].namespace, remote_address(2), 1)
        wait_identity(lab, remote_address(2), SERVER_IDENTITY)
        assert raw_entries(lab)[pack_key(other)] == pack_value(77)


def test_entry_that_somebody_writes_while_we_ask_is_left_alone() -> None:
    """The kernel refuses to write over it; one that would not is asked before. And it is not evicted later."""
    with Lab(pods=1) as lab, Proxy(lab.node_a, PROXY_PORT, ETCD_PORT) as proxy:
        config = lab.directory / "proxied"
        config.mkdir()
        url = lab.etcd.url.replace(str(ETCD_PORT), str(PROXY_PORT))
        (config / "b").write_text(f"endpoints:\n- {url}\n", encoding="ascii")
        lab.start_agent(config=config)
        ours, theirs = remote_address(0), remote_address(1)
        lab.publish_many([ours, theirs])
        with Misses(lab.socket) as misses:
            proxy.delay(1)
            send_udp(lab.pods[0].namespace, theirs, 1)
            insert_foreign(lab, pack_key(theirs), pack_value(77))
            assert misses.next(theirs)["reason"] == "not-ours"
            proxy.delay(0)
        send_udp(lab.pods[0].namespace, ours, 1)
        wait_identity(lab, ours, SERVER_IDENTITY)
        assert list(raw_entries(lab, "lm_owned")) == [pack_key(ours)]
        lab.withdraw(theirs)
        lab.withdraw(ours)
        wait_identity(lab, ours, None)
        assert raw_entries(lab) == {pack_key(theirs): pack_value(77)}
