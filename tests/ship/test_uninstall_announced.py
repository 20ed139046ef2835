"""The chart is deleted: its Job tells the agents, waits until each has heard, and they leave nothing when they stop.

The Kubernetes API is a stand-in that does what kubelets do: it brings the ConfigMap's keys into the volume, and has a
pod's readiness from the agent's own /readyz.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chart import rendered
from tests.support.container import Container, Mount
from tests.support.lab import AgentProcess, Lab, remote_address
from tests.support.node import connect, filters, pins

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "secret"


class Api:
    """One namespace with one ConfigMap and one agent."""

    def __init__(self, volume: Path, account: Path, agent: AgentProcess) -> None:
        self.volume, self.agent = volume, agent
        self.asked: list[str] = []
        subprocess.run(
            [
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:prime256v1",
                    "-nodes",
                ),
                *("-subj", "/CN=kubernetes", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"),
                *("-keyout", account / "key.pem", "-out", account / "ca.crt"),
            ],
            check=True,
            capture_output=True,
        )
        (account / "token").write_text(TOKEN)
        (account / "namespace").write_text("kube-system")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(account / "ca.crt", account / "key.pem")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port

    def __enter__(self) -> Api:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """Do what the API and the kubelet would."""
        self.asked.append(f"{method} {path}")
        base = "/api/v1/namespaces/kube-system"
        if method == "PATCH" and path == f"{base}/configmaps/lazymesh":
            for key, value in json.loads(body)["data"].items():
                (self.volume / key).write_text(value)
            return {}
        if method == "GET" and path.startswith(f"{base}/pods?"):
            ready = True
            try:
                self.agent.get("/readyz")
            except RuntimeError:
                ready = False
            return {
                "items": [
                    {
                        "metadata": {"name": "lazymesh-x"},
                        "spec": {"nodeName": "a"},
                        "status": {
                            "containerStatuses": [
                                {"containerID": "crun://1", "ready": ready, "state": {"running": {}}}
                            ]
                        },
                    }
                ]
            }
        return None

    def _handler(api) -> type[http.server.BaseHTTPRequestHandler]:  # noqa: N805 (the handler has its own self)
        class Handler(http.server.BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
                found = api.answer(self.command, self.path, body) if allowed else None
                self.send_response(200 if found is not None else 403)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            do_GET = do_PATCH = _serve  # noqa: N815 (http.server's names)

            def log_message(self, *_args: object) -> None:
                """Say nothing."""

        return Handler


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab."""
    with Lab(pods=1) as built:
        yield built


def job() -> dict[str, Any]:
    """Return the Job's container, as the chart renders it."""
    (found,) = [each for each in rendered({}) if each["kind"] == "Job"]
    container: dict[str, Any] = found["spec"]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.needs("helm")
def test_deleting_the_chart_leaves_nothing(lab: Lab, image: Path) -> None:
    """The Job runs in the image as the chart has it: another user, no capability, a token of its own."""
    volume, account = lab.directory / "options", lab.directory / "account"
    volume.mkdir()
    account.mkdir(mode=0o755)
    agent = lab.start_agent("--uninstall-mark", str(volume / "uninstall"))
    peer = remote_address(0)
    lab.publish(peer)
    assert connect(lab.pods[0].namespace, peer) is not None
    spec = job()
    with Api(volume, account, agent) as api, contextlib.ExitStack():
        container = Container(
            image,
            lab.directory / "containers",
            (),
            (Mount(str(account), "/var/run/secrets/kubernetes.io/serviceaccount", read_only=True),),
            {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port)},
            uid=spec["securityContext"]["runAsUser"],
        )
        done = container.run(*spec["args"])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "Agents:   1 clean up when they are stopped\n"
    assert [asked.split("?")[0].rpartition("/")[2] for asked in api.asked] == ["pods", "lazymesh", "pods"]
    assert agent.stop() == 0
    assert pins(lab) == []
    assert filters(lab.node_a) == []
