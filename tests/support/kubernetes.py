"""A real kube-apiserver and its etcd on loopback of a node, and the few objects that a cilium-agent asks for.

No controller and no kubelet runs: what they would say is written by hand.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
from typing import TYPE_CHECKING, Any, Self

import yaml

from tests.support.etcd import EtcdServer, EtcdSettings, wait_until
from tests.support.namespaces import stop_process

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.support.namespaces import Namespace

PORT, STORE_PORT = 6443, 2399
_TOKEN = "of-the-tests"


class KubeApi:
    """One kube-apiserver, ready when entered, gone with all it knew when left."""

    def __init__(self, node: Namespace, binary: Path, directory: Path, address: str) -> None:
        self._node, self._binary, self._directory, self._address = node, binary, directory, address
        self._stack = contextlib.ExitStack()
        self.kubeconfig = directory / "kubeconfig"

    def __enter__(self) -> Self:
        try:
            self._directory.mkdir()
            self._write_files()
            etcd = EtcdServer(EtcdSettings(command_prefix=tuple(self._node.command())), port=STORE_PORT)
            self._stack.callback(etcd.close)
            etcd.start()
            with (self._directory / "kube-apiserver.log").open("wb") as log:
                process = self._node.popen(self._binary, *self._flags(etcd.url), stdout=log, stderr=log)
            self._stack.callback(stop_process, process)
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
        wait_until(lambda: all(map(self._is_established, self.get(where)["items"])), what=f"{names} served")

    def call(self, method: str, path: str, what: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Make one request; return its status and its object, empty for what is no object."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", PORT, timeout=20, context=context)
        headers = {"Authorization": f"Bearer {_TOKEN}", "Content-Type": "application/json"}
        with contextlib.closing(connection):
            # A socket stays in the namespace where it was made.
            self._node.call(connection.connect)
            connection.request(method, path, json.dumps(what) if what else None, headers)
            response = connection.getresponse()
            text = response.read().decode()
        return response.status, json.loads(text) if text.startswith("{") else {}

    def _is_ready(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            log = (self._directory / "kube-apiserver.log").read_text(errors="replace")
            raise RuntimeError(f"kube-apiserver ended with {process.returncode}:\n{log[-2000:]}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.call("GET", "/readyz")[0] == 200
        return False

    @staticmethod
    def _is_established(definition: dict[str, Any]) -> bool:
        conditions = definition.get("status", {}).get("conditions", [])
        return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)

    def _flags(self, store: str) -> list[str]:
        key = self._directory / "accounts.key"
        words = {
            "etcd-servers": store,
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
        return [f"--{name}={value}" for name, value in words.items()]

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
