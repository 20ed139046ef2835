"""A real kube-apiserver and its etcd on loopback of a node: alone, or as a cluster with roles and controllers.

Alone it allows everybody everything, and what controllers and kubelets would say is written by hand. What a kubelet
does in a cluster is in kubelet.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from tests.support.etcd import EtcdServer, EtcdSettings, wait_until
from tests.support.namespaces import stop_process

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.namespaces import Namespace

ROOT = Path(__file__).parents[2]
BUILT = ROOT / ".cache" / "kubernetes"
"""What scripts/kubernetes has built; complete when ``version`` is there."""
PORT, STORE_PORT = 6443, 2399
_TOKEN = "of-the-tests"


class KubeApi:
    """One kube-apiserver, ready when entered, gone with all it knew when left."""

    def __init__(self, node: Namespace, binary: Path, directory: Path, address: str) -> None:
        self.node = node
        self._binary, self._directory, self._address = binary, directory, address
        self._stack = contextlib.ExitStack()
        self.kubeconfig = directory / "kubeconfig"

    def __enter__(self) -> Self:
        try:
            self._directory.mkdir()
            self._write_files()
            etcd = EtcdServer(EtcdSettings(command_prefix=tuple(self.node.command())), port=STORE_PORT)
            self._stack.callback(etcd.close)
            etcd.start()
            process = self._start(self._binary, {"etcd-servers": etcd.url} | self._flags())
            wait_until(lambda: self._is_ready(process), 60, "kube-apiserver ready")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def create(self, path: str, what: dict[str, Any]) -> dict[str, Any]:
        """Create an object below a collection's path; one that is there already is left as it is."""
        status, body = self.call("POST", path, what)
        if status not in {200, 201, 202, 409}:
            raise RuntimeError(f"{path}: HTTP {status}: {body.get('message')}")
        return body

    def get(self, path: str) -> dict[str, Any]:
        """Return an object or a collection."""
        status, body = self.call("GET", path)
        if status != 200:
            raise RuntimeError(f"{path}: HTTP {status}: {body.get('message')}")
        return body

    def replace(self, path: str, what: dict[str, Any]) -> None:
        """Write an object, or its status, over what is there."""
        status, body = self.call("PUT", path, what)
        if status != 200:
            raise RuntimeError(f"{path}: HTTP {status}: {body.get('message')}")

    def define(self, files: Iterable[Path]) -> None:
        """Create custom resource definitions from YAML files and wait until they are served."""
        where = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        names = [self.create(where, yaml.safe_load(one.read_text()))["metadata"]["name"] for one in files]
        wait_until(lambda: all(map(self._is_established, self.get(where)["items"])), 120, f"{names} served")

    def call(
        self, method: str, path: str, what: dict[str, Any] | None = None, token: str = _TOKEN
    ) -> tuple[int, dict[str, Any]]:
        """Make one request, as whoever has the token; return its status and its object, empty for what is no object."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", PORT, timeout=20, context=context)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
        with contextlib.closing(connection):
            # A socket stays in the namespace where it was made.
            self.node.call(connection.connect)
            connection.request(method, path, json.dumps(what) if what else None, headers)
            response = connection.getresponse()
            text = response.read().decode()
        return response.status, json.loads(text) if text.startswith("{") else {}

    def _start(self, binary: Path, flags: dict[str, object]) -> subprocess.Popen[bytes]:
        with (self._directory / f"{binary.name}.log").open("wb") as log:
            words = [f"--{name}={value}" for name, value in flags.items()]
            process = self.node.popen(binary, *words, stdout=log, stderr=log)
        self._stack.callback(stop_process, process)
        return process

    def _is_ready(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            log = (self._directory / "kube-apiserver.log").read_text(errors="replace")
            raise RuntimeError(f"kube-apiserver ended with {process.returncode}:\n{log[-2000:]}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.call("GET", "/readyz")[0] == 200
        return False

    @staticmethod
    def _is_established(definition: dict[str, Any]) -> bool:
        conditions = definition.get("status", {}).get("conditions") or []
        return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)

    def _flags(self) -> dict[str, object]:
        key = self._directory / "accounts.key"
        return {
            "secure-port": PORT,
            "bind-address": "127.0.0.1",
            "advertise-address": self._address,
            "endpoint-reconciler-type": "none",
            "cert-dir": self._directory / "certificates",
            "service-cluster-ip-range": "10.96.0.0/16,fd00:96::/112",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": key,
            "service-account-signing-key-file": key,
            "authorization-mode": "AlwaysAllow",
            "token-auth-file": self._directory / "tokens.csv",
            # Nobody makes accounts, and nobody takes the taints of new nodes away.
            "disable-admission-plugins": "ServiceAccount,TaintNodesByCondition",
        }

    def _write_files(self) -> None:
        key = self._directory / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        (self._directory / "tokens.csv").write_text(f'{_TOKEN},admin,admin,"system:masters"\n')
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "clusters": [
                {
                    "name": "it",
                    "cluster": {"server": f"https://127.0.0.1:{PORT}", "insecure-skip-tls-verify": True},
                }
            ],
            "users": [{"name": "it", "user": {"token": _TOKEN}}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))


class Cluster(KubeApi):
    """A KubeApi in which roles count, with the controllers that make, replace and delete what a chart asks for.

    Helm and kubectl run beside it, on loopback of its node. Built by scripts/kubernetes.
    """

    def __init__(self, node: Namespace, directory: Path, address: str = "192.0.2.1") -> None:
        super().__init__(node, BUILT / "kube-apiserver", directory, address)
        self.authority = directory / "certificates" / "apiserver.crt"
        """Whom pods are to believe that they talk to the API."""
        self._audit = directory / "audit.log"

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            key = self._directory / "accounts.key"
            self._start(
                BUILT / "kube-controller-manager",
                {
                    "kubeconfig": self.kubeconfig,
                    "controllers": ",".join(_CONTROLLERS),
                    "root-ca-file": self.authority,
                    "service-account-private-key-file": key,
                    "leader-elect": "false",
                    "secure-port": 0,
                },
            )
            account = "/api/v1/namespaces/kube-system/serviceaccounts/default"
            wait_until(lambda: self.call("GET", account)[0] == 200, 60, "controllers at work")
        except BaseException:
            self._stack.close()
            raise
        return self

    @property
    def environment(self) -> dict[str, str]:
        """What helm and kubectl find their way by, with themselves on the PATH."""
        home = self._directory / "home"
        home.mkdir(exist_ok=True)
        path = f"{BUILT}:{ROOT / '.cache' / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "KUBECONFIG": str(self.kubeconfig), "HOME": str(home)}

    def run(self, *argv: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run helm or kubectl, given a text on stdin, to its end."""
        return subprocess.run(
            self.node.command(*argv),
            input=text,
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=self.environment,
            timeout=100,
        )

    def token(
        self, account: str, bound_to: dict[str, Any] | None = None, namespace: str = "kube-system"
    ) -> str:
        """Return a token of a service account, bound to an object as a kubelet binds it to the pod."""
        spec: dict[str, Any] = {"expirationSeconds": 3600}
        if bound_to:
            named = {name: bound_to["metadata"][name] for name in ("name", "uid")}
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": bound_to["kind"], **named}
        made = self.create(
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
        )
        return str(made["status"]["token"])

    def audited(self) -> int:
        """Return how many requests of service accounts there were."""
        return len(self._audit.read_text().splitlines())

    def asked_by(self, account: str, since: int = 0) -> set[tuple[str, str, str]]:
        """Return what an account in kube-system has asked of the API: verb, resource, and the name if there was one.

        since: how many requests of all accounts had been made before.
        """
        user = f"system:serviceaccount:kube-system:{account}"
        events = [json.loads(line) for line in self._audit.read_text().splitlines()[since:]]
        return {
            (event["verb"], event["objectRef"]["resource"], event["objectRef"].get("name", ""))
            for event in events
            if event["user"]["username"] == user and "objectRef" in event
        }

    def _flags(self) -> dict[str, object]:
        return super()._flags() | {
            "allow-privileged": "true",
            "authorization-mode": "RBAC",
            "disable-admission-plugins": "TaintNodesByCondition",
            "audit-policy-file": self._directory / "audit.yaml",
            "audit-log-path": self._audit,
        }

    def _write_files(self) -> None:
        super()._write_files()
        rules = [
            {
                "level": "Metadata",
                "userGroups": ["system:serviceaccounts"],
                "omitStages": ["RequestReceived"],
            },
            {"level": "None"},
        ]
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}
        (self._directory / "audit.yaml").write_text(yaml.safe_dump(policy))


_CONTROLLERS = (
    "daemonset-controller",
    "job-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
)
