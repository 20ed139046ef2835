"""An unmodified cilium-agent on node ``a`` of the lab, with a kube-apiserver of its own: what the stand-in stands for.

The agent sees the node's network namespace, a mount namespace with /run, /sys and a cgroup of its own, the lab's BPF
file system and the lab's clustermesh configuration. The lab's pods are its endpoints, made through its API as its CNI
plugin makes them. No socket of cgroups is touched (no kube-proxy replacement), and the kernel's settings are read-only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from lazymesh.datapath.libbpf import MAP_TYPE_LPM_TRIE, MAP_TYPE_PROG_ARRAY, Map
from tests.support import tcx
from tests.support.bpfobject import program_info_by_id
from tests.support.cilium_boot import FILLED, PINNED, SWITCHED
from tests.support.cilium_ipcache import LAYOUTS, V2, Entry, unpack_key, unpack_value
from tests.support.etcd import wait_until
from tests.support.kubernetes import KubeApi
from tests.support.lab import LOCAL_CIDRS, NODE_A, SERVER_IDENTITY, Lab, Pod
from tests.support.namespaces import stop_process

if TYPE_CHECKING:
    from pathlib import Path

NODE = "a-1"
_U32 = struct.Struct("=I")
_LOOK_EVERY_S = 0.02

_ENTER = """\
set -e
mount -t tmpfs tmpfs /run
mkdir /run/cilium
mount --bind "$STATE/run" /run/cilium
mount -t sysfs sysfs /sys
mount --bind "$BPFFS" /sys/fs/bpf
mount -t cgroup2 cgroup2 "$STATE/cgroup"
mount --bind /proc/sys/kernel /proc/sys/kernel
mount -o remount,bind,ro /proc/sys/kernel
exec "$@"
"""
"""What the agent finds where it looks; nothing of it is seen from outside."""

_NATIVE = {
    "routing-mode": "native",
    "ipv4-native-routing-cidr": "10.0.0.0/8",
    "ipv6-native-routing-cidr": "fd00::/8",
}
_TUNNEL = {"routing-mode": "tunnel", "tunnel-protocol": "vxlan"}

POLICY = {
    "apiVersion": "cilium.io/v2",
    "kind": "CiliumClusterwideNetworkPolicy",
    "metadata": {"name": "servers-only"},
    "spec": {
        "endpointSelector": {},
        "egress": [
            {
                "toEndpoints": [
                    {
                        "matchLabels": {"k8s:app": "server", "k8s:io.cilium.k8s.policy.cluster": "b"},
                        "matchExpressions": [
                            {"key": "k8s:io.kubernetes.pod.namespace", "operator": "Exists"}
                        ],
                    }
                ]
            }
        ],
    },
}
"""Pods may talk to servers of cluster b, of every namespace, and to nobody else."""


@dataclass(frozen=True)
class Build:
    """Where ``scripts/real-cilium`` has put things.

    binaries: cilium-agent, cilium-dbg, kube-apiserver. sources: the agent's module, for its C and its definitions.
    tools: a directory with the clang and llc that the agent is to find.
    """

    version: str
    binaries: Path
    sources: Path
    tools: Path


class RealCilium:
    """A started agent with the lab's pods as its endpoints when entered; everything of it gone when left."""

    layout = LAYOUTS["v2"]

    def __init__(self, lab: Lab, build: Build, *options: str, tunnel: bool = False) -> None:
        self.lab, self.build, self._tunnel = lab, build, tunnel
        self._options = options
        self._stack = contextlib.ExitStack()
        self._state = lab.directory / "cilium"
        self._process: subprocess.Popen[bytes] | None = None
        self.pin = lab.bpffs / "tc" / "globals" / V2.name

    def __enter__(self) -> Self:
        try:
            self._prepare()
            if self._tunnel:
                _end_tunnels(self.lab)
            self.kubernetes = self._stack.enter_context(
                KubeApi(
                    self.lab.node_a,
                    self.build.binaries / "kube-apiserver",
                    self.lab.directory / "kubernetes",
                    NODE_A[0],
                )
            )
            self._populate()
            self._stack.callback(self.stop)
            self.start()
            for pod in self.lab.pods:
                self._add_endpoint(pod)
            self.wait_regenerated()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # Life.

    def start(self, wait: bool = True) -> None:
        """Start the agent's process, and wait until its API answers."""
        settings = {
            "STATE": str(self._state),
            "BPFFS": str(self.lab.bpffs),
            "PATH": f"{self.build.tools}:{os.environ['PATH']}",
            "K8S_NODE_NAME": NODE,
            "CILIUM_K8S_NAMESPACE": "kube-system",
        }
        # It joins a cgroup of its own first, so that the root of what it mounts is that and not the machine's.
        script = f'echo $$ >"{self._cgroup}/cgroup.procs" && exec unshare --mount --cgroup -- sh -c "$INSIDE" sh "$@"'
        argv = self.lab.node_a.command("sh", "-c", script, "sh", self.build.binaries / "cilium-agent")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*argv, *self._flags(), *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **settings, "INSIDE": _ENTER},
            )
        if wait:
            wait_until(self._is_up, 180, f"cilium-agent up; its log is {self.log_path}")

    def stop(self) -> None:
        """End the agent's process; its programs, pins and maps stay."""
        process, self._process = self._process, None
        if process:
            stop_process(process, grace=30)

    def restart(self) -> RealBoot:
        """End the agent and start it again; what it does then is watched."""
        self.stop()
        boot = RealBoot(self)
        self.start(wait=False)
        return boot

    # What there is to see.

    @property
    def pid(self) -> int:
        """The agent's process."""
        assert self._process is not None, "cilium-agent is not running"
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """What the agent writes, of all its starts."""
        return self._state / "agent.log"

    @property
    def map_id(self) -> int | None:
        """The id of the map behind the pin; None while there is none."""
        with contextlib.suppress(OSError), contextlib.closing(Map.pinned(self.pin)) as found:
            return found.map_id
        return None

    def entries(self) -> dict[str, Entry]:
        """Return what the map behind the pin holds, whoever wrote it, by canonical prefix."""
        with contextlib.closing(Map.pinned(self.pin)) as found:
            return {unpack_key(key): unpack_value(value) for key, value in found.items()}

    def dump(self) -> dict[bytes, bytes]:
        """Return the map behind the pin as its bytes are."""
        with contextlib.closing(Map.pinned(self.pin)) as found:
            return dict(found.items())

    def read_by(self, device: str) -> frozenset[int]:
        """Return the ids of the ipcaches that Cilium's programs on a device, or their tail calls, refer to."""
        ids = self.lab.node_a.call(tcx.tcx_programs, device)
        found: set[int] = set()
        with contextlib.suppress(OSError):
            for info in map(program_info_by_id, ids):
                if info.name.startswith("cil_"):
                    found |= _ipcaches_of(info.map_ids)
        return frozenset(found)

    def api(self, method: str, path: str, what: Any = None, timeout: float = 120) -> Any:
        """Make a request of the agent's API; RuntimeError if it says no."""
        connection = _UnixConnection(self._state / "run" / "cilium.sock", timeout)
        with contextlib.closing(connection):
            body = None if what is None else json.dumps(what)
            connection.request(method, f"/v1{path}", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        if response.status >= 300:
            raise RuntimeError(f"cilium-agent {method} {path}: HTTP {response.status}: {text.strip()}")
        return json.loads(text) if text else None

    def dbg(self, *words: str) -> str:
        """Run ``cilium-dbg WORDS`` where the agent is, and return what it prints."""
        argv = ["nsenter", f"--target={self.pid}", "--mount", "--net", self.build.binaries / "cilium-dbg"]
        return subprocess.run([*argv, *words], check=True, capture_output=True, text=True, timeout=60).stdout

    def remote(self, name: str = "b") -> dict[str, Any]:
        """Return what the agent says of a cluster of the mesh."""
        mesh = self.api("GET", "/healthz").get("cluster-mesh", {})
        return next((one for one in mesh.get("clusters", []) if one["name"] == name), {})

    def endpoints(self) -> list[dict[str, Any]]:
        """Return the pods' endpoints as the agent shows them."""
        found = self.api("GET", "/endpoint")
        return [
            one for one in found if one["status"]["networking"].get("interface-name", "").startswith("lxc")
        ]

    def wait_synced(self, timeout_s: float = 60) -> None:
        """Wait until the agent has read the whole listing of cluster b."""
        wait_until(lambda: is_synced(self.remote()), timeout_s, "cilium-agent has synchronised cluster b")

    def wait_regenerated(self, timeout_s: float = 180) -> None:
        """Wait until every endpoint is ready, its programs over the map behind the pin."""
        wait_until(self._is_regenerated, timeout_s, "endpoints ready")

    def drops(self) -> int:
        """Count the packets that the policy has denied on their way out."""
        rows = json.loads(self.dbg("bpf", "metrics", "list", "-o", "json"))
        denied = [row for row in rows if row["reason"] == "Policy denied"]
        return sum(row["packets"] for row in denied if row["direction"].lower() == "egress")

    # Inside.

    def check_alive(self) -> None:
        """RuntimeError with the end of its log if the agent's process has ended by itself."""
        if self._process is None or self._process.poll() is not None:
            tail = self.log_path.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"cilium-agent has ended:\n{tail}")

    def _is_up(self) -> bool:
        self.check_alive()
        with contextlib.suppress(OSError, http.client.HTTPException, RuntimeError):
            return bool(self.api("GET", "/healthz")["cilium"]["state"] in {"Ok", "Warning"})
        return False

    def _is_regenerated(self) -> bool:
        states = [one["status"]["state"] for one in self.endpoints()]
        fresh = all(self.read_by(pod.interface) == {self.map_id} for pod in self.lab.pods)
        return fresh and states == ["ready"] * len(self.lab.pods)

    def _prepare(self) -> None:
        for name in ("run", "lib", "cgroup"):
            (self._state / name).mkdir(parents=True)
        (self.lab.bpffs / "tc" / "globals").mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.build.sources / "bpf", self._state / "lib" / "bpf")
        self._stack.callback(self._remove_pins)
        # What comes from the module cache is read-only, and so could not be removed with the lab.
        for path in (self._state / "lib").rglob("*"):
            path.chmod(0o755)
        mounted = self.lab.directory / "cgroup2"
        mounted.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", mounted], check=True)
        self._stack.callback(subprocess.run, ["umount", mounted], check=True)
        self._cgroup = mounted / f"lm-{os.getpid()}"
        self._cgroup.mkdir()
        self._stack.callback(self._leave_cgroup)

    def _leave_cgroup(self) -> None:
        # What the agent has started may need a moment longer.
        wait_until(lambda: not (self._cgroup / "cgroup.procs").read_text(), what="the agent's cgroup empty")
        self._cgroup.rmdir()

    def _remove_pins(self) -> None:
        for name in ("cilium", "tc"):
            shutil.rmtree(self.lab.bpffs / name, ignore_errors=True)

    def _populate(self) -> None:
        home = self.build.sources / "pkg/k8s/apis/cilium.io/client/crds"
        self.kubernetes.define(sorted(home.glob("v2*/*.yaml")))
        annotations = {
            f"network.cilium.io/ipv{family}-cilium-host": cidr.replace("0/24", "1").replace("/64", "1")
            for family, cidr in zip((4, 6), LOCAL_CIDRS, strict=True)
        }
        self.kubernetes.create(
            "/api/v1/nodes",
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {
                    "name": NODE,
                    "annotations": annotations,
                    "labels": {"kubernetes.io/hostname": NODE},
                },
                "spec": {"podCIDR": LOCAL_CIDRS[0], "podCIDRs": list(LOCAL_CIDRS)},
                "status": {"addresses": [{"type": "InternalIP", "address": one} for one in NODE_A]},
            },
        )
        wait_until(
            lambda: self.kubernetes.call("GET", "/api/v1/namespaces/default")[0] == 200, what="default"
        )
        for pod in self.lab.pods:
            self._create_pod(pod)
        self.kubernetes.create("/apis/cilium.io/v2/ciliumclusterwidenetworkpolicies", POLICY)

    def _create_pod(self, pod: Pod) -> None:
        home, name = "/api/v1/namespaces/default/pods", f"pod{pod.number}"
        made = self.kubernetes.create(
            home,
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": {"app": "client"}},
                "spec": {"nodeName": NODE, "containers": [{"name": "it", "image": "none"}]},
            },
        )
        ips = [{"ip": pod.ipv4}, {"ip": pod.ipv6}]
        made["status"] = {"phase": "Running", "hostIP": NODE_A[0], "podIP": pod.ipv4, "podIPs": ips}
        self.kubernetes.replace(f"{home}/{name}/status", made)

    def _add_endpoint(self, pod: Pod) -> None:
        name, container = f"pod{pod.number}", f"{pod.number:064x}"
        for address in (pod.ipv4, pod.ipv6):
            self.api("POST", f"/ipam/{quote(address, safe='')}?owner=default%2F{name}")
        mine = json.loads(self.lab.node_a.run("ip", "-json", "link", "show", pod.interface))[0]
        theirs = json.loads(pod.namespace.run("ip", "-json", "link", "show", "eth0"))[0]
        self.api(
            "PUT",
            f"/endpoint/{quote(f'cni-attachment-id:{container}:eth0', safe='')}",
            {
                "addressing": {"ipv4": pod.ipv4, "ipv6": pod.ipv6},
                "container-id": container,
                "container-interface-name": "eth0",
                "interface-name": pod.interface,
                "interface-index": mine["ifindex"],
                "host-mac": mine["address"],
                "mac": theirs["address"],
                "k8s-namespace": "default",
                "k8s-pod-name": name,
                "state": "waiting-for-identity",
                "sync-build-endpoint": True,
            },
        )

    def _flags(self) -> list[str]:
        run = self._state / "run"
        words = {
            "cluster-name": "a",
            "cluster-id": 1,
            "clustermesh-config": self.lab.config,
            "k8s-kubeconfig-path": self.kubernetes.kubeconfig,
            "ipam": "kubernetes",
            "identity-allocation-mode": "crd",
            **(_TUNNEL if self._tunnel else _NATIVE),
            "devices": "eth0",
            "enable-ipv4": True,
            "enable-ipv6": True,
            "enable-ipv4-masquerade": False,
            "enable-ipv6-masquerade": False,
            "kube-proxy-replacement": False,
            "enable-l7-proxy": False,
            "enable-hubble": False,
            "enable-health-checking": False,
            "enable-endpoint-health-checking": False,
            "lib-dir": self._state / "lib",
            "state-dir": run,
            "socket-path": run / "cilium.sock",
            "bpf-root": "/sys/fs/bpf",
            "cgroup-root": self._state / "cgroup",
        }
        return [
            f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in words.items()
        ]


