"""The chart's values as the tests set them, and what Helm renders with them."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "chart"
MEMBER: dict[str, Any] = {"name": "a", "id": 1}
"""The cluster's name and id, without which the chart refuses to render."""
POLICY = "kind: CiliumClusterwideNetworkPolicy\n"
UNPRIVILEGED: dict[str, Any] = {"privileged": False}
STANDALONE: dict[str, Any] = {"datapath": "standalone", "interfaces": ["lxc+"]}
MONITORED: dict[str, Any] = {
    "metrics": {kind: {"enabled": True} for kind in ("podMonitor", "rules", "dashboard")},
}

OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "image.repository": ("elsewhere/lazymesh", {}),
    "image.tag": ("9.9.9", {}),
    "image.digest": (f"sha256:{'f' * 64}", {}),
    "image.pullPolicy": ("Always", {}),
    "imagePullSecrets": ([{"name": "regcred"}], {}),
    "nameOverride": ("mesh", {}),
    "fullnameOverride": ("mesh", {}),
    "cluster.name": ("b", {}),
    "cluster.id": (2, {}),
    "cluster.maxConnected": (511, {}),
    "cluster.region": ("eu", {}),
    "datapath": ("auto", {}),
    "interfaces": (["veth+"], {}),
    "uplinks": (["eth0"], {}),
    "attach": ("clsact", {}),
    "meshCIDRs": (["b=10.2.0.0/16"], {}),
    "shadow": (True, {}),
    "onMiss": ("pass", {}),
    "holdTimeout": (100, {}),
    "holdTimeoutAction": ("drop", {}),
    "signalRate": (0, {}),
    "staleLimit": ("90s", {}),
    "ipcacheSize": (100_000, {}),
    "etcdTransport": ("grpcio", {}),
    "policy": (POLICY, STANDALONE | {"uplinks": ["eth0"]}),
    "extraArgs": (["--log-level", "debug"], {}),
    "extraEnv": ([{"name": "TZ", "value": "UTC"}], {}),
    "log.format": ("text", {}),
    "log.level": ("debug", {}),
    "clustermesh.secret": ("mesh", {}),
    "clustermesh.remoteCertSecret": ("remote", {}),
    "clustermesh.localCertSecret": ("local", {}),
    "clustermesh.kvstoremeshSecret": ("", {}),
    "clustermesh.hostAliases": ([{"ip": "192.0.2.1", "hostnames": ["b.mesh.cilium.io"]}], {}),
    "metrics.port": (9999, {}),
    "metrics.host": ("127.0.0.1", {}),
    "metrics.podMonitor.enabled": (True, {}),
    "metrics.podMonitor.interval": ("10s", MONITORED),
    "metrics.podMonitor.labels": ({"release": "prometheus"}, MONITORED),
    "metrics.rules.enabled": (True, {}),
    "metrics.rules.labels": ({"release": "prometheus"}, MONITORED),
    "metrics.rules.runbookUrl": ("https://docs.example/troubleshooting", MONITORED),
    "metrics.dashboard.enabled": (True, {}),
    "metrics.dashboard.labels": ({"grafana": "yes"}, MONITORED),
    "privileged": (False, {}),
    "capabilities.needed": (["NET_ADMIN"], UNPRIVILEGED),
    "capabilities.extra": (["SYS_RESOURCE"], UNPRIVILEGED),
    "bpffs": ("/run/bpf", {}),
    "nodeHeaders": (True, {}),
    "resources": ({"limits": {"memory": "1Gi"}}, {}),
    "priorityClassName": ("high", {}),
    "tolerations": ([], {}),
    "nodeSelector": ({"mesh": "yes"}, {}),
    "affinity": ({"nodeAffinity": {}}, {}),
    "updateStrategy": ({"type": "OnDelete"}, {}),
    "terminationGracePeriodSeconds": (30, {}),
    "podLabels": ({"team": "net"}, {}),
    "podAnnotations": ({"note": "x"}, {}),
    "serviceAccount.name": ("mesh", {}),
    "serviceAccount.annotations": ({"note": "x"}, {}),
    "uninstall.enabled": (False, {}),
    "uninstall.timeout": (10, {}),
    "uninstall.tolerations": ([{"key": "dedicated", "operator": "Exists"}], {}),
}
"""For each value another one than the default, and what must be set for it to have an effect."""

WRONG: list[dict[str, Any]] = [
    {"datapath": "magic"},
    {"datapath": "standalone"},
    STANDALONE | {"policy": "x"},
    {"image": {"digest": "latest"}},
    {"cluster": {"name": "Not A Name"}},
    {"cluster": {"id": -1}},
    {"cluster": {"id": 256}},
    {"cluster": {"id": 512, "maxConnected": 511}},
    {"cluster": {"maxConnected": 256}},
    {"interfaces": ["a-name-that-is-too-long"]},
    {"meshCIDRs": ["10.2.0.0/16"]},
    {"meshCIDRs": ["b=10.2.0.0/33"]},
    {"meshCIDRs": ["b=10.2.0.0.0/16"]},
    {"meshCIDRs": ["b=fd00::/129"]},
    {"onMiss": "wait"},
    {"holdTimeout": 0},
    {"staleLimit": ""},
    {"staleLimit": "30m1h"},
    {"shadow": "yes"},
    {"privileged": None},
    {"metrics": {"port": 0}},
    {"metrics": {"host": "foo"}},
    {"metrics": {"prot": 9968}},
    {"metrics": {"podMonitor": True}},
    {"metrics": {"rules": {"labels": {"release": 1}}}},
    {"imagePullSecrets": ["regcred"]},
    {"fullnameOverride": "Not A Name"},
    {"extraArgs": "--log-level debug"},
    {"extraEnv": [{"name": "PORT", "value": 1}]},
    {"capabilities": {"extra": ["CAP_SYS_RESOURCE"]}},
    {"clustermesh": {"secret": ""}},
    {"resources": {"limits": {"memory": "lots"}}},
    {"typo": 1},
]


def helm(values: dict[str, Any], kubernetes: str = "1.31.0") -> subprocess.CompletedProcess[str]:
    """Render the chart, hooks included, with values over those of a cluster in a mesh."""
    words = ("template", "lazymesh", CHART, "--namespace", "kube-system", "--kube-version", kubernetes)
    return subprocess.run(
        [ROOT / "scripts" / "helm", *words, "--values", "-"],
        input=json.dumps(values | {"cluster": MEMBER | values.get("cluster", {})}),
        capture_output=True,
        text=True,
        check=False,
    )


@cache
def _rendered(values: str, kubernetes: str) -> str:
    done = helm(json.loads(values), kubernetes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(values: dict[str, Any], kubernetes: str = "1.31.0") -> list[dict[str, Any]]:
    """Return the objects of the chart."""
    return [each for each in yaml.safe_load_all(_rendered(json.dumps(values), kubernetes)) if each]


def merged(base: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return the values with one more set."""
    head, _, rest = path.partition(".")
    if not rest:
        return base | {head: value}
    return base | {head: merged(base.get(head, {}), rest, value)}


def defaults() -> dict[str, Any]:
    """Return values.yaml."""
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return values
