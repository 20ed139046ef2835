"""Two clusters in network namespaces, with a real etcd: the stage of the mesh tests and of ``scripts/demo``.

Cluster ``a`` (id 1) is one node namespace and a namespace per pod, wired as Cilium wires them: a host-side
``lxc<n>`` each, /32 and /128 addresses, native routing over the uplink ``eth0``. Cluster ``b`` (id 2) is one
namespace where the whole remote pod CIDR is local, so a thousand remote pods cost nothing. Its etcd holds
records in Cilium's shapes and listens on loopback of node ``a``. Neighbours are permanent and duplicate
address detection is off, so a first packet waits for nothing but what is tested.

Keys and JSON are spelled out here instead of imported: the program must agree with Cilium, not with itself.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import http.client
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support import namespaces
from tests.support.etcd import EtcdServer, EtcdSettings
from tests.support.namespaces import Namespace, NamespaceSet, stop_process
from tests.support.traffic import EchoServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

LOCAL_CIDRS = ("10.1.0.0/24", "fd00:10:1::/64")
REMOTE_CIDRS = ("10.2.0.0/16", "fd00:10:2::/64")
NODE_A, NODE_B = ("192.168.100.1", "fd00:99::1"), ("192.168.100.2", "fd00:99::2")
SERVER_IDENTITY = 131_073
"""In cluster 2's range of 16 bits; the one that POLICY allows."""
OTHER_IDENTITY = 131_074
ETCD_PORT, METRICS_PORT = 2379, 9968
READY_S = max(180.0, int(os.environ.get("LAZYMESH_TEST_PATIENCE", "0")) - 60)
"""For an agent's start, in which it may have to compile: on two emulated processors that took more than 180 s."""

_BASE = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
"""Memory, where there is some: etcd waits for the disk at every write."""

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: servers-only
spec:
  description: Pods may talk to servers, and to nobody else.
  endpointSelector: {}
  egress:
    - toEndpoints:
        - matchLabels:
            k8s:app: server
"""
BOTH_WAYS = (
    POLICY
    + """\
  ingress:
    - fromEndpoints:
        - matchLabels:
            k8s:app: server
