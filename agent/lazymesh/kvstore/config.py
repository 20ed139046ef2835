"""The etcd client configuration of one store, as Cilium writes it: one YAML file per cluster.

The file is checked here once, so that the rest of the package deals with addresses to dial. Whether a file is a
cluster's configuration at all, and which cluster's, is decided by the role that watches the directory. TLS files are
only named here: they are read when a connection is made, because they rotate.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lazymesh.core.plainyaml import read_plain_yaml
from lazymesh.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place to dial: a host of the configuration, with its address if an alias gives one."""

    scheme: str
    host: str
    port: int
    address: str | None = None
    """Literal IP to dial instead of ``host``; the server's certificate is still checked against ``host``."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        via = f" ({self.address})" if self.address else ""
        return f"{self.scheme}://{host}:{self.port}{via}"

    @property
    def dial_host(self) -> str:
        """The name or literal IP that the connection goes to."""
        return self.address or self.host

    @property
    def target(self) -> str:
        """The gRPC target; literal addresses name their family, because "dns:" would ask a resolver."""
        host = self.dial_host
        try:
            version = ipaddress.ip_address(host).version
        except ValueError:
            return f"dns:///{host}:{self.port}"
        return f"ipv4:{host}:{self.port}" if version == 4 else f"ipv6:[{host}]:{self.port}"


@dataclass(frozen=True, slots=True)
class EtcdConfig:
    """Where one store is and how to authenticate."""

    endpoints: tuple[Endpoint, ...]
    """In the file's order; an endpoint with several aliased addresses appears once for each of them."""
    ca_file: str | None = None
    """None: the system's roots (with grpcio, those that it ships)."""
    cert_file: str | None = None
    key_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    source: str = ""
    """The file it was read from, for messages."""

    @property
    def tls(self) -> bool:
        """Whether the endpoints are reached over TLS (http and https are never mixed)."""
        return self.endpoints[0].scheme == "https"

    def with_files_at_hand(self) -> EtcdConfig:
        """Return it with the current path of each TLS file: as configured, or else next to the configuration file.

        For a cluster with a client certificate of its own, Cilium's charts (1.18 to 1.20) give paths as they are in
        Cilium's pods, and put the files into the Secret of the configuration, which lazymesh mounts elsewhere.
        """
        at_hand = partial(_at_hand, Path(self.source))
        ca_file, cert_file, key_file = map(at_hand, (self.ca_file, self.cert_file, self.key_file))
        return replace(self, ca_file=ca_file, cert_file=cert_file, key_file=key_file)


def _at_hand(source: Path, path: str | None) -> str | None:
    # os.path.exists: that of Path raises where a directory may not be entered, or the name is too long.
    if path is None or os.path.exists(path):  # noqa: PTH110
        return path
    beside = source.with_name(Path(path).name) if source.name and Path(path).name else None
    return str(beside) if beside is not None and os.path.exists(beside) else path  # noqa: PTH110


def load_config(path: str | Path) -> EtcdConfig:
    """Read and check one configuration file; SettingsError says what to change in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8 text"
        raise SettingsError(
            f"{path}: cannot be read ({reason}); check the mount and the file's mode"
        ) from exc
    return parse_config(text, str(path))


def parse_config(text: str, source: str) -> EtcdConfig:
    """Check the text of a configuration file; ``source`` is the file name that messages start with."""
    words = _mapping(text, source)
    ca_file, cert_file, key_file = (
        _text(words, k, source) for k in ("trusted-ca-file", "cert-file", "key-file")
    )
    if (cert_file is None) != (key_file is None):
        missing = "key-file" if key_file is None else "cert-file"
        raise SettingsError(f"{source}: a client certificate needs both halves; add {missing}")
    username, password = (_text(words, k, source) for k in ("username", "password"))
    if (username is None) != (password is None):
        raise SettingsError(f"{source}: username and password go together; add the missing one")
    # Endpoints without a scheme are TLS for etcd's own client exactly when TLS files are given.
    default_scheme = "https" if ca_file or cert_file else "http"
    return EtcdConfig(
        endpoints=_endpoints(words, default_scheme, source),
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
        username=username,
        password=password,
        source=source,
    )


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        words = read_plain_yaml(text)
    except ValueError as exc:
        raise SettingsError(f"{source}: {exc}; expected an etcd client configuration") from exc
    if not isinstance(words, dict):
        raise SettingsError(f"{source}: not a mapping; an etcd client configuration starts with 'endpoints:'")
    return words


def _text(words: dict[str, Any], name: str, source: str) -> str | None:
    value = words.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise SettingsError(f"{source}: {name} must be text, not {type(value).__name__}")
    return value


def _endpoints(words: dict[str, Any], default_scheme: str, source: str) -> tuple[Endpoint, ...]:
    urls = words.get("endpoints")
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
        raise SettingsError(f"{source}: no endpoints; write 'endpoints:' and under it '- https://HOST:2379'")
    aliases = _aliases(words, source)
    found = [_endpoint(url, default_scheme, source) for url in urls]
    if len({endpoint.scheme for endpoint in found}) > 1:
        raise SettingsError(f"{source}: endpoints mix http and https; use one of them throughout")
    return tuple(dialled for endpoint in found for dialled in _aliased(endpoint, aliases))


def _endpoint(url: str, default_scheme: str, source: str) -> Endpoint:
    try:
        parts = urlsplit(url if "://" in url else f"{default_scheme}://{url}")
        host, port = parts.hostname, parts.port
        if host:
            host.encode("idna")  # as name resolution and TLS will do
    except ValueError as exc:
        raise SettingsError(
            f"{source}: endpoint {url!r} is malformed ({exc}); write https://HOST:2379"
        ) from exc
    if parts.scheme not in ("http", "https") or not host or port is None:
        raise SettingsError(f"{source}: endpoint {url!r} is not of the form https://HOST:PORT")
    return Endpoint(parts.scheme, host, port)


def _aliases(words: dict[str, Any], source: str) -> dict[str, list[str]]:
    aliases: dict[str, list[str]] = {}
    try:
        for alias in words.get("cilium-host-aliases") or ():
            ips = [str(ipaddress.ip_address(ip)) for ip in alias["ips"]]
            aliases.setdefault(alias["hostname"].lower(), []).extend(ips)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise SettingsError(
            f"{source}: each element of cilium-host-aliases needs 'hostname' and a list 'ips'"
        ) from exc
    return aliases


def _aliased(endpoint: Endpoint, aliases: dict[str, list[str]]) -> list[Endpoint]:
    ips = aliases.get(endpoint.host)
    if not ips:
        return [endpoint]
    return [Endpoint(endpoint.scheme, endpoint.host, endpoint.port, ip) for ip in ips]
