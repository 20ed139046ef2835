"""The few calls to the Kubernetes API that lazymesh makes, as the pod's own service account.

The agent itself never asks it. A client library would bring more megabytes than there are calls here.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lazymesh.errors import LazymeshError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Pod:
    """What is needed of a pod."""

    name: str
    node: str
    """Empty until it has been scheduled."""
    ready: bool
    """According to its own probe; the pod's condition is also false when its node is unreachable."""
    container: str
    """Its id, which changes with each restart; empty while it is not running."""


class KubeApi:
    """One namespace of the cluster; every failure is a LazymeshError.

    account: the directory with ``token``, ``ca.crt`` and ``namespace``; the token is read at each call: it is renewed.
    """

    def __init__(self, url: str, account: Path) -> None:
        self._url = url
        self._account = account
        try:
            self.namespace = (account / "namespace").read_text(encoding="ascii").strip()
            self._tls = ssl.create_default_context(cafile=str(account / "ca.crt"))
        except OSError as exc:
            raise LazymeshError(
                f"no service account at {account}: {exc.strerror}; run this in a pod that mounts one"
            ) from exc

    @classmethod
    def of_this_pod(cls, account: Path = ACCOUNT) -> Self:
        """Return the API of the cluster that this pod runs in."""
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
        if not host:
            raise LazymeshError(
                "no Kubernetes API here (KUBERNETES_SERVICE_HOST is not set): run this in a pod"
            )
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}", account)

    def set_config(self, name: str, values: dict[str, str]) -> None:
        """Set keys of a ConfigMap; the others stay."""
        self._ask("PATCH", f"configmaps/{name}", {"data": values})

    def pods(self, selector: str) -> list[Pod]:
        """Return the pods with these labels."""
        query = urllib.parse.urlencode({"labelSelector": selector})
        found: list[dict[str, Any]] = self._ask("GET", f"pods?{query}")["items"]
        return [_pod(item) for item in found]

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 (always https)
            f"{self._url}/api/v1/namespaces/{self.namespace}/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Accept": "application/json", "Content-Type": "application/merge-patch+json"},
        )
        try:
            token = (self._account / "token").read_text(encoding="ascii").strip()
            request.add_header("Authorization", f"Bearer {token}")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self._tls) as answer:  # noqa: S310
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as exc:
            raise LazymeshError(f"{self._url} refused {method} {path}: {exc.code} {exc.reason}") from exc
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise LazymeshError(f"{self._url} does not answer {method} {path}: {exc}") from exc


def _pod(item: dict[str, Any]) -> Pod:
    containers = item.get("status", {}).get("containerStatuses", ())
    running = all("running" in each.get("state", {}) for each in containers)
    return Pod(
        item["metadata"]["name"],
        item.get("spec", {}).get("nodeName", ""),
        any(each["ready"] for each in containers),
        " ".join(each.get("containerID", "") for each in containers) if running else "",
    )
