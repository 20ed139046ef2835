"""Real etcd servers for tests: started on free ports, broken in every way a test asks for, always cleaned up.

One ``EtcdServer`` is one member with a data directory of its own, ``EtcdCluster`` several of them. They may run behind
a command prefix (``ip netns exec b``) and listen on an address of that namespace. Data, users and roles are prepared
through etcd's JSON gateway by curl, so that the client under test is not needed to prepare its own test.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ETCD = shutil.which("etcd") or "/usr/bin/etcd"
START_TIMEOUT_S = 20.0
_dice = random.SystemRandom()
"""Not the module's own: pytest-randomly seeds that one alike in all processes, before each test, and so servers that
start at the same moment in two of them would be given the same port."""


def free_port() -> int:
    """Return a TCP port nobody listens on; ports of other namespaces are not looked at.

    None that the kernel gives to clients: it would be taken by one of those while its server is stopped.
    """
    while True:
        port = _dice.randrange(20_000, 32_768)
        with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
            probe.bind(("::", port))
            return port


def wait_until(
    check: Callable[[], Any], timeout_s: float = START_TIMEOUT_S, what: str | Callable[[], str] = "condition"
) -> Any:
    """Poll until ``check`` returns something true, and return that; what: for the error, perhaps found only then."""
    deadline = time.monotonic() + timeout_s
    while not (result := check()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what() if callable(what) else what}: not within {timeout_s:g} s")
        time.sleep(0.02)
    return result


async def eventually(check: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """Let the event loop run until ``check`` returns something true, and return that."""
    async with asyncio.timeout(timeout_s):
        while not (result := check()):  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.005)
    return result


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority in a directory, by the openssl program."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.cert = directory / "ca.crt"
        self._key = directory / "ca.key"
        self._serial = 0
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self._key)
        subject = ("-subj", f"/CN={name}", "-days", "2")
        self._openssl("req", "-x509", "-new", "-key", self._key, *subject, "-out", self.cert)

    def issue(
        self, common_name: str, names: str = "IP:127.0.0.1,IP:::1,DNS:localhost", *, expired: bool = False
    ) -> Pair:
        """Issue a certificate for client and server use; ``expired`` ended yesterday; the name may be empty."""
        self._serial += 1
        stem = self.directory / f"{common_name.replace('*', '_')}-{self._serial}"
        subject = f"/CN={common_name}" if common_name else "/O=nobody"
        pair = Pair(stem.with_suffix(".crt"), stem.with_suffix(".key"))
        request, extensions = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n")
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", pair.key)
        self._openssl("req", "-new", "-key", pair.key, "-subj", subject, "-out", request)
        # OpenSSL 3.0 cannot set a start date here; a negative number of days ends in the past all the same.
        days = "-1" if expired else "2"
        signer = ("-CA", self.cert, "-CAkey", self._key, "-set_serial", str(self._serial))
        self._openssl(
            "x509", "-req", "-in", request, *signer, "-days", days, "-extfile", extensions, "-out", pair.cert
        )
        return pair

    def _openssl(self, *words: str | Path) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@dataclass(frozen=True)
class Role:
    """A role and its user of the same name, who comes by certificate if there is no password."""

    name: str
    prefixes: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    password: str = ""
    write: bool = False


def cilium_roles(cluster: str) -> list[Role]:
    """Return the users of a clustermesh-apiserver, as its etcdinit makes them for one cluster."""
    return [
        Role(
            "remote",
            ("cilium/.heartbeat", "cilium/state/", f"cilium/synced/{cluster}/"),
            (f"cilium/cluster-config/{cluster}",),
        ),
        Role(
            f"local-{cluster}",
            ("cilium/.heartbeat", "cilium/cache/", "cilium/cluster-config/", "cilium/synced/"),
        ),
        Role(f"admin-{cluster}", ("",), write=True),
    ]


@dataclass(frozen=True)
class EtcdSettings:
    """How a server is started."""

    address: str = "127.0.0.1"
    """Literal address to listen on; of the namespace that ``command_prefix`` enters."""
    command_prefix: tuple[str, ...] = ()
    """For instance ("ip", "netns", "exec", "b"); must end in exec, so that signals meet etcd."""
    tls: Authority | None = None
    """Serve TLS with a certificate of this authority."""
    client_certificates: bool = True
    """With TLS: demand one, and take its common name for the user."""
    server_names: str = "IP:127.0.0.1,IP:::1,DNS:localhost"
    token: str = "lazymesh-test"
    name: str = "test"
    members: tuple[str, ...] = ()
    """Names and peer URLs of the whole cluster, as ``m1=http://...``; none: it is alone."""
    extra: tuple[str, ...] = field(default=())


