"""Which clusters there are: Cilium's clustermesh directory, looked at twice a second.

Every regular file that contains ``endpoints:`` is one cluster, and its name is the cluster's (cilium-formats 5).
Kubernetes swaps such directories by symbolic links, so a file is known by what it holds, not by its times.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lazymesh.errors import SettingsError
from lazymesh.kvstore.config import EtcdConfig, parse_config

if TYPE_CHECKING:
    from pathlib import Path

LOOK_EVERY_S = 0.5
_NO_NAME = "its file has a name that is no UTF-8"


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """One cluster's etcd client file."""

    digest: bytes
    """Of the content: equal digests need no reconnect."""
    config: EtcdConfig | None
    error: str | None
    """One line when the content cannot be used; then config is None."""


def read_directory(directory: Path, option: str | None = None) -> dict[str, ClusterFile]:
    """Return the clusters described in a directory, by name; SettingsError when it cannot be read at all.

    option: by which the directory was given, if whoever reads the error may give another.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as exc:
        advice = f"; name another with {option}" if option else ""
        raise SettingsError(
            f"cannot read the clustermesh directory {directory}: {exc.strerror}{advice}"
        ) from exc
    found = {}
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as exc:
            found[path.name] = ClusterFile(b"", None, f"cannot read {path}: {exc.strerror}")
            continue
        if b"endpoints:" in content:
            name = os.fsencode(path.name).decode(errors="replace")
            found[name] = _parse(path, content) if name == path.name else ClusterFile(b"", None, _NO_NAME)
    return found


@lru_cache(maxsize=1_024)  # two looks a second at hundreds of files that hardly ever change
def _parse(path: Path, content: bytes) -> ClusterFile:
    digest = hashlib.sha256(content).digest()
    try:
        return ClusterFile(digest, parse_config(content.decode(), str(path)), None)
    except (SettingsError, UnicodeDecodeError) as exc:
        return ClusterFile(digest, None, str(exc))


def check_directories(clustermesh_config: Path, remote_config: Path | None) -> None:
    """Read the directories once before anything is started: SettingsError for one that cannot be read, or no cluster.

    One cluster's file that is bad is that cluster's problem alone, now as later; and the caches do without owners.
    """
    files = read_directory(clustermesh_config, "--clustermesh-config")
    errors = [f"cluster {name}: {file.error}" for name, file in files.items() if file.error is not None]
    if errors and len(errors) == len(files):
        raise SettingsError(errors[0])
    if remote_config is not None:
        read_directory(remote_config, "--remote-config")
