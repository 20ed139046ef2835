"""What a real Kubernetes API says of chart and manifests: valid, admitted, and allowed no more than is needed.

Controllers run and no kubelet, so that nothing is started; test_cluster_life.py has what becomes of the pods.
"""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.chart import (
    CHART,
    MEMBER,
    MONITORED,
    OTHERS,
    POLICY,
    ROOT,
    STANDALONE,
    UNPRIVILEGED,
    WRONG,
    defaults,
    merged,
    rendered,
)
from tests.support.container import Container, Mount, manifest
from tests.support.docs import blocks, shell
from tests.support.etcd import wait_until
from tests.support.kubernetes import BUILT, PORT, Cluster
from tests.support.namespaces import NamespaceSet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("Kubernetes", "helm")

JOB = "lazymesh-uninstall"
AGENT = "lazymesh-agent"
SYSTEM = "/api/v1/namespaces/kube-system"
COMBINATIONS: dict[str, dict[str, Any]] = {
    "shadow": {"shadow": True},
    "unprivileged": UNPRIVILEGED | {"capabilities": {"extra": ["SYS_RESOURCE"]}},
    "standalone": STANDALONE | {"uplinks": ["eth0"], "policy": POLICY},
    "auto": {"datapath": "auto", "nodeHeaders": True, "bpffs": "/run/bpf"},
    "monitored": MONITORED,
    "own account": {"serviceAccount": {"name": "mesh"}, "uninstall": {"enabled": False}},
    "no kvstoremesh": {"clustermesh": {"kvstoremeshSecret": ""}, "metrics": {"host": "127.0.0.1"}},
}
"""In each other's succession, each is an upgrade of the one before."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without nodes that knows the Prometheus operator's kinds."""
    with NamespaceSet(["kubernetes"]) as spaces:
        node = spaces["kubernetes"]
        node.ip(["link set lo up"])
        with Cluster(node, tmp_path_factory.mktemp("cluster") / "it") as running:
            running.define(BUILT.glob("monitoring.coreos.com_*.yaml"))
            yield running


@pytest.fixture
def _no_release(cluster: Cluster) -> Iterator[None]:
    """Whatever becomes of the test, the next one finds no release."""
    yield
    cluster.run(
        "helm", "uninstall", "lazymesh", "--namespace=kube-system", "--ignore-not-found", "--no-hooks"
    )


def apply(cluster: Cluster, objects: list[dict[str, Any]], *words: str) -> str:
    """Apply objects on the server's side, an unknown field being an error; returns what was done."""
    argv = ("kubectl", "apply", "--server-side", "--validate=strict", *words, "--filename=-")
    done = cluster.run(*argv, text=yaml.safe_dump_all(objects))
    assert (done.returncode, done.stderr) == (0, ""), "neither refused nor warned of"
    return done.stdout


def helm(cluster: Cluster, *words: str, values: dict[str, Any] | None = None) -> str:
    """Run Helm on the release, with values over the defaults; returns what it says."""
    done = cluster.run("helm", *words, "--namespace", "kube-system", *given(values))
    assert done.returncode == 0, done.stderr
    return done.stdout


def given(values: dict[str, Any] | None) -> list[str]:
    """Return the words that give Helm values."""
    return [f"--set-json={key}={json.dumps(value)}" for key, value in (values or {}).items()]


def has(cluster: Cluster, path: str) -> bool:
    """Tell whether there is an object."""
    return cluster.call("GET", path)[0] == 200


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """Return the objects of some kinds."""
    return [each for each in objects if each["kind"] in kinds]


