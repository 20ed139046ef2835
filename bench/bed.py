"""A store with a cluster in it, and how it is reached: without TLS, or with certificates on both sides."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from tests.support.etcd import Authority, EtcdServer, EtcdSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.etcd import Pair
    from tests.support.lab import Lab


class Bed:
    """The store with its pods, and how it is reached."""

    def __init__(self, lab: Lab, name: str, url: str, tls: tuple[Path, Pair] | None = None) -> None:
        self.lab, self.url, self.tls = lab, url, tls
        self.config = lab.directory / f"config-{name}"
        self.config.mkdir()
        words = f"endpoints:\n- {url}\n"
        if tls is not None:
            words += f"trusted-ca-file: {tls[0]}\ncert-file: {tls[1].cert}\nkey-file: {tls[1].key}\n"
        self.file = self.config / lab.remote_name
        self.file.write_text(words, encoding="ascii")


@contextlib.contextmanager
def tls_bed(lab: Lab) -> Iterator[Bed]:
    """Run another etcd beside the lab's, with certificates on both sides and the same records."""
    authority = Authority(lab.directory / "authority")
    settings = EtcdSettings(command_prefix=tuple(lab.node_a.command()), tls=authority)
    with EtcdServer(settings) as server:
        bed = Bed(lab, "tls", server.url, (authority.cert, authority.issue("remote")))
        yield bed