"""
)


def pod_address(number: int, family: int = 4) -> str:
    """Return the address of local pod ``number``."""
    return _host(LOCAL_CIDRS[family == 6], 10 + number)


def remote_address(number: int, family: int = 4) -> str:
    """Return the address of remote pod ``number``; 0 is 10.2.0.5."""
    return _host(REMOTE_CIDRS[family == 6], 5 + number)


def _host(cidr: str, offset: int) -> str:
    return str(ipaddress.ip_network(cidr)[offset])


@dataclass(frozen=True)
class Pod:
    """A local pod: its namespace, its host-side interface in node ``a``, its addresses."""

    number: int
    namespace: Namespace

    @property
    def interface(self) -> str:
        """The host side of its veth."""
        return f"lxc{self.number}"

    @property
    def ipv4(self) -> str:
        """Its IPv4 address."""
        return pod_address(self.number)

    @property
    def ipv6(self) -> str:
        """Its IPv6 address."""
        return pod_address(self.number, 6)


class Cluster:
    """What a cluster with one node says in its etcd."""

    store: Store

    def __init__(
        self,
        name: str,
        cluster_id: int,
        cidrs: tuple[str | None, str | None] = REMOTE_CIDRS,
        host: tuple[str, str] = NODE_B,
    ) -> None:
        self.remote_name, self.remote_id = name, cluster_id
        self.cidrs, self.host = cidrs, host
        self.server, self.other = (cluster_id << 16) + 1, (cluster_id << 16) + 2
        """Identities: of pods that POLICY allows, and of others."""

    def publish_cluster(self) -> None:
        """Say everything that a cluster with one node and no pods says."""
        config = {"id": self.remote_id, "capabilities": {"syncedCanaries": True, "maxConnectedClusters": 255}}
        prefixes = ("nodes", "services", "identities", "ip")
        stamp = _now()
        self.store.put_many(
            {f"cilium/cluster-config/{self.remote_name}": _json(config)}
            | {f"cilium/synced/{self.remote_name}/cilium/state/{name}/v1": stamp for name in prefixes}
            | {"cilium/.heartbeat": stamp}
            | dict(
                [
                    self._identity(self.server, {"app": "server"}),
                    self._identity(self.other, {"app": "other"}),
                    self._node(f"{self.remote_name}-1", self.cidrs, self.host),
                ]
            )
        )

    def heartbeat(self) -> None:
        """Say that the cluster lives, as its apiserver does every minute."""
        self.store.put_many({"cilium/.heartbeat": _now()})

    def publish(self, ip: str, identity: int | None = None, space: str = "default", **fields: object) -> None:
        """Publish a pod: ``default`` is pushed, ``ondemand`` pull-only; fields: others of the record."""
        self.store.put_many({_ip_key(space, ip): _json(self._endpoint(ip, identity) | fields)})

    def publish_many(self, ips: Iterable[str], identity: int | None = None, space: str = "default") -> None:
        """Publish pods of one identity in few transactions."""
        self.store.put_many({_ip_key(space, ip): _json(self._endpoint(ip, identity)) for ip in ips})

    def withdraw(self, *ips: str, space: str | None = None) -> None:
        """Delete pods' records from one address space, or from all."""
        spaces = [space] if space else ["default", "ondemand"]
        self.store.delete_many([_ip_key(name, ip) for ip in ips for name in spaces])

    def publish_identity(self, number: int, labels: Mapping[str, str]) -> None:
        """Publish an identity's labels; namespace and cluster are added where missing."""
        self.store.put_many(dict([self._identity(number, labels)]))

    def withdraw_identity(self, number: int) -> None:
        """Delete an identity."""
        self.store.delete_many([f"cilium/state/identities/v1/id/{number}"])

    def publish_node(
        self, name: str, cidrs: tuple[str | None, str | None] = REMOTE_CIDRS, ips: tuple[str, str] = NODE_B
    ) -> None:
        """Publish a node of the cluster with its pod CIDRs (IPv4, IPv6, or None) and internal addresses."""
        self.store.put_many(dict([self._node(name, cidrs, ips)]))

    def _identity(self, number: int, labels: Mapping[str, str]) -> tuple[str, str]:
        needed = {"io.cilium.k8s.policy.cluster": self.remote_name, "io.kubernetes.pod.namespace": "default"}
        text = "".join(f"k8s:{key}={value};" for key, value in sorted((needed | dict(labels)).items()))
        return f"cilium/state/identities/v1/id/{number}", text

    def _node(self, name: str, cidrs: tuple[str | None, str | None], ips: tuple[str, str]) -> tuple[str, str]:
        node = {
            "Name": name,
            "Cluster": self.remote_name,
            "IPAddresses": [{"Type": "InternalIP", "IP": ip} for ip in ips],
            "IPv4AllocCIDR": _go_network(cidrs[0]),
            "IPv4SecondaryAllocCIDRs": None,
            "IPv6AllocCIDR": _go_network(cidrs[1]),
            "IPv6SecondaryAllocCIDRs": None,
            **dict.fromkeys(("IPv4HealthIP", "IPv6HealthIP", "IPv4IngressIP", "IPv6IngressIP"), ""),
            "ClusterID": self.remote_id,
            "Source": "custom-resource",
            "EncryptionKey": 0,
            "Labels": {"kubernetes.io/hostname": name},
            "Annotations": None,
            "WireguardPubKey": "",
            "BootID": "",
        }
        return f"cilium/state/nodes/v1/{self.remote_name}/{name}", _json(node)

    def _endpoint(self, ip: str, identity: int | None) -> dict[str, Any]:
        return {
            "IP": ip,
            "Mask": None,
            "HostIP": self.host[0],
            "ID": self.server if identity is None else identity,
            "Key": 0,
            "Metadata": "",
            "K8sNamespace": "default",
            "K8sPodName": "server-" + ip.replace(":", "-").replace(".", "-"),
            "K8sServiceAccount": "default",
        }


