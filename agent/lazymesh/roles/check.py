"""Checks one by one what lazymesh needs of this node, and says what to do about what is missing."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lazymesh.core import keys
from lazymesh.core.model import Space
from lazymesh.core.records import RecordError, decode_cluster_config
from lazymesh.datapath.capabilities import check_capabilities
from lazymesh.datapath.headers import find_headers
from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.datapath.kernelfeatures import has_lpm_batches, has_tcx, kernel_honours_noexist, kernel_version
from lazymesh.datapath.libbpf import library
from lazymesh.datapath.pins import IPCACHE, Pins, check_bpffs
from lazymesh.datapath.tap import try_tap
from lazymesh.errors import DatapathError, KvstoreError, LazymeshError
from lazymesh.kvstore.certificate import certificate_facts
from lazymesh.kvstore.client import EtcdClient
from lazymesh.roles.checkcilium import check_cilium
from lazymesh.roles.checkresult import CheckResult
from lazymesh.roles.configdir import read_directory
from lazymesh.settings import CILIUM_INTERFACES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from lazymesh.kvstore.config import EtcdConfig

OLDEST_KERNEL = (5, 10)
EXPIRY_WARNING = timedelta(days=30)
ETCD_TIMEOUT_S = 5.0
CILIUM_NAMES = ".mesh.cilium.io"
"""Domain under which Cilium names the stores of clusters that are given by address; it is not in any DNS."""
STORES_AT_A_TIME = 16
"""Stores that do not answer would otherwise be waited for one after another."""


async def check_node(
    bpffs: Path,
    directories: dict[str, Path],
    interfaces: tuple[str, ...] = CILIUM_INTERFACES,
    datapath: str = "auto",
) -> AsyncIterator[CheckResult]:
    """Yield a result for every need: first the node's, then those of a Cilium on it, then each cluster's.

    directories: with the clusters' files, by the option that names them.
    """
    for name, look in _NODE_CHECKS.items():
        yield _checked(name, look)
    yield _checked("capabilities", lambda: ", ".join(check_capabilities()))
    yield _checked("bpffs", lambda: _bpffs(bpffs))
    yield _checked("map layout", lambda: _layout(bpffs))
    async for result in check_cilium(bpffs, interfaces, datapath):
        yield result
    room = asyncio.Semaphore(STORES_AT_A_TIME)
    found = [each for option, path in directories.items() for each in _clusters(path, option, room)]
    waited_for = [each for each in found if not isinstance(each, CheckResult)]
    try:
        for each in found:
            yield each if isinstance(each, CheckResult) else await each
    finally:
        for task in waited_for:
            task.cancel()
        await asyncio.gather(*waited_for, return_exceptions=True)


def _clusters(
    directory: Path, option: str, room: asyncio.Semaphore
) -> Iterator[CheckResult | asyncio.Task[CheckResult]]:
    """Check a directory's files, and start to check their stores."""
    try:
        files = read_directory(directory, option)
    except LazymeshError as exc:
        yield CheckResult("clustermesh", "fail", str(exc))
        return
    if not files and option == "--remote-config":
        yield CheckResult(
            "clustermesh",
            "ok",
            f"{directory} has no cluster file: no store is read directly, past a local cache",
        )
    elif not files:
        yield CheckResult(
            "clustermesh", "warn", f"{directory} has no cluster file: misses cannot be resolved"
        )
    for cluster, file in files.items():
        if file.config is None:
            yield CheckResult(f"cluster {cluster}", "fail", file.error or "no configuration")
            continue
        yield from _certificates(cluster, file.config)
        yield asyncio.create_task(_store(cluster, file.config, room))


def _checked(name: str, look: Callable[[], str]) -> CheckResult:
    try:
        text = look()
    except LazymeshError as exc:
        return CheckResult(name, "fail", str(exc))
    except OSError as exc:
        return CheckResult(name, "fail", f"{exc.strerror}: run this as root, or in a privileged container")
    return CheckResult(name, "warn" if text.startswith("warning: ") else "ok", text.removeprefix("warning: "))


def _root() -> str:
    if os.geteuid() != 0:
        raise LazymeshError("not root, which the agent needs: use sudo, or a privileged container")
    return "root"


def _kernel() -> str:
    release = os.uname().release
    if kernel_version() < OLDEST_KERNEL:
        raise LazymeshError(f"kernel {release} is too old: lazymesh needs 5.10 or later")
    return release


def _headers() -> str:
    headers = find_headers()
    return f"{headers.source}" + ("" if headers.running else f" (of {headers.release}, which will do)")


def _bcc() -> str:
    if importlib.util.find_spec("bcc") is None:
        raise LazymeshError(
            "the Python package bcc is missing: install python3-bpfcc, and run lazymesh from an environment"
            " made by `/usr/bin/python3 -m venv --system-site-packages`"
        )
    return "installed"


def _libbpf() -> str:
    library()
    return "libbpf.so.1"


def _maps() -> str:
    batches = "" if has_lpm_batches() else "; LPM tries are written one by one (batches need 5.13)"
    if kernel_honours_noexist():
        return f"conditional writes to the ipcache work{batches}"
    return (
        "warning: this kernel ignores BPF_NOEXIST on LPM tries; a guarded fallback is used"
        f" (fixed in 6.13 and in later stable releases){batches}"
    )