def bare_pod(template: dict[str, Any]) -> dict[str, Any]:
    """Return the pod that a controller would make of a template, without the account that it may not find."""
    spec = {key: value for key, value in template["spec"].items() if key != "serviceAccountName"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"}, "spec": spec}


@pytest.mark.parametrize("path", sorted(OTHERS))
def test_objects_of_every_value_are_accepted(cluster: Cluster, path: str) -> None:
    """The API finds every field valid, and nothing of it deprecated; hooks included."""
    value, base = OTHERS[path]
    objects = rendered(merged(base, path, value))
    assert len(apply(cluster, objects, "--dry-run=server").splitlines()) == len(objects)


def test_field_that_the_api_does_not_know_is_refused(cluster: Cluster) -> None:
    """What the tests around this one rely on."""
    (wrong,) = of_kind(rendered({}), "DaemonSet")
    wrong["spec"]["template"]["spec"]["hostNetwrk"] = True
    argv = ("kubectl", "apply", "--server-side", "--validate=strict", "--dry-run=server", "--filename=-")
    done = cluster.run(*argv, text=yaml.safe_dump(wrong))
    assert done.returncode != 0
    assert ".spec.template.spec.hostNetwrk: field not declared in schema" in done.stderr


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_objects_of_combinations_are_accepted(cluster: Cluster, values: dict[str, Any]) -> None:
    """All of each, hooks included."""
    objects = rendered(values)
    assert len(apply(cluster, objects, "--dry-run=server").splitlines()) == len(objects)


@pytest.mark.usefixtures("_no_release")
def test_release_goes_from_any_values_to_any(cluster: Cluster) -> None:
    """Installed, upgraded through all combinations, rolled back, and taken away; nothing of it is left."""
    member = {"cluster": MEMBER}
    helm(cluster, "install", "lazymesh", str(CHART), values=member)
    pods = []
    for values in COMBINATIONS.values():
        helm(cluster, "upgrade", "lazymesh", str(CHART), "--reset-values", values=member | values)
        pods.append(json.dumps(daemonset(cluster)["spec"]["template"]))
    assert len(set(pods)) == len(pods), "each is another pod, and so rolled out"
    helm(cluster, "rollback", "lazymesh", "1")
    assert daemonset(cluster)["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"]
    helm(cluster, "uninstall", "lazymesh", "--no-hooks", "--wait")
    assert ours(cluster) == []


@pytest.mark.usefixtures("_no_release")
def test_what_is_left_of_the_job_goes_whether_or_not_helm_has_left_it(cluster: Cluster) -> None:
    """Helm 3.19 and later delete the hooks that succeeded when a later one fails, those before leave them all."""
    (text,) = [text for _, text in blocks("run no hooks")]
    for kinds in ((), ("Job",), ("ServiceAccount", "Role", "RoleBinding", "Job")):
        helm(cluster, "install", "lazymesh", str(CHART), values={"cluster": MEMBER})
        left = [each for each in of_kind(rendered({}), *kinds) if each["metadata"]["name"] == JOB]
        if left:
            apply(cluster, left)
        shell(text, cluster.node.command(), cluster.environment)
        wait_until(lambda: ours(cluster) == [], what="nothing left")


ALIASES = [{"ip": "192.0.2.7", "hostnames": ["b.mesh.cilium.io"]}]


@pytest.mark.parametrize(
    ("having", "without"),
    [("Deployment", "DaemonSet"), ("DaemonSet", "Deployment"), ("DaemonSet", ""), ("", "DaemonSet")],
    ids=["kvstoremesh", "no kvstoremesh", "no clustermesh-apiserver", "no addresses"],
)
@pytest.mark.usefixtures("_no_release")
def test_addresses_of_other_clusters_are_copied_from_where_cilium_has_them(
    cluster: Cluster, having: str, without: str
) -> None:
    """As its charts of 1.18 and 1.19 render them: in one of two places, or nowhere."""
    ciliums = [cilium(kind, kind == having) for kind in (having, without) if kind]
    helm(cluster, "install", "lazymesh", str(CHART), values={"cluster": MEMBER})
    (text,) = [text for _, text in blocks("run aliases")]
    apply(cluster, ciliums)
    try:
        shell(text, cluster.node.command(), cluster.environment)
    finally:
        cluster.run("kubectl", "delete", "--filename=-", text=yaml.safe_dump_all(ciliums))
    found = daemonset(cluster)["spec"]["template"]["spec"].get("hostAliases")
    assert found == (ALIASES if having else None)


def cilium(kind: str, aliases: bool) -> dict[str, Any]:
    """Return as much of Cilium's DaemonSet, or of clustermesh-apiserver's Deployment, as is looked at."""
    name = {"DaemonSet": "cilium", "Deployment": "clustermesh-apiserver"}[kind]
    spec = {"containers": [{"name": "it", "image": "x"}]} | ({"hostAliases": ALIASES} if aliases else {})
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": "kube-system"},
        "spec": {
            "selector": {"matchLabels": {"k8s-app": name}},
            "template": {"metadata": {"labels": {"k8s-app": name}}, "spec": spec},
        },
    }