class Lab(Cluster):
    """The two clusters, up when entered; all of it is gone when left, whatever happened in between."""

    def __init__(self, pods: int = 1, *, name: str = "b", cluster_id: int = 2) -> None:
        super().__init__(name, cluster_id)
        self.program: Callable[..., list[str]] = this_checkout
        """Makes words that run ``lazymesh`` with the given arguments; agents of this lab are started by it."""
        self._pod_count = pods
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        atexit.register(self.close)
        try:
            sweep()
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down; safe to call twice."""
        atexit.unregister(self.close)
        with namespaces.uninterrupted():
            self._stack.close()

    def _build(self) -> None:
        self._make_directory()
        names = [f"pod{number}" for number in range(self._pod_count)]
        spaces = self._stack.enter_context(NamespaceSet(["a", "b", *names]))
        self.node_a, self.node_b = spaces["a"], spaces["b"]
        self.pods = [Pod(number, spaces[name]) for number, name in enumerate(names)]
        _wire(self.node_a, self.node_b, self.pods)
        self._start_etcd()
        self._stack.enter_context(EchoServer(self.node_b))
        self.etcd.wait_ready()
        self.publish_cluster()
        self.join_mesh()
        self.set_policy(POLICY)

    def _start_etcd(self) -> None:
        self.etcd = EtcdServer(EtcdSettings(command_prefix=tuple(self.node_a.command())), port=ETCD_PORT)
        self._stack.callback(self.etcd.close)
        # A lab that was killed cannot close it: the next one follows this link to what it has to remove.
        (self.directory / "etcd").symlink_to(self.etcd._directory)
        self.store = Store(self.node_a, ETCD_PORT)
        self._stack.callback(self.store.close)
        self.etcd.start(wait=False)

    def _make_directory(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"lm-{os.getpid()}-", dir=_BASE))
        self._stack.callback(_remove_directory, self.directory)
        for name in ("bpf", "clustermesh", "empty"):
            (self.directory / name).mkdir()
        self.bpffs, self.config = self.directory / "bpf", self.directory / "clustermesh"
        self.no_config = self.directory / "empty"
        self.policy, self.socket = self.directory / "policy.yaml", self.directory / "agent.sock"
        subprocess.run(["mount", "-t", "bpf", "bpf", self.bpffs], check=True)

    # What node a is given.

    def join_mesh(self) -> None:
        """Write the clustermesh config file of cluster b, whole or not at all."""
        target = self.config / self.remote_name
        fresh = self.directory / "fresh"
        fresh.write_text(f"endpoints:\n- {self.etcd.url}\n", encoding="ascii")
        fresh.rename(target)

    def leave_mesh(self) -> None:
        """Remove the clustermesh config file of cluster b."""
        (self.config / self.remote_name).unlink(missing_ok=True)

    def set_policy(self, text: str) -> None:
        """Replace the standalone policy."""
        self.policy.write_text(text, encoding="utf-8")

    # What befalls a pod.

    def unplug(self, pod: Pod) -> None:
        """Delete a pod's interface, both ends of it, under whatever traffic there is."""
        self.node_a.ip([f"link del {pod.interface}"])

    def plug(self, pod: Pod) -> None:
        """Give it one again, with the same addresses."""
        self.node_a.ip([_pod_veth(pod), *_host_side(pod)])
        pod.namespace.ip(_pod_side(pod))

    # What runs on node a.

    def start_agent(
        self, *extra: str, config: Path | None = None, env: Mapping[str, str] | None = None
    ) -> AgentProcess:
        """Start an agent on node a and wait until it is ready; extra options override the usual ones."""
        argv = [
            *("--datapath", "standalone", "--interface", "lxc+", "--uplink", "eth0"),
            *("--clustermesh-config", str(config or self.config), "--cluster-name", "a", "--cluster-id", "1"),
            *("--policy", str(self.policy), "--bpffs", str(self.bpffs), "--socket", str(self.socket)),
            *("--metrics-address", f"127.0.0.1:{METRICS_PORT}", *extra),
        ]
        agent = AgentProcess(self.node_a, argv, self.directory / "agent.log", env, self.program)
        self._stack.callback(agent.stop)
        agent.wait_ready()
        return agent

    def cli(self, *args: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run ``lazymesh ARGS`` on node a, told where the map and the agent are."""
        argv = self.node_a.command(sys.executable, "-m", "lazymesh", *args)
        where = {"LAZYMESH_BPFFS": str(self.bpffs), "LAZYMESH_SOCKET": str(self.socket)}
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout, check=False, env=os.environ | where
        )
        if check and done.returncode:
            raise RuntimeError(f"lazymesh {' '.join(args)}: exit {done.returncode}: {done.stderr.strip()}")
        return done

    def ipcache(self) -> dict[str, Any]:
        """Return the map's entries as ``lazymesh ipcache list -o json`` prints them."""
        entries: dict[str, Any] = json.loads(self.cli("ipcache", "list", "-o", "json").stdout)
        return entries


def this_checkout(*args: str) -> list[str]:
    """Return the words that run this checkout's program."""
    return [sys.executable, "-m", "lazymesh", *args]


class AgentProcess:
    """One ``lazymesh agent`` on a node, its log in a file."""

    def __init__(
        self,
        node: Namespace,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        program: Callable[..., list[str]] = this_checkout,
    ) -> None:
        self._node = node
        self._log_path = log
        # By the environment: earlier versions do not have the option.
        cache = {"LAZYMESH_PROGRAM_CACHE": str(log.with_name("programs.json"))}
        with log.open("ab") as sink:
            self._log_start = sink.tell()
            self.process = node.popen(
                *program("agent", *argv),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**cache, **os.environ, **(env or {})},
            )

    @property
    def pid(self) -> int:
        """The agent's own process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything it has written since its start."""
        with self._log_path.open("rb") as source:
            source.seek(self._log_start)
            return source.read().decode(errors="replace")

    def get(self, path: str, timeout: float = 5) -> str:
        """Fetch a page of its metrics address; RuntimeError if the answer is not 200."""
        status, body = self._node.call(_http_get, METRICS_PORT, path, timeout)
        if status != 200:
            raise RuntimeError(f"{path}: HTTP {status}: {body.strip()}")
        return body

    def wait_ready(self, deadline: float = READY_S) -> None:
        """Return when /readyz says so; on failure the error shows the end of the log."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
                self.get("/readyz")
                return
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the agent ended with exit code {self.process.returncode}:\n{self._tail()}"
                )
            time.sleep(0.02)
        raise RuntimeError(f"the agent is not ready after {deadline:.0f} s:\n{self._tail()}")

    def stop(self) -> int:
        """End it as a service manager does and return its exit code; pins stay without --cleanup."""
        return stop_process(self.process)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def _tail(self) -> str:
        return self.log[-4000:] or "(no log)"


class Store:
    """Writes into a cluster's etcd over its JSON gateway: the client under test writes no test data."""

    _OPERATIONS = 128
    """Per transaction; the server's own limit."""

    def __init__(self, namespace: Namespace | None, port: int, host: str = "127.0.0.1") -> None:
        self._namespace = namespace
        self._connection = http.client.HTTPConnection(host, port, timeout=20)

    def put_many(self, pairs: Mapping[str, str]) -> None:
        """Write keys, 128 at a time, each batch at one revision."""
        self._transact(
            [{"requestPut": {"key": _b64(key), "value": _b64(value)}} for key, value in pairs.items()]
        )

    def delete_many(self, keys: Iterable[str]) -> None:
        """Delete keys, 128 at a time."""
        self._transact([{"requestDeleteRange": {"key": _b64(key)}} for key in keys])

    def get(self, key: str) -> str | None:
        """Return one key's value, None if there is none."""
        found = self._post("/v3/kv/range", {"key": _b64(key)}).get("kvs")
        return base64.b64decode(found[0]["value"]).decode() if found else None

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _transact(self, operations: list[dict[str, Any]]) -> None:
        for start in range(0, len(operations), self._OPERATIONS):
            self._post("/v3/kv/txn", {"success": operations[start : start + self._OPERATIONS]})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            status, text = self._exchange(path, json.dumps(body))
        except (ConnectionError, http.client.HTTPException):
            # The server was restarted since; every request of ours may be repeated.
            self._connection.close()
            status, text = self._exchange(path, json.dumps(body))
        if status != 200:
            raise RuntimeError(f"etcd {path}: HTTP {status}: {text.strip()}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _exchange(self, path: str, body: str) -> tuple[int, str]:
        if self._connection.sock is None:
            # A socket stays in the namespace where it was made, so only connecting has to happen inside.
            if self._namespace:
                self._namespace.call(self._connection.connect)
            else:
                self._connection.connect()
        self._connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, response.read().decode()


def sweep() -> None:
    """Remove what labs left behind that were killed before they could clean up."""
    namespaces.sweep()
    for path in _BASE.glob("lm-*"):
        ours = re.fullmatch(r"lm-(\d+)-.*", path.name)
        if ours and not Path("/proc", ours[1]).exists():
            _remove_directory(path)


def _remove_directory(path: Path) -> None:
    if (path / "bpf").is_mount():
        subprocess.run(["umount", "--lazy", path / "bpf"], check=True)
    shutil.rmtree((path / "etcd").resolve(), ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


# Wiring.


def _wire(node_a: Namespace, node_b: Namespace, pods: list[Pod]) -> None:
    for namespace in (node_a, node_b, *(pod.namespace for pod in pods)):
        namespace.sysctl(_QUIET_IPV6)
    node_a.sysctl({"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1})
    node_a.ip(
        [
            _veth("eth0", _mac(1, 0), _mac(2, 0), node_b),
            *(_pod_veth(pod) for pod in pods),
            *_uplink(NODE_A, NODE_B, _mac(2, 0), REMOTE_CIDRS),
            *(line for pod in pods for line in _host_side(pod)),
        ]
    )
    node_b.ip(
        [
            *_uplink(NODE_B, NODE_A, _mac(1, 0), LOCAL_CIDRS),
            *(f"route add local {cidr} dev lo" for cidr in REMOTE_CIDRS),
        ]
    )
    for pod in pods:
        pod.namespace.ip(_pod_side(pod))


_QUIET_IPV6 = {
    f"ipv6/conf/{scope}/{name}": 0
    for scope in ("all", "default")
    for name in ("disable_ipv6", "accept_dad", "dad_transmits", "router_solicitations")
}
"""No address is tentative, nobody asks for routers: nothing waits, no packet but ours."""


def _mac(kind: int, number: int) -> str:
    return f"02:00:00:{kind:02x}:{number >> 8:02x}:{number & 255:02x}"


def _veth(name: str, mac: str, peer_mac: str, peer_home: Namespace) -> str:
    # Made where one end stays: older kernels take a name for taken when the machine itself has such an interface.
    return f"link add name {name} address {mac} type veth peer name eth0 netns {peer_home.name} address {peer_mac}"


def _pod_veth(pod: Pod) -> str:
    return _veth(pod.interface, _mac(3, pod.number), _mac(4, pod.number), pod.namespace)


def _uplink(mine: tuple[str, str], theirs: tuple[str, str], mac: str, cidrs: tuple[str, str]) -> list[str]:
    return [
        "link set lo up",
        "link set eth0 up",
        f"addr add {mine[0]}/24 dev eth0",
        f"addr add {mine[1]}/64 dev eth0 nodad",
        *(f"neigh add {address} lladdr {mac} dev eth0 nud permanent" for address in theirs),
        *(f"route add {cidr} via {address}" for cidr, address in zip(cidrs, theirs, strict=True)),
    ]


def _host_side(pod: Pod) -> list[str]:
    addresses = (pod.ipv4, pod.ipv6)
    return [
        f"link set {pod.interface} up",
        *(f"route add {address} dev {pod.interface}" for address in addresses),
        *(
            f"neigh add {address} lladdr {_mac(4, pod.number)} dev {pod.interface} nud permanent"
            for address in addresses
        ),
    ]


def _pod_side(pod: Pod) -> list[str]:
    gateways = ("169.254.1.1", "fe80::1")
    return [
        "link set lo up",
        "link set eth0 up",
        f"addr add {pod.ipv4}/32 dev eth0",
        f"addr add {pod.ipv6}/128 dev eth0 nodad",
        *(f"neigh add {gateway} lladdr {_mac(3, pod.number)} dev eth0 nud permanent" for gateway in gateways),
        f"route add {gateways[0]} dev eth0",
        *(f"route add default via {gateway} dev eth0" for gateway in gateways),
    ]


# Cilium's spelling.


def _ip_key(space: str, ip: str) -> str:
    return f"cilium/state/ip/v1/{space}/{ip}"


def _go_network(cidr: str | None) -> dict[str, str] | None:
    if cidr is None:
        return None
    network = ipaddress.ip_network(cidr)
    return {"IP": str(network.network_address), "Mask": base64.b64encode(network.netmask.packed).decode()}


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _http_get(port: int, path: str, timeout: float) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
