"""What is looked at, and how results are worded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from lazymesh.errors import DatapathError
from lazymesh.kvstore.config import parse_config
from lazymesh.roles import check
from tests.support.etcd import Authority, free_port

if TYPE_CHECKING:
    from pathlib import Path


def fail(error: Exception) -> str:
    """Raise it."""
    raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DatapathError("no bpffs: mount one"), "no bpffs: mount one"),
        (PermissionError(1, "Operation not permitted"), "Operation not permitted: run this as root"),
    ],
)
def test_failure_is_a_result(error: Exception, words: str) -> None:
    """Never a traceback."""
    result = check._checked("x", lambda: fail(error))
    assert (result.verdict, result.text.startswith(words)) == ("fail", True)


def test_warning_is_told_apart() -> None:
    """By its first word."""
    assert check._checked("x", lambda: "warning: old").verdict == "warn"
    assert check._checked("x", lambda: "fine").verdict == "ok"


def test_kernel_older_than_5_10_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the numbers, not the text."""
    name = os.uname()
    for release, verdict in (("4.19.0-x", "fail"), ("5.9.16", "fail"), ("5.10.0-8", "ok"), ("10.1", "ok")):
        fields = (name.sysname, name.nodename, release, name.version, name.machine)
        monkeypatch.setattr(os, "uname", lambda fields=fields: os.uname_result(fields))
        assert check._checked("kernel", check._kernel).verdict == verdict


@pytest.mark.parametrize("has", [True, False])
def test_what_a_kernel_lacks_is_named_with_what_is_done_instead(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is only slower is no warning."""
    for probe in ("has_lpm_batches", "has_tcx", "kernel_honours_noexist"):
        monkeypatch.setattr(check, probe, lambda: has)
    hook, maps = check._checked("hook", check._hook), check._checked("kernel maps", check._maps)
    assert hook.verdict == maps.verdict == ("ok" if has else "warn")
    assert ("clsact" in hook.text, "one by one" in maps.text) == (not has, not has)
    monkeypatch.setattr(check, "kernel_honours_noexist", lambda: True)
    assert check._checked("kernel maps", check._maps).verdict == "ok"


def test_certificates_are_read_and_dated(tmp_path: Path) -> None:
    """Expiring soon is a warning, expired a failure; a missing file is named with who names it."""
    authority = Authority(tmp_path / "ca")
    for expired, verdict in ((False, "warn"), (True, "fail")):
        pair = authority.issue("remote", expired=expired)
        text = f"endpoints: ['https://x:1']\ncert-file: {pair.cert}\nkey-file: {pair.key}\n"
        (result,) = check._certificates("b", parse_config(text, "file-b"))
        assert result.verdict == verdict
        assert "user remote" in result.text
        assert result.text.endswith("expired, renew it" if expired else "(less than 30 days)")
    text = f"endpoints: ['https://x:1']\ncert-file: {tmp_path}/none\nkey-file: {pair.key}\n"
    (result,) = check._certificates("b", parse_config(text, "file-b"))
    assert (result.verdict, result.text) == ("fail", f"cannot read {tmp_path}/none, named in file-b")


async def test_every_cluster_of_every_directory_is_asked(tmp_path: Path) -> None:
    """A store that is not there, a file that makes no sense, a directory that is missing."""
    (tmp_path / "b").write_text(f"endpoints: ['http://127.0.0.1:{free_port()}']\n")
    (tmp_path / "c").write_text("endpoints: [")
    directories = {"--clustermesh-config": tmp_path, "--remote-config": tmp_path / "none"}
    found = {f.name: f async for f in check.check_node(tmp_path, directories)}
    assert found["cluster b"].verdict == found["cluster c"].verdict == found["clustermesh"].verdict == "fail"
    assert found["clustermesh"].text.endswith("name another with --remote-config")


@pytest.mark.parametrize(("option", "verdict"), [("--clustermesh-config", "warn"), ("--remote-config", "ok")])
async def test_directory_without_clusters(tmp_path: Path, option: str, verdict: str) -> None:
    """Nobody can be asked; or nobody need be, where no cache stands between."""
    found = {f.name: f async for f in check.check_node(tmp_path, {option: tmp_path})}
    assert found["clustermesh"].verdict == verdict
    assert f"{tmp_path} has no cluster file" in found["clustermesh"].text


ALIASES = "cilium-host-aliases: [{{hostname: b.mesh.cilium.io, ips: [127.0.0.1]}}]"
NAMELESS = "b.mesh.cilium.io has no address here"


@pytest.mark.parametrize(
    ("words", "known", "hinted"),
    [
        ("endpoints: ['https://b.mesh.cilium.io:{port}']", False, True),
        ("endpoints: ['https://b.mesh.cilium.io:{port}']", True, False),
        ("endpoints: ['https://b.example:{port}']", False, False),
        (f"endpoints: ['https://b.mesh.cilium.io:{{port}}']\n{ALIASES}", False, False),
    ],
    ids=["no alias", "alias of the pod", "another name", "alias of the file"],
)
async def test_name_that_only_ciliums_pods_know_is_told_with_the_value_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, known: bool, hinted: bool
) -> None:
    """Whoever has an address and does not answer is another matter, and so is a name that we know nothing of."""
    ours = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **named: Any) -> Any:
        if host.endswith((".io", ".example")) and not known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ours("127.0.0.1", *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    (tmp_path / "b").write_text(words.format(port=free_port()))
    found = {f.name: f async for f in check.check_node(tmp_path, {"--clustermesh-config": tmp_path})}
    assert found["cluster b"].verdict == "fail"
    assert (NAMELESS in found["cluster b"].text) == hinted
    assert ("clustermesh.hostAliases" in found["cluster b"].text) == hinted


class Silence:
    """Listens, and answers nobody: a store that hangs. Counts who is connected to it."""

    def __init__(self) -> None:
        self.connected = self.most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep one connection until it is closed."""
        self.connected += 1
        self.most = max(self.most, self.connected)
        with contextlib.suppress(ConnectionError):
            while await reader.read(1024):
                pass
        self.connected -= 1
        writer.close()


async def test_many_stores_are_asked_at_a_time_and_told_of_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for; whoever has an answer waits for those before, and for none behind."""
    monkeypatch.setattr(check, "ETCD_TIMEOUT_S", 0.5)
    silence = Silence()
    names = [f"c{number:02}" for number in range(2 * check.STORES_AT_A_TIME)]
    async with await asyncio.start_server(silence.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for name in names:
            (tmp_path / name).write_text(f"endpoints: ['http://127.0.0.1:{port}']\n")
        (tmp_path / "a").write_text("endpoints: [")
        directories = {"--clustermesh-config": tmp_path}
        results = check.check_node(tmp_path, directories)
        told = {each.name: time.monotonic() async for each in results if each.name.startswith("cluster ")}
    assert list(told) == [f"cluster {name}" for name in ("a", *names)]
    assert silence.most == check.STORES_AT_A_TIME
    assert told["cluster a"] + 0.4 < told["cluster c00"] < told[f"cluster {names[-1]}"] - 0.2
