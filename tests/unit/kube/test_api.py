"""What is asked of the Kubernetes API, and what its failures are called; the ship tier has a pod that asks."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import LazymeshError
from lazymesh.kube.api import KubeApi, Pod

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a service account; nobody here looks at its certificate."""
    monkeypatch.setattr(ssl, "create_default_context", lambda cafile: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    (tmp_path / "namespace").write_text("kube-system\n")
    (tmp_path / "token").write_text("secret")
    return tmp_path


def test_outside_of_a_pod_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person who types the command on a laptop learns where it belongs."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(LazymeshError, match="run this in a pod"):
        KubeApi.of_this_pod()


def test_pod_without_an_account_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its ServiceAccount is not mounted."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    with pytest.raises(LazymeshError, match="no service account at"):
        KubeApi.of_this_pod(tmp_path)


def test_api_that_does_not_answer_is_named(account: Path) -> None:
    """With what was asked of it."""
    api = KubeApi("https://127.0.0.1:1", account)
    assert api.namespace == "kube-system"
    with pytest.raises(LazymeshError, match=r"https://127.0.0.1:1 does not answer PATCH configmaps/x"):
        api.set_config("x", {"a": "b"})


RUNNING = {"containerID": "containerd://1", "ready": True, "state": {"running": {}}}


@pytest.mark.parametrize(
    ("status", "ready", "container"),
    [
        ({}, False, ""),
        ({"containerStatuses": [RUNNING]}, True, "containerd://1"),
        ({"containerStatuses": [RUNNING | {"ready": False}]}, False, "containerd://1"),
        ({"containerStatuses": [RUNNING | {"ready": False, "state": {"waiting": {}}}]}, False, ""),
        (
            {"conditions": [{"type": "Ready", "status": "False"}], "containerStatuses": [RUNNING]},
            True,
            "containerd://1",
        ),
    ],
    ids=["pending", "ready", "not ready", "crashed", "of a node that is not heard of"],
)
def test_pod_is_as_its_container_is(
    account: Path, monkeypatch: pytest.MonkeyPatch, status: dict[str, Any], ready: bool, container: str
) -> None:
    """The condition is somebody else's word: of a node that is away it says no, and the agent may be well."""
    item = {"metadata": {"name": "x"}, "spec": {"nodeName": "a"}, "status": status}
    api = KubeApi("https://127.0.0.1:1", account)
    monkeypatch.setattr(api, "_ask", lambda *_: {"items": [item]})
    assert api.pods("a=b") == [Pod("x", "a", ready, container)]