class EtcdServer:
    """One etcd; a context manager that starts it and removes all of it at the end."""

    def __init__(
        self, settings: EtcdSettings | None = None, port: int | None = None, peer_port: int | None = None
    ) -> None:
        self.settings = settings or EtcdSettings()
        self.port = port or free_port()
        self._peer_port = peer_port or free_port()
        self._directory = Path(
            tempfile.mkdtemp(prefix="lazymesh-etcd-", dir="/dev/shm")
        )  # fsync costs nothing there
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._frozen = False
        self._server_pair = self.settings.tls and self.settings.tls.issue("etcd", self.settings.server_names)
        self._admin: Pair | None = None
        self._root_password = ""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return self._url(self.port)

    @property
    def urls(self) -> list[str]:
        """The same of all its members, who are one."""
        return [self.url]

    @property
    def running(self) -> bool:
        """Whether there is a process that answers: one that is frozen does not."""
        return self._process is not None and not self._frozen

    def status(self) -> dict[str, Any]:
        """Return what the member says of itself and its leader."""
        return self.call("maintenance/status", {})

    @property
    def pid(self) -> int:
        """The process's id; only while it runs."""
        assert self._process is not None, "etcd is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written so far."""
        return (self._directory / "log").read_text(errors="replace")

    def start(self, *, wait: bool = True) -> None:
        """Start it with the data that is there."""
        assert self._process is None, "etcd is running"
        self._starts += 1
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self.settings.command_prefix, *self._command()],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it serves clients."""

        def ready() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"etcd ended with {self._process.returncode}: {self.log[-2000:]}")
            # A port in another namespace cannot be asked from here, the log can.
            return self.log.count("serving client traffic") >= self._starts

        wait_until(ready, what="etcd ready")

    def stop(self) -> None:
        """Stop it as Kubernetes does; the data stays."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it; the data stays."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it with the same data."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop the process without ending it: connections stay, nothing is answered from here on."""
        os.kill(self.pid, signal.SIGSTOP)
        # The signal is on its way only: some of its threads may go on for a moment, and answer.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        self._frozen = True

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)
        self._frozen = False

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Run it on another port for a while: to change its data while its clients cannot reach it."""
        port, self.port = self.port, free_port()
        try:
            self.start()
            yield
            self.kill()
        finally:
            self.port = port

    def wipe(self, token: str | None = None, *, start: bool = True) -> None:
        """Start over empty; with another token it has another cluster id, without it the same one."""
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._data, ignore_errors=True)
        if token is not None:
            self.settings = replace(self.settings, token=token)
        self._root_password = ""
        if start:
            self.start()

    def close(self) -> None:
        """End the process, whatever state it is in, and remove its files."""
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def replace_server_certificate(self, pair: Pair) -> None:
        """Serve this certificate from the next start on."""
        self._server_pair = pair

    def compact(self, revision: int) -> None:
        """Forget what was before this revision."""
        self.call("kv/compaction", {"revision": str(revision), "physical": True})

    def revision(self) -> int:
        """Return the store's revision."""
        return int(self.status()["header"]["revision"])

    def put(self, key: str, value: str) -> int:
        """Write one key, by a way that is not the client under test."""
        return int(self.call("kv/put", {"key": _b64(key), "value": _b64(value)})["header"]["revision"])

    def delete(self, key: str) -> int:
        """Delete one key."""
        return int(self.call("kv/deleterange", {"key": _b64(key)})["header"]["revision"])

    def enable_auth(self, roles: list[Role], root_password: str = "") -> None:
        """Make users and roles and switch authentication on; later calls need root's password or certificate."""
        self._add_user("root", root_password)
        self.call("auth/role/add", {"name": "root"})
        self.call("auth/user/grant", {"user": "root", "role": "root"})
        for role in roles:
            self.add_role(role)
        self.call("auth/enable", {})
        self._root_password = root_password

    def revoke_tokens(self, role: Role) -> None:
        """Make every token of its user worthless, by a new password that is the old one."""
        self.call("auth/user/changepw", {"name": role.name, "password": role.password})

    def add_role(self, role: Role) -> None:
        """Make one role and its user."""
        self.call("auth/role/add", {"name": role.name})
        for prefix in role.prefixes:
            self.grant(role, prefix, prefix=True)
        for key in role.keys:
            self.grant(role, key, prefix=False)
        self._add_user(role.name, role.password)
        self.call("auth/user/grant", {"user": role.name, "role": role.name})

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Call etcd's JSON gateway, as root when authentication is on and root has a password."""
        headers = {}
        if self._root_password:
            login = {"name": "root", "password": self._root_password}
            headers["Authorization"] = self._post("auth/authenticate", login, {})["token"]
        return self._post(path, body, headers)

    def _post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        words = [
            *self.settings.command_prefix,
            "curl",
            "-sS",
            "--globoff",
            "-m",
            "10",
            "--data",
            json.dumps(body),
        ]
        for name, value in headers.items():
            words += ["-H", f"{name}: {value}"]
        if self.settings.tls:
            words += ["--cacert", str(self.settings.tls.cert)]
        if self.settings.tls and self.settings.client_certificates:
            # With a common name the gateway would refuse to take our password's token for us.
            self._admin = self._admin or self.settings.tls.issue("")
            words += ["--cert", str(self._admin.cert), "--key", str(self._admin.key)]
        done = subprocess.run([*words, f"{self.url}/v3/{path}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{path}: {done.stderr.strip()}")
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError as exc:  # it is about to stop, and says so in words
            raise RuntimeError(f"{path}: {done.stdout.strip()!r}") from exc
        if "error" in answer:
            raise RuntimeError(f"{path}: {answer['error']}")
        return answer

    def _add_user(self, name: str, password: str) -> None:
        self.call(
            "auth/user/add", {"name": name, "password": password, "options": {"no_password": not password}}
        )

    def grant(self, role: Role, key: str, *, prefix: bool) -> None:
        """Let a role read (and write, if it may) one more key or prefix."""
        permission = {"permType": "READWRITE" if role.write else "READ", "key": _b64(key or "\0")}
        if prefix:
            permission["range_end"] = _b64(key[:-1] + chr(ord(key[-1]) + 1) if key else "\0")
        self.call("auth/role/grant", {"name": role.name, "perm": permission})

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    def _url(self, port: int) -> str:
        host = self.settings.address
        scheme = "https" if self.settings.tls else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def _command(self) -> list[str]:
        peer = self._url(self._peer_port).replace("https:", "http:")
        words = {
            "name": self.settings.name,
            "data-dir": str(self._data),
            "listen-client-urls": self.url,
            "advertise-client-urls": self.url,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": ",".join(self.settings.members) or f"{self.settings.name}={peer}",
            "initial-cluster-token": self.settings.token,
            "log-level": "info",
            "logger": "zap",
            # One member elects itself; a second of waiting for others at each start would be the tests' longest.
            "heartbeat-interval": "20",
            "election-timeout": "200",
        }
        if self.settings.tls and self._server_pair:
            words |= {"cert-file": str(self._server_pair.cert), "key-file": str(self._server_pair.key)}
            if self.settings.client_certificates:
                words["trusted-ca-file"] = str(self.settings.tls.cert)
        flags = [f"--{name}={value}" for name, value in words.items()]
        if self.settings.tls and self.settings.client_certificates:
            flags.append("--client-cert-auth")
        return [ETCD, *flags, "--unsafe-no-fsync", *self.settings.extra]

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None, "etcd is not running"
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(how)
            # A frozen process takes no SIGTERM.
            self._process.send_signal(signal.SIGCONT)
        self._process.wait(timeout=START_TIMEOUT_S)
        self._process = None
        self._frozen = False


class EtcdCluster:
    """Several members that agree, on ports of one address; a context manager like one of them."""

    def __init__(self, settings: EtcdSettings | None = None, size: int = 3) -> None:
        settings = settings or EtcdSettings()
        # A lone member elects itself at once; several need time to hear of each other on a busy machine.
        settings = replace(
            settings, extra=(*settings.extra, "--heartbeat-interval=50", "--election-timeout=500")
        )
        peers = {f"m{number}": free_port() for number in range(size)}
        members = tuple(f"{name}=http://{settings.address}:{port}" for name, port in peers.items())
        self.members = [
            EtcdServer(replace(settings, name=name, members=members), peer_port=port)
            for name, port in peers.items()
        ]

    def __enter__(self) -> Self:
        try:
            # One alone has no majority, and is not ready.
            for member in self.members:
                member.start(wait=False)
            for member in self.members:
                member.wait_ready()
            self.wait_leader()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all members and remove their files."""
        for member in self.members:
            member.close()

    @property
    def urls(self) -> list[str]:
        """Where clients find them."""
        return [member.url for member in self.members]

    def wait_leader(self, *, other_than: EtcdServer | None = None) -> EtcdServer:
        """Return the member that leads, once there is one, and one whom all that run agree on."""

        def leads() -> EtcdServer | None:
            try:
                answers = {member: member.status() for member in self.members if member.running}
            except RuntimeError:
                return None
            named = {status.get("leader") for status in answers.values()}
            if len(named) != 1:
                return None
            found = [
                each for each, status in answers.items() if status["header"]["member_id"] in named - {None}
            ]
            return found[0] if found and found[0] is not other_than else None

        leader: EtcdServer = wait_until(leads, what="a leader")
        return leader

    def move_leader(self) -> EtcdServer:
        """Have another member lead, as before maintenance, and return it."""
        leader = self.wait_leader()
        heir = next(member for member in self.members if member.running and member is not leader)
        leader.call("maintenance/transfer-leadership", {"targetID": heir.status()["header"]["member_id"]})
        return self.wait_leader(other_than=leader)

    def put(self, key: str, value: str) -> int:
        """Write one key through whichever member does it."""
        return self._try(lambda member: member.put(key, value))

    def delete(self, key: str) -> int:
        """Delete one key likewise."""
        return self._try(lambda member: member.delete(key))

    def enable_auth(self, roles: list[Role], root_password: str) -> None:
        """Switch authentication on, for all members."""
        self.members[0].enable_auth(roles, root_password)
        for member in self.members:
            member._root_password = root_password

    def _try(self, work: Callable[[EtcdServer], int]) -> int:
        def attempt() -> int | None:
            for member in self.members:
                if member.running:
                    with contextlib.suppress(RuntimeError):  # it is about to elect a leader
                        return work(member)
            return None

        revision: int = wait_until(attempt, what="a write")
        return revision


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