EARLIER = "6683aca"
"""Its chart has values of the agent not that are there now."""


@pytest.mark.needs("earlier versions")
@pytest.mark.usefixtures("_no_release")
def test_release_of_an_earlier_chart_is_upgraded_as_documented(cluster: Cluster, tmp_path: Path) -> None:
    """What was set stays set, and what is new has its default; the way that would leave it out is refused."""
    words = ["git", "-C", ROOT, "archive", EARLIER, "deploy/chart"]
    archive = subprocess.run(words, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", tmp_path], input=archive, check=True)
    mine = {"cluster": MEMBER}
    helm(cluster, "install", "lazymesh", str(tmp_path / "deploy/chart"), values=mine)
    assert "stale-limit" not in options(cluster)
    reused = cluster.run(
        "helm", "upgrade", "lazymesh", str(CHART), "--namespace=kube-system", "--reuse-values"
    )
    assert reused.returncode != 0
    assert "don't meet the specifications of the schema" in reused.stderr
    assert "staleLimit" in reused.stderr
    (upgrade,) = [text for page, text in blocks("run helm") if page == "upgrade.md"]
    shell(upgrade, cluster.node.command(), cluster.environment)
    now = options(cluster)
    assert (now["cluster-name"], now["cluster-id"]) == ("a", 1)
    assert now["stale-limit"] == defaults()["staleLimit"]
    helm(cluster, "uninstall", "lazymesh", "--no-hooks", "--wait")
    assert ours(cluster) == []


def options(cluster: Cluster) -> dict[str, Any]:
    """Return the agent's options as the release's ConfigMap has them."""
    data = cluster.get(f"{SYSTEM}/configmaps/lazymesh")["data"]
    found: dict[str, Any] = yaml.safe_load(data["config.yaml"])
    return found


def daemonset(cluster: Cluster) -> dict[str, Any]:
    """Return the release's DaemonSet."""
    return cluster.get("/apis/apps/v1/namespaces/kube-system/daemonsets/lazymesh")


def ours(cluster: Cluster) -> list[str]:
    """Return the names of all objects that are labelled as the release's."""
    kinds = "all,configmaps,serviceaccounts,secrets,roles,rolebindings,podmonitors,prometheusrules"
    words = ("--all-namespaces", "--selector=app.kubernetes.io/instance=lazymesh", "--output=name")
    done = cluster.run("kubectl", "get", kinds, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_values_that_are_wrong_install_nothing(cluster: Cluster) -> None:
    """Helm refuses each with the schema's word, before the API is asked for anything."""
    for values in WRONG:
        words = ("helm", "install", "wrong", str(CHART), "--namespace", "kube-system")
        done = cluster.run(*words, *given(values))
        assert done.returncode != 0, values
        assert "don't meet the specifications of the schema" in done.stderr
    assert json.loads(helm(cluster, "list", "--all", "--output", "json")) == []


def test_plain_manifests_are_applied_and_taken_away(cluster: Cluster) -> None:
    """By kubectl's own kustomize; a second time changes nothing, whichever way it is applied."""
    where = ("-k", "deploy/kubernetes")
    checked = cluster.run(
        "kubectl", "apply", "--server-side", "--dry-run=server", "--validate=strict", *where
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    assert ours(cluster) == []
    assert cluster.run("kubectl", "apply", *where).returncode == 0
    assert daemonset(cluster)["spec"]["template"]["spec"]["serviceAccountName"] == "lazymesh"
    again = cluster.run("kubectl", "apply", *where).stdout.splitlines()
    assert [line.rpartition(" ")[2] for line in again] == ["unchanged"] * 3
    assert cluster.run("kubectl", "diff", *where).returncode == 0
    assert cluster.run("kubectl", "delete", *where).returncode == 0
    assert ours(cluster) == []


@pytest.mark.parametrize("values", [{}, UNPRIVILEGED], ids=["privileged", "unprivileged"])
def test_namespace_has_to_admit_privileged_pods(cluster: Cluster, values: dict[str, Any]) -> None:
    """Of the levels of Pod Security only that one admits the agent; the Job that uninstalls passes the strictest."""
    objects = rendered(values)
    agent, job = (bare_pod(of_kind(objects, kind)[0]["spec"]["template"]) for kind in ("DaemonSet", "Job"))
    for level in ("privileged", "baseline", "restricted"):
        name = f"level-{level}"
        labels = {"pod-security.kubernetes.io/enforce": level}
        cluster.create(
            "/api/v1/namespaces",
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}},
        )
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        wait_until(partial(has, cluster, account), what="an account for pods without one")
        pods = f"/api/v1/namespaces/{name}/pods?dryRun=All"
        status, answer = cluster.call("POST", pods, agent)
        assert status == (201 if level == "privileged" else 403), answer["message"]
        if status == 403:
            assert f'violates PodSecurity "{level}:latest"' in answer["message"]
        assert cluster.call("POST", pods, job)[0] == 201


def test_what_monitors_comes_from_the_chart_without_a_release(cluster: Cluster) -> None:
    """As it would be of one: it finds the pods of the plain manifests."""
    (text,) = [text for _, text in blocks("run monitoring")]
    try:
        shell(text, cluster.node.command(), cluster.environment)
        made = ours(cluster)
        monitor = cluster.get("/apis/monitoring.coreos.com/v1/namespaces/kube-system/podmonitors/lazymesh")
    finally:
        shell(text.replace("apply", "delete"), cluster.node.command(), cluster.environment)
    assert sorted(made) == [
        "configmap/lazymesh-dashboard",
        "podmonitor.monitoring.coreos.com/lazymesh",
        "prometheusrule.monitoring.coreos.com/lazymesh",
    ]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= manifest("DaemonSet")["spec"]["template"]["metadata"]["labels"].items()
    assert ours(cluster) == []


def rules(cluster: Cluster, account: str) -> list[Any]:
    """Return what the API itself says an account may do in kube-system."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "kube-system"},
    }
    where = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    status, answer = cluster.call("POST", where, review, cluster.token(account))
    assert status == 201, answer
    assert answer["status"]["incomplete"] is False
    found: list[Any] = answer["status"]["resourceRules"]
    return found


@pytest.fixture
def announcer(cluster: Cluster) -> Iterator[list[dict[str, Any]]]:
    """What the Job has to do with, one agent's pod among it; yields the objects of its rights."""
    objects = rendered({})
    rights = [
        each
        for each in of_kind(objects, "ServiceAccount", "Role", "RoleBinding")
        if each["metadata"]["name"] == JOB
    ]
    rest = [each for each in of_kind(objects, "ConfigMap", "ServiceAccount") if each not in rights]
    labels = {"app.kubernetes.io/instance": "lazymesh", "app.kubernetes.io/component": "agent"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": AGENT, "namespace": "kube-system", "labels": labels},
        "spec": {"containers": [{"name": "agent", "image": "x"}]},
    }
    apply(cluster, [*rights, *rest, pod])
    report(cluster, ready=True)
    yield rights
    gone = cluster.run("kubectl", "delete", "--filename=-", text=yaml.safe_dump_all([*rights, *rest, pod]))
    assert gone.returncode == 0, gone.stderr


def report(cluster: Cluster, *, ready: bool) -> None:
    """Say of the agent's container, as its kubelet would, that it runs, and whether it is ready."""
    home = f"{SYSTEM}/pods/{AGENT}"
    now = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    words = {"name": "agent", "image": "x", "imageID": "x", "restartCount": 0, "containerID": "crun://1"}
    pod = cluster.get(home)
    pod["status"]["containerStatuses"] = [words | {"ready": ready, "state": now}]
    cluster.replace(f"{home}/status", pod)


def announce(cluster: Cluster, image: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the Job's container with the account's own token, as the pod that the chart describes."""
    account = directory / "account"
    account.mkdir()
    (account / "namespace").write_text("kube-system")
    (account / "token").write_text(cluster.token(JOB))
    (account / "ca.crt").write_bytes(cluster.authority.read_bytes())
    (job,) = of_kind(rendered({}), "Job")
    (spec,) = job["spec"]["template"]["spec"]["containers"]
    container = Container(
        image,
        directory / "containers",
        (),
        (Mount(str(account), "/var/run/secrets/kubernetes.io/serviceaccount", read_only=True),),
        {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(PORT)},
        spec["securityContext"]["runAsUser"],
    )
    argv = cluster.node.command(*container.command(*spec["args"]))
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.usefixtures("announcer")
def test_job_is_allowed_what_it_does_and_nothing_else(cluster: Cluster, image: Path, tmp_path: Path) -> None:
    """What it asks for is what its role names; and by the API's own word there is no more."""
    before = cluster.audited()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(announce, cluster, image, tmp_path)
        told = f"{SYSTEM}/configmaps/lazymesh"
        wait_until(lambda: cluster.get(told)["data"].get("uninstall") == "true", 30, "the word")
        report(cluster, ready=False)
        done = running.result()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Agents:   1 clean up when they are stopped\n"
    assert cluster.asked_by(JOB, before) == {("list", "pods", ""), ("patch", "configmaps", "lazymesh")}
    everybody = rules(cluster, "default")
    assert [rule for rule in rules(cluster, JOB) if rule not in everybody] == [
        {
            "verbs": ["patch"],
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": ["lazymesh"],
        },
        {"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]},
    ]
    assert rules(cluster, "lazymesh") == everybody, "the agent's own account may do nothing"


REFUSED = [
    ("GET", f"{SYSTEM}/secrets"),
    ("GET", f"{SYSTEM}/secrets/cilium-clustermesh"),
    ("GET", f"{SYSTEM}/configmaps"),
    ("GET", f"{SYSTEM}/configmaps/lazymesh"),
    ("DELETE", f"{SYSTEM}/configmaps/lazymesh"),
    ("PATCH", f"{SYSTEM}/configmaps/kube-root-ca.crt"),
    ("PATCH", "/api/v1/namespaces/default/configmaps/lazymesh"),
    ("GET", f"{SYSTEM}/pods/lazymesh-x"),
    ("DELETE", f"{SYSTEM}/pods/lazymesh-x"),
    ("GET", f"{SYSTEM}/pods/lazymesh-x/log"),
    ("POST", f"{SYSTEM}/pods"),
    ("GET", "/api/v1/namespaces/default/pods"),
    ("GET", "/api/v1/pods"),
    ("GET", "/api/v1/nodes"),
    ("GET", "/apis/apps/v1/namespaces/kube-system/daemonsets"),
    ("POST", f"{SYSTEM}/serviceaccounts/{JOB}/token"),
]


@pytest.mark.usefixtures("announcer")
def test_stolen_token_of_the_job_opens_nothing(cluster: Cluster) -> None:
    """Neither secrets, nor other namespaces, nor pods, nor more of the ConfigMap than its keys."""
    token = cluster.token(JOB)
    for method, path in REFUSED:
        status, answer = cluster.call(method, path, {} if method in {"POST", "PATCH"} else None, token)
        assert (status, answer["reason"]) == (403, "Forbidden"), (method, path)


@pytest.mark.parametrize("missing", [0, 1], ids=["patch", "list"])
def test_job_needs_all_that_it_is_allowed(
    cluster: Cluster, image: Path, tmp_path: Path, announcer: list[dict[str, Any]], missing: int
) -> None:
    """Without either rule it ends with one line that says what was refused."""
    (role,) = of_kind(announcer, "Role")
    (lost,) = [rule for number, rule in enumerate(role["rules"]) if number == missing]
    apply(cluster, [role | {"rules": [rule for rule in role["rules"] if rule != lost]}])
    done = announce(cluster, image, tmp_path)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert f"refused {'GET pods' if 'list' in lost['verbs'] else 'PATCH configmaps/lazymesh'}" in line
    assert line.endswith("403 Forbidden")