class RealBoot:
    """One start of the agent, watched from outside: the same steps and times as the stand-in's."""

    def __init__(self, cilium: RealCilium) -> None:
        self._cilium = cilium
        self._old = cilium.map_id
        self._began = time.monotonic()
        self._done = {name: threading.Event() for name in (PINNED, SWITCHED, FILLED)}
        self._cancelled = threading.Event()
        self.times: dict[str, float] = {}
        """When each step was seen, in seconds from the start; a device's switch under its name."""
        self._thread = threading.Thread(target=self._watch, name="watch cilium-agent")
        self._thread.start()

    def wait(self, step: str, timeout: float = 300) -> float:
        """Wait for a step and return when it was."""
        end = time.monotonic() + timeout
        while not self._done[step].wait(0.2):
            self._cilium.check_alive()
            if time.monotonic() > end:
                raise TimeoutError(f"cilium-agent: not {step} within {timeout:.0f} s")
        return self.times[step]

    def close(self) -> None:
        """Watch no more."""
        self._cancelled.set()
        self._thread.join()

    def _watch(self) -> None:
        pods = [pod.interface for pod in self._cilium.lab.pods]
        while not self._cancelled.wait(_LOOK_EVERY_S) and not all(
            one.is_set() for one in self._done.values()
        ):
            new = self._cilium.map_id
            if new not in (None, self._old):
                self._note(PINNED)
                for name in pods:
                    if name not in self.times and new in self._cilium.read_by(name):
                        self._note(name)
                if all(name in self.times for name in pods):
                    self._note(SWITCHED)
            if PINNED in self.times:
                with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
                    if is_synced(self._cilium.remote()):
                        self._note(FILLED)

    def _note(self, step: str) -> None:
        self.times.setdefault(step, time.monotonic() - self._began)
        if step in self._done:
            self._done[step].set()


