"""What scheduler and kubelet do for the pods of a cluster's one node, as far as lazymesh's pods ask for it.

It reads pods from the API, brings ConfigMaps, Secrets and tokens to where they are mounted and keeps them fresh, runs
the container by crun as its securityContext says, reports phase and readiness, and ends what is deleted. A pod that
asks for something that is not done here is an error, not a pod without it. Every pod is in the node's network.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from tests.support.container import Container, Mount
from tests.support.kubernetes import PORT
from tests.support.namespaces import stop_process
from tests.support.node import http_status

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.support.kubernetes import Cluster

NODE = "node-a"
_LOOK_EVERY_S = 0.2
_API = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(PORT)}
_LEFT_TO_THE_CONTAINER = "emptyDir"
"""Container has a /tmp of its own."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    volumes: dict[str, Path]
    restarts: int = 0
    reported: dict[str, Any] = field(default_factory=dict)


class Kubelet:
    """Works when entered; its containers end when it is left.

    host_paths: where the node has what hostPath volumes name. An error of its own is raised by ``check``, and at the
    end.
    """

    def __init__(
        self, cluster: Cluster, image: Path, directory: Path, host_paths: Mapping[str, Path]
    ) -> None:
        self._cluster, self._image, self._directory = cluster, image, directory
        self._host_paths = host_paths
        self._pods: dict[str, _Running] = {}
        self.late = False
        """Whether what has changed in the API takes longer than anybody waits to come to the node."""
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="kubelet")

    def __enter__(self) -> Self:
        self._directory.mkdir()
        labels = {"kubernetes.io/os": "linux", "kubernetes.io/hostname": NODE}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": labels}}
        self._cluster.create("/api/v1/nodes", node)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        for pod in self._pods.values():
            stop_process(pod.process)
        if exc[0] is None:
            self.check()

    def check(self) -> None:
        """Raise what this has died of, if it has."""
        if self._error:
            raise RuntimeError("the kubelet of the tests has died") from self._error

    def log(self, pod: str) -> str:
        """Return what a pod has written, of all its containers' lives."""
        return (self._directory / f"{pod}.log").read_text(errors="replace")

    def _work(self) -> None:
        try:
            while not self._stop.wait(_LOOK_EVERY_S):
                for pod in self._cluster.get("/api/v1/pods")["items"]:
                    self._turn(pod | {"apiVersion": "v1", "kind": "Pod"})
        except BaseException as error:
            # Told to whoever waits for it.
            self._error = error

    def _turn(self, pod: dict[str, Any]) -> None:
        meta, spec = pod["metadata"], pod["spec"]
        home = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        mine = self._pods.get(meta["uid"])
        if "deletionTimestamp" in meta:
            if (
                mine
                and stop_process(mine.process, grace=spec["terminationGracePeriodSeconds"]) == -signal.SIGKILL
            ):
                raise RuntimeError(f"{meta['name']} did not end within its grace period")
            self._pods.pop(meta["uid"], None)
            self._cluster.call("DELETE", home, {"gracePeriodSeconds": 0})
        elif "nodeName" not in spec:
            target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
            binding = {
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": meta["name"]},
                "target": target,
            }
            self._cluster.create(f"{home}/binding", binding)
        elif mine and mine.reported.get("phase") not in {"Succeeded", "Failed"}:
            self._look_after(pod, mine, home)
        elif pod["status"]["phase"] == "Pending":
            # What is to be mounted may come later.
            with contextlib.suppress(LookupError):
                self._pods[meta["uid"]] = self._start(pod)

    def _look_after(self, pod: dict[str, Any], mine: _Running, home: str) -> None:
        # What has been deleted since stays as it was.
        with contextlib.suppress(LookupError):
            if not self.late:
                self._fill(pod, mine.volumes)
        code = mine.process.poll()
        if code is not None and pod["spec"]["restartPolicy"] == "Always":
            again = self._run(pod, mine.volumes)
            mine.process, mine.restarts, code = again, mine.restarts + 1, None
        (container,) = pod["spec"]["containers"]
        ready = code is None and self._is_ready(container)
        phase = "Running" if code is None else "Failed" if code else "Succeeded"
        seen = {"phase": phase, "ready": ready, "restarts": mine.restarts}
        if seen == mine.reported:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        state = {"running": {"startedAt": now}} if code is None else {"terminated": {"exitCode": code}}
        pod["status"] |= {
            "phase": phase,
            "startTime": pod["status"].get("startTime", now),
            "conditions": [
                {"type": kind, "status": str(ready), "lastTransitionTime": now}
                for kind in ("Ready", "ContainersReady")
            ],
            "containerStatuses": [
                {
                    "name": container["name"],
                    "containerID": f"crun://{pod['metadata']['uid']}-{mine.restarts}",
                    "image": container["image"],
                    "imageID": container["image"],
                    "ready": ready,
                    "restartCount": mine.restarts,
                    "state": state,
                }
            ],
        }
        # Refused if somebody was faster: then it is looked at again.
        if self._cluster.call("PUT", f"{home}/status", pod)[0] == 200:
            mine.reported = seen

    def _is_ready(self, container: dict[str, Any]) -> bool:
        if "readinessProbe" not in container:
            return True
        probe = container["readinessProbe"]["httpGet"]
        (port,) = [each["containerPort"] for each in container["ports"] if each["name"] == probe["port"]]
        # Where else it may listen than on loopback is the chart's to know.
        if probe["host"] != "127.0.0.1":
            raise NotImplementedError(f"a probe of {probe['host']}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return http_status(self._cluster.node, port, probe["path"])[0] == 200
        return False

    def _start(self, pod: dict[str, Any]) -> _Running:
        home = self._directory / pod["metadata"]["uid"]
        volumes = {
            each["name"]: self._host_paths[each["hostPath"]["path"]]
            if "hostPath" in each
            else home / each["name"]
            for each in pod["spec"]["volumes"]
            if _LEFT_TO_THE_CONTAINER not in each
        }
        for each in volumes.values():
            if not each.exists():
                each.mkdir(parents=True)
        self._fill(pod, volumes)
        return _Running(self._run(pod, volumes), volumes)

    def _run(self, pod: dict[str, Any], volumes: dict[str, Path]) -> subprocess.Popen[bytes]:
        (spec,) = pod["spec"]["containers"]
        mounts = tuple(
            Mount(str(volumes[each["name"]]), each["mountPath"], each.get("readOnly", False))
            for each in spec["volumeMounts"]
            if each["name"] in volumes
        )
        security = spec["securityContext"]
        if not security["readOnlyRootFilesystem"]:
            raise NotImplementedError("a root file system that can be written to")
        container = Container(
            self._image,
            self._directory / "containers",
            _capabilities(security),
            mounts,
            _API | {each["name"]: each["value"] for each in spec.get("env", ())},
            security.get("runAsUser", 0),
        )
        with (self._directory / f"{pod['metadata']['name']}.log").open("ab") as log:
            return self._cluster.node.popen(
                *container.command(*spec["args"]), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    # Volumes.

    def _fill(self, pod: dict[str, Any], volumes: dict[str, Path]) -> None:
        (container,) = pod["spec"]["containers"]
        user = container["securityContext"].get("runAsUser", 0)
        for each in pod["spec"]["volumes"]:
            sources = _sources(each)
            if sources is None:
                continue
            directory = volumes[each["name"]]
            wanted: dict[str, bytes] = {}
            for source in sources:
                wanted |= self._files(pod, source, directory)
            for name in {path.name for path in directory.iterdir()} - wanted.keys():
                (directory / name).unlink()
            for name, content in wanted.items():
                _write(directory / name, content, user)

    def _files(self, pod: dict[str, Any], source: dict[str, Any], directory: Path) -> dict[str, bytes]:
        ((kind, what),) = source.items()
        namespace = pod["metadata"]["namespace"]
        if kind == "serviceAccountToken":
            token = directory / what["path"]
            if token.exists():
                return {token.name: token.read_bytes()}
            return {
                token.name: self._cluster.token(pod["spec"]["serviceAccountName"], pod, namespace).encode()
            }
        if kind == "downwardAPI":
            (item,) = what["items"]
            if item["fieldRef"]["fieldPath"] != "metadata.namespace":
                raise NotImplementedError(f"a file of {item['fieldRef']['fieldPath']}")
            return {item["path"]: namespace.encode()}
        resource = {"configMap": "configmaps", "secret": "secrets"}[kind]
        path = f"/api/v1/namespaces/{namespace}/{resource}/{what['name']}"
        status, found = self._cluster.call("GET", path)
        if status == 404 and what.get("optional"):
            return {}
        if status == 404:
            raise LookupError(path)
        data = {
            key: base64.b64decode(value) if kind == "secret" else value.encode()
            for key, value in found.get("data", {}).items()
        }
        if "items" in what:
            return {item["path"]: data[item["key"]] for item in what["items"]}
        return data


def _sources(volume: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return what a volume's files are made of, None if it is none of files."""
    if "projected" in volume:
        sources: list[dict[str, Any]] = volume["projected"]["sources"]
        return sources
    if "configMap" in volume:
        return [{"configMap": volume["configMap"]}]
    if "secret" in volume:
        secret = volume["secret"]
        return [{"secret": {"name": secret["secretName"], "optional": secret.get("optional", False)}}]
    if "hostPath" in volume or _LEFT_TO_THE_CONTAINER in volume:
        return None
    raise NotImplementedError(f"a volume like {volume}")


def _capabilities(security: dict[str, Any]) -> tuple[str, ...] | None:
    if security.get("privileged"):
        return None
    # A container of ours that is not privileged has a runtime's default system calls, and no profile of AppArmor's.
    if security.get("seccompProfile") != {"type": "RuntimeDefault"} or security["allowPrivilegeEscalation"]:
        raise NotImplementedError(f"a container like {security}")
    if security["capabilities"]["drop"] != ["ALL"]:
        raise NotImplementedError(f"capabilities like {security['capabilities']}")
    return tuple(security["capabilities"].get("add", ()))


def _write(path: Path, content: bytes, user: int) -> None:
    """Write a file, whole or not at all, that only the container's user can read."""
    if path.exists() and path.read_bytes() == content:
        return
    fresh = path.with_name(f".{path.name}")
    fresh.write_bytes(content)
    fresh.chmod(0o400)
    os.chown(fresh, user, user)
    fresh.rename(path)
