"""Certificates and passwords against a real etcd: let in, kept out for the right reason, rotated, renewed."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.backoff import BackoffLimits
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import EtcdConfig, parse_config
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from tests.support.etcd import Authority, EtcdServer, EtcdSettings, Pair, Role, cilium_roles, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

QUICK = Options(transport=Transport(dial_timeout_s=2), backoff=BackoffLimits(0.05, 0.2))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return the authority that the server's certificate is from."""
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def etcd(authority: Authority) -> Iterator[EtcdServer]:
    """Yield an etcd with TLS and with the users of a clustermesh-apiserver of cluster b."""
    with EtcdServer(EtcdSettings(tls=authority)) as server:
        server.put("cilium/state/ip/v1/default/10.2.0.5", "pushed")
        server.put("cilium/cache/ip/v1/b/10.2.0.5", "cached")
        server.enable_auth(cilium_roles("b"))
        yield server


def config_of(url: str, ca: Path | None, pair: Pair | None, extra: str = "") -> EtcdConfig:
    """Return a configuration as a file in /var/lib/cilium/clustermesh would give it."""
    lines = [f"endpoints: ['{url}']", extra]
    if ca:
        lines.append(f"trusted-ca-file: {ca}")
    if pair:
        lines += [f"cert-file: {pair.cert}", f"key-file: {pair.key}"]
    return parse_config("\n".join(lines), "/etc/mesh/b")


async def refusal(config: EtcdConfig) -> KvstoreError:
    """Return the error of a read that must fail."""
    async with EtcdClient(config, QUICK) as client:
        with pytest.raises(KvstoreError) as caught:
            await client.get(b"cilium/state/x")
    assert "\n" not in str(caught.value)
    return caught.value


async def test_remote_certificate_reads_state_and_is_refused_the_cache(
    etcd: EtcdServer, authority: Authority
) -> None:
    """The refusal names the key and whom etcd takes the certificate for."""
    async with EtcdClient(config_of(etcd.url, authority.cert, authority.issue("remote"))) as client:
        found = await client.get(b"cilium/state/ip/v1/default/10.2.0.5")
        assert found is not None
        assert found.value == b"pushed"
        with pytest.raises(KvstoreError) as caught:
            await client.get(b"cilium/cache/ip/v1/b/10.2.0.5")
    assert caught.value.kind == "permission"
    assert "'remote' (the certificate's common name)" in str(caught.value)
    assert "cannot read cilium/cache/ip/v1/b/10.2.0.5: permission denied" in str(caught.value)


async def test_one_refused_key_fails_the_batch_and_the_error_names_the_first(
    etcd: EtcdServer, authority: Authority
) -> None:
    """Etcd does not say which one it was."""
    async with EtcdClient(config_of(etcd.url, authority.cert, authority.issue("local-b"))) as client:
        with pytest.raises(KvstoreError, match=r"read cilium/cache/ip/v1/b/10.2.0.5 and 1 more") as caught:
            await client.read_many([b"cilium/cache/ip/v1/b/10.2.0.5", b"cilium/state/x"])
    assert caught.value.kind == "permission"