def is_synced(remote: dict[str, Any]) -> bool:
    """Tell whether everything of a cluster that endpoints need has been listed."""
    synced = remote.get("synced", {})
    return bool(remote.get("ready")) and all(synced.get(one) for one in ("endpoints", "identities", "nodes"))


def _end_tunnels(lab: Lab) -> None:
    """Make node b the other end of the first pod's VXLAN: an inner frame is for whom the pod takes for its gateway."""
    pod = lab.pods[0]
    gateway = json.loads(lab.node_a.run("ip", "-json", "link", "show", pod.interface))[0]["address"]
    encap = f"encap ip id {SERVER_IDENTITY} dst {NODE_A[0]} dev vxlan0"
    lab.node_b.ip(
        [
            f"link add vxlan0 address {gateway} type vxlan external dstport 8472",
            "link set vxlan0 up",
            *(f"route replace {cidr} {encap}" for cidr in LOCAL_CIDRS),
            *(
                f"neigh add {one} lladdr 02:00:00:00:00:01 dev vxlan0 nud permanent"
                for one in (pod.ipv4, pod.ipv6)
            ),
        ]
    )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Call the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _ipcaches_of(map_ids: Any, depth: int = 1) -> set[int]:
    found: set[int] = set()
    for map_id in map_ids:
        with contextlib.suppress(OSError), contextlib.closing(Map.by_id(map_id)) as opened:
            layout = opened.layout
            if (layout.kind, layout.key_size) == (MAP_TYPE_LPM_TRIE, 24):
                found.add(map_id)
            elif layout.kind == MAP_TYPE_PROG_ARRAY and depth and layout.max_entries <= 1024:
                for call in opened.program_ids():
                    with contextlib.suppress(OSError):
                        found |= _ipcaches_of(program_info_by_id(call).map_ids, depth - 1)
    return found
