"""The configured clusters: Cilium's clustermesh directory, read twice a second.

Every regular file that contains ``endpoints:`` is one cluster, and its name is the cluster's (cilium-formats 5).
Kubernetes swaps such directories by symbolic links, so a change is recognized by content, not by file times.
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
_NO_NAME = "its file name is not UTF-8: rename the file"


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """One cluster's etcd client file."""

    digest: bytes
    """Digest of the content: while it is equal, no reconnect is needed."""
    config: EtcdConfig | None
    error: str | None
    """Why the content cannot be used, in one line; then config is None."""


def read_directory(directory: Path, option: str | None = None) -> dict[str, ClusterFile]:
    """Return the clusters described in a directory, by name; SettingsError when it cannot be read at all.

    option: the option that names the directory, if the error should suggest it.
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


@lru_cache(maxsize=1_024)  # hundreds of files, read twice a second, hardly ever change
def _parse(path: Path, content: bytes) -> ClusterFile:
    digest = hashlib.sha256(content).digest()
    try:
        return ClusterFile(digest, parse_config(content.decode(), str(path)), None)
    except (SettingsError, UnicodeDecodeError) as exc:
        return ClusterFile(digest, None, str(exc))


def check_directories(clustermesh_config: Path, remote_config: Path | None) -> None:
    """Read the directories once before anything starts; SettingsError if one is unreadable, or every file unusable.

    A bad file is only its own cluster's problem, now as later; and a cache works without its owner's store.
    """
    files = read_directory(clustermesh_config, "--clustermesh-config")
    errors = [f"cluster {name}: {file.error}" for name, file in files.items() if file.error is not None]
    if errors and len(errors) == len(files):
        raise SettingsError(errors[0])
    if remote_config is not None:
        read_directory(remote_config, "--remote-config")