async def test_unknown_authority_is_told_as_such(
    etcd: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    """The file to look at is named."""
    other = Authority(tmp_path / "other")
    error = await refusal(config_of(etcd.url, other.cert, authority.issue("remote")))
    assert error.kind == "certificate"
    assert "the server's certificate is refused" in str(error)
    assert str(other.cert) in str(error)


async def test_client_certificate_of_another_authority_is_told_as_refused_by_the_server(
    etcd: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    """Not our trust in the server is wrong, but the server's in us."""
    pair = Authority(tmp_path / "other").issue("remote")
    error = await refusal(config_of(etcd.url, authority.cert, pair))
    assert error.kind == "certificate"
    assert "the server ends the TLS handshake: " in str(error)
    assert str(pair.cert) in str(error)


async def test_missing_client_certificate_is_told(etcd: EtcdServer, authority: Authority) -> None:
    """The server demands one and the configuration names none."""
    error = await refusal(config_of(etcd.url, authority.cert, None))
    assert error.kind == "certificate"
    assert "cert-file" in str(error)


async def test_expired_client_certificate_is_told_as_expired(etcd: EtcdServer, authority: Authority) -> None:
    """Servers call it merely bad; we can read its date."""
    pair = authority.issue("remote", expired=True)
    error = await refusal(config_of(etcd.url, authority.cert, pair))
    assert error.kind == "certificate"
    assert "'remote' (the certificate's common name, expired)" in str(error)


async def test_expired_or_misnamed_server_certificate_is_told(authority: Authority) -> None:
    """The two mistakes of hand-made certificates."""
    with EtcdServer(EtcdSettings(tls=authority, client_certificates=False)) as server:
        config = config_of(server.url, authority.cert, None)
        server.replace_server_certificate(authority.issue("etcd", expired=True))
        await asyncio.to_thread(server.restart)
        error = await refusal(config)
        assert error.kind == "certificate"
        assert "certificate has expired" in str(error)
        server.replace_server_certificate(authority.issue("etcd", "DNS:elsewhere"))
        await asyncio.to_thread(server.restart)
        error = await refusal(config)
        assert error.kind == "certificate"
        assert "IP address mismatch" in str(error)


async def test_certificate_without_its_key_is_told(
    etcd: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    """Half a rotation, or two files mixed up."""
    pair = Pair(authority.issue("remote").cert, authority.issue("remote").key)
    error = await refusal(config_of(etcd.url, authority.cert, pair))
    assert error.kind == "certificate"
    assert "do not match" in str(error)
    missing = Pair(tmp_path / "absent.crt", pair.key)
    error = await refusal(config_of(etcd.url, authority.cert, missing))
    assert error.kind == "certificate"
    assert str(error).startswith(str(missing.cert))


async def test_rotated_certificate_is_used_by_the_next_connection(
    etcd: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    """A client that is kept out goes on trying, and is let in when the files change; no restart."""
    pair = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")

    def install(source: Pair) -> None:
        shutil.copy(source.cert, pair.cert)
        shutil.copy(source.key, pair.key)

    install(authority.issue("remote", expired=True))
    async with EtcdClient(config_of(etcd.url, authority.cert, pair), QUICK) as client:
        await eventually(lambda: "expired" in (client.info.last_error or ""))
        install(authority.issue("remote"))
        await client.wait_connected()
        assert await client.get(b"cilium/state/none") is None


@pytest.mark.parametrize("kind", ["native", "grpcio"])
async def test_files_of_a_cluster_with_its_own_certificate_are_found_beside_its_configuration(
    etcd: EtcdServer, authority: Authority, tmp_path: Path, kind: str
) -> None:
    """As Cilium's Secret has them, which is mounted elsewhere than the configuration says."""
    pair = authority.issue("remote")
    for ending, path in {"-ca.crt": authority.cert, ".crt": pair.cert, ".key": pair.key}.items():
        shutil.copy(path, tmp_path / f"b.etcd-client{ending}")
    elsewhere = Path("/var/lib/cilium/clustermesh/b.etcd-client")
    words = config_of(
        etcd.url, Path(f"{elsewhere}-ca.crt"), Pair(Path(f"{elsewhere}.crt"), Path(f"{elsewhere}.key"))
    )
    config = replace(words, source=str(tmp_path / "b"))
    async with EtcdClient(config, replace(QUICK, transport=Transport(kind=kind))) as client:
        assert await client.get(b"cilium/state/none") is None


async def test_aliased_host_is_dialled_by_address_and_proves_its_name(authority: Authority) -> None:
    """The names of a mesh are in no DNS; their certificates are for the names all the same."""
    settings = EtcdSettings(tls=authority, server_names="DNS:*.mesh.cilium.io,IP:127.0.0.1")
    with EtcdServer(settings) as server:
        pair = authority.issue("remote")
        aliases = "cilium-host-aliases: [{hostname: b.mesh.cilium.io, ips: [127.0.0.1]}]"
        url = f"https://b.mesh.cilium.io:{server.port}"
        async with EtcdClient(config_of(url, authority.cert, pair, aliases)) as client:
            assert await client.get(b"a") is None
        wrong = aliases.replace("b.mesh", "b.other")
        error = await refusal(config_of(url.replace("b.mesh", "b.other"), authority.cert, pair, wrong))
        assert "Hostname mismatch" in str(error)


async def test_tls_works_on_an_ipv6_address(authority: Authority) -> None:
    """The certificate is for the address, not for its escaped form."""
    with EtcdServer(EtcdSettings(tls=authority, address="::1")) as server:
        async with EtcdClient(config_of(server.url, authority.cert, authority.issue("remote"))) as client:
            assert await client.get(b"a") is None


async def test_plain_http_against_a_tls_port_fails_in_one_line(
    etcd: EtcdServer, authority: Authority
) -> None:
    """A wrong scheme is the commonest mistake in these files."""
    error = await refusal(config_of(etcd.url.replace("https", "http"), None, None))
    assert error.kind in ("unavailable", "timeout")
    with EtcdServer() as plain:
        error = await refusal(config_of(plain.url.replace("http", "https"), authority.cert, None))
        assert "andshake" in str(error)


def password(user: str = "remote", word: str = "pw") -> str:
    """Return the lines of a configuration that logs in by password."""
    return f"username: {user}\npassword: {word}"


async def test_expired_token_is_renewed_once_by_all_who_need_it() -> None:
    """Concurrent calls that are refused together cost one login."""
    with EtcdServer(EtcdSettings(extra=("--auth-token-ttl=1",))) as server:
        server.enable_auth([Role("remote", ("cilium/state/",), password="pw")], root_password="rootpw")
        async with EtcdClient(config_of(server.url, None, None, password())) as client:
            assert await client.get(b"cilium/state/a") is None
            await eventually(lambda: "deleted a simple token" in server.log)
            logins = server.log.count("authentication of")
            reads = [client.get(b"cilium/state/%d" % number) for number in range(20)]
            assert await asyncio.gather(*reads) == [None] * 20
            assert server.log.count("authentication of") - logins <= 1
            assert client.info.reconnects == 0


async def test_changed_roles_do_not_lock_a_logged_in_client_out() -> None:
    """Etcd answers 'revision of auth store is old' to tokens from before the change."""
    with EtcdServer() as server:
        server.enable_auth([Role("remote", ("cilium/state/",), password="pw")], root_password="rootpw")
        async with EtcdClient(config_of(server.url, None, None, password())) as client:
            assert await client.get(b"cilium/state/a") is None
            await asyncio.to_thread(server.add_role, Role("other", ("x/",), password="pw"))
            assert await client.get(b"cilium/state/a") is None
            await asyncio.to_thread(server.restart)
            await eventually(lambda: client.info.reconnects == 1)
            assert await client.get(b"cilium/state/a") is None


async def test_wrong_password_is_told_and_does_not_hammer_the_server() -> None:
    """Attempts are spaced by the back-off, like those on a dead server."""
    with EtcdServer() as server:
        server.enable_auth([Role("remote", ("cilium/state/",), password="pw")], root_password="rootpw")
        slow = Options(backoff=BackoffLimits(60, 60), jitter=lambda: 1.0)
        config = config_of(server.url, None, None, password(word="wrong"))
        async with EtcdClient(config, slow) as client:
            for _ in range(20):
                with pytest.raises(KvstoreError, match="log in with the password of /etc/mesh/b") as caught:
                    await client.get(b"cilium/state/a")
            assert caught.value.kind == "permission"
        assert server.log.count("invalid password for user") <= 1
        error = await refusal(config_of(server.url, None, None))
        assert error.kind == "permission"
        assert "no user" in str(error)