def _hook() -> str:
    if has_tcx():
        return "tcx links"
    return (
        "warning: clsact filters, as this kernel has no tcx (which needs 6.6): a Cilium that reloads its programs"
        " deletes them, and the agent restores them within milliseconds"
    )


def _holding() -> str:
    try:
        udp_gso = try_tap()
    except DatapathError as exc:
        return f"warning: missed packets cannot be held, and pass as world instead: {exc}"
    if udp_gso:
        return "missed packets can be held"
    return "warning: missed packets can be held, except for UDP segments (UDP GSO), which need Linux 6.2"


_NODE_CHECKS: dict[str, Callable[[], str]] = {
    "root": _root,
    "kernel": _kernel,
    "headers": _headers,
    "bcc": _bcc,
    "libbpf": _libbpf,
    "kernel maps": _maps,
    "hook": _hook,
    "holding": _holding,
}


def _bpffs(bpffs: Path) -> str:
    check_bpffs(bpffs)
    return str(bpffs)


def _layout(bpffs: Path) -> str:
    path = Pins.under(bpffs).path(IPCACHE)
    if not path.exists():
        return "lazymesh has no ipcache of its own: the agent makes one, unless it works beside Cilium"
    ipcache = IpcacheMap.pinned(path)
    return f"{path}: {ipcache.layout.words}, {ipcache.max_entries} entries"


def _certificates(cluster: str, config: EtcdConfig) -> Iterator[CheckResult]:
    config = config.with_files_at_hand()
    for path in (config.ca_file, config.cert_file, config.key_file):
        if path is not None and not os.access(path, os.R_OK):
            yield CheckResult(
                f"certificate {cluster}", "fail", f"cannot read {path}, named in {config.source}"
            )
            return
    if config.cert_file is None:
        return
    facts = certificate_facts(Path(config.cert_file).read_bytes())
    name = f"certificate {cluster}"
    if facts is None:
        yield CheckResult(name, "fail", f"{config.cert_file} does not contain a certificate in PEM format")
        return
    left = facts.not_after - datetime.now(UTC)
    text = f"{config.cert_file}: user {facts.common_name}, valid until {facts.not_after:%Y-%m-%d}"
    if left <= timedelta():
        yield CheckResult(name, "fail", f"{text}: expired, renew it")
    else:
        soon = left < EXPIRY_WARNING
        why = f" (less than {EXPIRY_WARNING.days} days)" if soon else ""
        yield CheckResult(name, "warn" if soon else "ok", f"{text}{why}")


async def _store(cluster: str, config: EtcdConfig, room: asyncio.Semaphore) -> CheckResult:
    """Connect, read the cluster's own configuration record, and try what a miss would read."""
    name = f"cluster {cluster}"
    async with room, EtcdClient(config) as client:
        try:
            async with asyncio.timeout(ETCD_TIMEOUT_S):
                return await _ask_store(name, cluster, client)
        except KvstoreError as exc:
            text = str(exc)
        except TimeoutError:
            text = f"no answer in {ETCD_TIMEOUT_S:.0f} s: {client.info.last_error or 'silence'}"
        return CheckResult(name, "fail", text + await _about_names(config))


async def _about_names(config: EtcdConfig) -> str:
    """Say what to do about a name that exists only as a host alias in the pods of Cilium's chart."""
    for endpoint in config.endpoints:
        if endpoint.address is None and endpoint.host.endswith(CILIUM_NAMES):
            try:
                async with asyncio.timeout(ETCD_TIMEOUT_S):
                    await asyncio.get_running_loop().getaddrinfo(endpoint.host, endpoint.port)
            except OSError:  # a TimeoutError is one
                return (
                    f"; {endpoint.host} has no address here: Cilium's chart gives such names to its own pods only; set"
                    " clustermesh.hostAliases in lazymesh's values, too (docs/install.md)"
                )
    return ""


async def _ask_store(name: str, cluster: str, client: EtcdClient) -> CheckResult:
    found = await client.get(keys.cluster_config_key(cluster))
    endpoint = client.info.endpoint
    if found is None:
        return CheckResult(name, "warn", f"{endpoint} answers, but has no cluster-config of {cluster} yet")
    try:
        described = decode_cluster_config(found.value)
    except RecordError as exc:
        return CheckResult(
            name, "fail", f"{endpoint}: cluster-config of {cluster} is malformed: {exc.detail}"
        )
    space = Space.CACHED if described.cached else Space.PULL_ONLY
    kind, role = ("local cache", "local") if described.cached else ("cluster's own store", "remote")
    try:
        await client.get(keys.ip_key(space, bytes(4), cluster))
        identities = await _some(client, keys.identities_prefix(described.cached, cluster))
    except KvstoreError as exc:
        hint = f" (a {kind} takes the certificate of user `{role}`)" if exc.kind == "permission" else ""
        return CheckResult(name, "fail", f"{exc}{hint}")
    text = f"{endpoint}: id {described.cluster_id}, {kind}, readable"
    if not identities:
        return CheckResult(
            name,
            "warn",
            f"{text}, but has no identities: every endpoint will be refused as unknown-identity;"
            " check its clustermesh-apiserver",
        )
    return CheckResult(name, "ok", text)


async def _some(client: EtcdClient, prefix: bytes) -> bool:
    """Return whether a prefix has any keys."""
    async with aclosing(client.list_prefix(prefix, page=1)) as pages:
        return bool((await anext(pages)).items)
