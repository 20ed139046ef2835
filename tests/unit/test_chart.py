"""The chart and the plain manifests: rendered objects are valid, every value is used, wrong values are refused."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from lazymesh.cli.agent import agent
from lazymesh.cli.check import check
from lazymesh.settings import parse_host_port
from tests.support.chart import (
    CHART,
    MONITORED,
    OTHERS,
    POLICY,
    ROOT,
    STANDALONE,
    UNPRIVILEGED,
    WRONG,
    defaults,
    helm,
    merged,
    rendered,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMAS = ROOT / "tests" / "support" / "monitoring.schema.json"
KUBERNETES = ("1.25", "1.31", "1.34")
"""The oldest that the chart supports, and two later ones."""

needs_helm = pytest.mark.needs("helm")


def leaves(values: dict[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    """Yield the paths of values; a known object counts as one value."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path not in known:
            yield from leaves(value, known, f"{path}.")
        else:
            yield path


def config(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the agent's options."""
    (found,) = [each for each in objects if each["kind"] == "ConfigMap"]
    options: dict[str, Any] = yaml.safe_load(found["data"]["config.yaml"])
    return options


def validate(objects: list[dict[str, Any]], versions: tuple[str, ...] = KUBERNETES) -> None:
    """Check objects against Kubernetes' published schemas, the operator's against ours; unknown fields are errors."""
    own = json.loads(SCHEMAS.read_text())
    for each in objects:
        if each["kind"] in own:
            import jsonschema  # noqa: PLC0415 (brought by kubernetes_validate)

            jsonschema.validate(each, own[each["kind"]])
            continue
        for version in versions:
            kubernetes_validate.validate(each, version, strict=True)


def test_every_value_is_in_this_test_and_in_the_schema() -> None:
    """A new value needs a line here, and a rule."""
    assert set(leaves(defaults(), set(OTHERS))) == set(OTHERS)

    def ruled(schema: dict[str, Any], path: str) -> bool:
        head, _, rest = path.partition(".")
        return head in schema["properties"] and (not rest or ruled(schema["properties"][head], rest))

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert all(ruled(schema, path) for path in OTHERS)


@needs_helm
@pytest.mark.parametrize("path", sorted(OTHERS))
def test_value_is_used(path: str) -> None:
    """Another value renders other, valid objects."""
    value, base = OTHERS[path]
    others = rendered(merged(base, path, value))
    assert others != rendered(base)
    # One version, and only what changed: this runs for every value.
    validate([each for each in others if each not in rendered(base)], KUBERNETES[1:2])


@needs_helm
def test_defaults_are_valid() -> None:
    """With everything that can be enabled."""
    kinds = {each["kind"] for each in rendered(MONITORED)}
    assert {"DaemonSet", "ConfigMap", "ServiceAccount", "PodMonitor", "PrometheusRule", "Job"} <= kinds
    validate(rendered(MONITORED))


@needs_helm
@pytest.mark.parametrize("values", WRONG, ids=json.dumps)
def test_wrong_value_is_refused(values: dict[str, Any]) -> None:
    """By the schema, before anything is rendered."""
    done = helm(values)
    assert done.returncode != 0
    assert "don't meet the specifications of the schema" in done.stderr


@needs_helm
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cluster": {"id": 0}}, "no cluster of a mesh is called default or has the id 0; give the"),
        ({"cluster": {"name": "default"}}, "no cluster of a mesh is called default or has the id 0;"),
        ({"policy": POLICY}, "policy: lazymesh enforces its own policy only where there is no Cilium"),
        ({"policy": POLICY, "datapath": "auto"}, "policy: lazymesh enforces its own policy only where"),
        (merged(MONITORED, "metrics.host", "127.0.0.1"), "Prometheus cannot scrape 127.0.0.1"),
        (merged(MONITORED, "metrics.host", "::1"), "Prometheus cannot scrape ::1"),
        ({"image": {"tag": "9", "digest": f"sha256:{'f' * 64}"}}, "give one of them"),
    ],
)
def test_values_that_cannot_work_together_are_refused(values: dict[str, Any], said: str) -> None:
    """With a message that says what to do; so are the defaults, which name a cluster that is in no mesh."""
    done = helm(values)
    assert done.returncode != 0
    assert said in done.stderr


@needs_helm
@pytest.mark.parametrize("period", ["90s", "1h30m", "7d", "1d2h3m4s"])
def test_periods_are_the_agents_own(period: str) -> None:
    """The chart accepts what `lazymesh agent --help` recommends."""
    assert config(rendered({"staleLimit": period}))["stale-limit"] == period


def numbers(schema: dict[str, Any], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the path of each number among the values, with the largest allowed: two million, unless it is less."""
    for key, value in values.items():
        rule = schema["properties"].get(key, {})
        if isinstance(value, dict) and "properties" in rule:
            yield from numbers(rule, value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", max(rule["enum"]) if "enum" in rule else rule.get("maximum", 2_000_000)


@needs_helm
def test_large_numbers_stay_numbers() -> None:
    """Helm reads numbers of a file as floats, and a template renders a million as 1e+06, which no option accepts."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    found = dict(numbers(schema, defaults()))
    assert {"signalRate", "ipcacheSize", "uninstall.timeout", "cluster.id"} <= set(found)
    values: dict[str, Any] = {}
    for path, largest in found.items():
        values = merged(values, path, largest)
    objects = rendered(values)
    assert "e+" not in json.dumps(objects)
    validate(objects, KUBERNETES[1:2])
    assert config(objects)["signal-rate"] == config(objects)["ipcache-size"] == 2_000_000


@needs_helm
@pytest.mark.parametrize("given", [{"interfaces": ["lxc+"]}, {"uplinks": ["eth0"]}])
def test_policy_that_could_judge_only_one_direction_is_refused(given: dict[str, Any]) -> None:
    """As the agent refuses it; in shadow mode it enforces nothing, so there it is accepted."""
    values = {"datapath": "standalone", "policy": POLICY} | given
    done = helm(values)
    assert done.returncode != 0
    assert "policy: needs interfaces and uplinks" in done.stderr
    rendered(values | {"shadow": True})


@needs_helm
def test_id_of_a_mesh_of_511_is_accepted() -> None:
    """And prefixes of every length, of both address families."""
    cidrs = ["b=10.2.0.0/16", "c=0.0.0.0/0", "d=10.2.0.1/32", "e=fd00::/64", "f=::/0", "g=fd00::1/128"]
    rendered({"cluster": {"id": 511, "maxConnected": 511}, "meshCIDRs": cidrs})


@needs_helm
@pytest.mark.parametrize(
    ("listening", "asked"),
    [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("127.0.0.1", "127.0.0.1"), ("fd00::1", "fd00::1")],
)
def test_probes_go_where_the_agent_listens(listening: str, asked: str) -> None:
    """The kubelet is in the same network, and cannot probe the address that means all addresses."""
    objects = rendered({"metrics": {"host": listening}})
    (pod,) = [each["spec"]["template"]["spec"] for each in objects if each["kind"] == "DaemonSet"]
    probes = [value for key, value in pod["containers"][0].items() if key.endswith("Probe")]
    assert [probe["httpGet"]["host"] for probe in probes] == [asked] * 3
    assert parse_host_port(config(objects)["metrics-address"]) == (listening, defaults()["metrics"]["port"])


@needs_helm
@pytest.mark.parametrize("version", KUBERNETES)
def test_pod_without_privileges_is_confined(version: str) -> None:
    """By the runtime's seccomp profile; not by its AppArmor profile, which forbids writing to bpffs."""
    objects = rendered(UNPRIVILEGED, f"{version}.0")
    (template,) = [each["spec"]["template"] for each in objects if each["kind"] == "DaemonSet"]
    security = template["spec"]["containers"][0]["securityContext"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["allowPrivilegeEscalation"] is False
    annotation = "container.apparmor.security.beta.kubernetes.io/agent"
    told = (security.get("appArmorProfile"), template["metadata"]["annotations"].get(annotation))
    # The field was added in 1.30.
    assert told == ((None, "unconfined") if version == "1.25" else ({"type": "Unconfined"}, None))
    validate(objects, (version,))


@needs_helm
def test_options_are_the_agents_own() -> None:
    """The ConfigMap has only options of the agent, and every one that a value exists for."""
    values = STANDALONE | {"uplinks": ["eth0"], "policy": POLICY, "meshCIDRs": ["b=10.2.0.0/16"]}
    options = config(rendered(merged(values, "cluster.region", "eu")))
    known = {param.opts[0].removeprefix("--") for param in agent.params}
    assert set(options) <= known
    # The pod sets the others itself, or has no use for them.
    assert known - set(options) == {"config", "cleanup", "socket", "program-cache"}


@needs_helm
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, {"datapath": "cilium", "remote_config": Path("/var/lib/lazymesh/kvstoremesh")}),
        ({"datapath": "auto", "clustermesh": {"kvstoremeshSecret": ""}}, {}),
        (
            STANDALONE
            | {
                "bpffs": "/run/bpf",
                "interfaces": ["veth+", "eth1"],
                "clustermesh": {"kvstoremeshSecret": ""},
            },
            {"datapath": "standalone", "bpffs": Path("/run/bpf"), "interface": ("veth+", "eth1")},
        ),
    ],
)
def test_commands_in_the_pod_know_what_the_agent_knows(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], told: dict[str, Any]
) -> None:
    """`kubectl exec POD -- lazymesh check` looks where the chart puts things; no variable is set without need."""
    objects = rendered(values)
    (pod,) = [each["spec"]["template"]["spec"] for each in objects if each["kind"] == "DaemonSet"]
    env = {each["name"]: each["value"] for each in pod["containers"][0].get("env", ())}
    assert len(env) == len(told)
    before = check.make_context("check", []).params
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert check.make_context("check", []).params == before | told
    options = config(objects)
    for name, value in told.items():
        ours = options[name.replace("_", "-")]
        assert ours == (list(value) if isinstance(value, tuple) else str(value))


@needs_helm
def test_secrets_are_mounted_as_ciliums_agent_mounts_them() -> None:
    """Under the names of cilium-formats 5, each optional, readable only by the owner."""
    (pod,) = [each["spec"]["template"]["spec"] for each in rendered({}) if each["kind"] == "DaemonSet"]
    (volume,) = [each["projected"] for each in pod["volumes"] if each["name"] == "clustermesh"]
    assert volume["defaultMode"] == 0o400
    secrets = [source["secret"] for source in volume["sources"]]
    assert all(secret["optional"] for secret in secrets)
    files = {
        secret["name"]: {item["key"]: item["path"] for item in secret.get("items", ())} for secret in secrets
    }
    assert files == {"cilium-clustermesh": {}} | {
        f"clustermesh-apiserver-{kind}-cert": {
            "tls.key": f"{name}-etcd-client.key",
            "tls.crt": f"{name}-etcd-client.crt",
            "ca.crt": f"{name}-etcd-client-ca.crt",
        }
        for kind, name in (("remote", "common"), ("local", "local"))
    }
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "clustermesh"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/var/lib/cilium/clustermesh", True)


@needs_helm
@pytest.mark.parametrize(("on_miss", "needed"), [("hold", True), ("pass", False), ("drop", False)])
def test_tun_device_is_mounted_where_packets_are_held(on_miss: str, needed: bool) -> None:
    """On a node without the device, a pod that mounts it does not start."""
    objects = rendered({"onMiss": on_miss})
    (pod,) = [each["spec"]["template"]["spec"] for each in objects if each["kind"] == "DaemonSet"]
    names = {each["name"] for each in pod["volumes"]}
    assert ("tun" in names) == needed
    assert names == {each["name"] for each in pod["containers"][0]["volumeMounts"]}


@needs_helm
def test_image_is_named_by_its_digest_if_one_is_given() -> None:
    """Both the agent's and the Job's."""
    digest = f"sha256:{'0123456789abcdef' * 4}"
    objects = rendered({"image": {"repository": "x/lazymesh", "digest": digest}})
    pods = [each["spec"]["template"]["spec"] for each in objects if each["kind"] in {"DaemonSet", "Job"}]
    assert [pod["containers"][0]["image"] for pod in pods] == [f"x/lazymesh@{digest}"] * 2


@needs_helm
def test_service_account_may_do_nothing() -> None:
    """The agent's has no token and no role; only that of the Job that announces the uninstallation has."""
    objects = rendered({})
    (account,) = [
        each
        for each in objects
        if each["kind"] == "ServiceAccount" and each["metadata"]["name"] == "lazymesh"
    ]
    assert account["automountServiceAccountToken"] is False
    (binding,) = [each for each in objects if each["kind"] == "RoleBinding"]
    assert [subject["name"] for subject in binding["subjects"]] == ["lazymesh-uninstall"]
    assert not [each for each in objects if each["kind"].startswith("Cluster")]


HELM_WAITS_S = 300
"""The default of `helm uninstall --timeout`."""


@needs_helm
def test_job_runs_on_a_live_node_and_ends_before_helm_gives_up() -> None:
    """Without tolerations it is not placed on a dead node; and a Job that cannot start ends as well."""
    (job,) = [each["spec"] for each in rendered({}) if each["kind"] == "Job"]
    assert defaults()["tolerations"], "the agents run on every node"
    pod = job["template"]["spec"]
    assert "tolerations" not in pod
    assert pod["containers"][0]["resources"]["requests"].keys() == {"cpu", "memory"}
    assert defaults()["uninstall"]["timeout"] + 30 <= job["activeDeadlineSeconds"] < HELM_WAITS_S


@needs_helm
def test_plain_manifests_are_the_charts(tmp_path: Path) -> None:
    """scripts/manifests has been run since the chart changed."""
    subprocess.run([ROOT / "scripts" / "manifests", tmp_path], check=True)
    for path in tmp_path.iterdir():
        assert path.read_text() == (ROOT / "deploy" / "kubernetes" / path.name).read_text(), path.name


def test_plain_manifests_are_valid_and_complete() -> None:
    """Also where there is no Helm to generate them again."""
    directory = ROOT / "deploy" / "kubernetes"
    (kustomization,) = yaml.safe_load_all((directory / "kustomization.yaml").read_text())
    files = {path.name for path in directory.iterdir()} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    validate([each for name in files for each in yaml.safe_load_all((directory / name).read_text())])


def test_every_alert_is_described() -> None:
    """By a sentence, and a section in docs/troubleshooting.md."""
    alerts = yaml.safe_load((CHART / "alerts.yaml").read_text())["alerts"]
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert alerts
    for alert in alerts:
        assert alert["description"]
        assert f"### {alert['name']}\n" in text, alert["name"]


def test_alerts_keep_labels_that_they_do_not_know() -> None:
    """In a fleet, clusters may have nodes of the same name; and no text names a label that was aggregated away."""
    for alert in yaml.safe_load((CHART / "alerts.yaml").read_text())["alerts"]:
        assert not re.search(r"\b(by|on|ignoring) ?\(", alert["expr"]), alert["name"]
        for call in re.findall(r"\b(?:sum|count|max|min|avg)\b ?(\w*)", alert["expr"]):
            assert call == "without", alert["name"]
        dropped = re.findall(r"without \(([^)]*)\)", alert["expr"])
        gone = {label.strip() for labels in dropped for label in labels.split(",")}
        assert gone.isdisjoint(re.findall(r"\$labels\.(\w+)", alert["summary"])), alert["name"]


@needs_helm
@pytest.mark.parametrize(("value", "kind"), [("podMonitor", "PodMonitor"), ("rules", "PrometheusRule")])
def test_object_for_the_operator_has_the_labels_it_selects_by(value: str, kind: str) -> None:
    """And no other object has them."""
    objects = rendered(merged(MONITORED, f"metrics.{value}.labels", {"release": "prometheus"}))
    assert [each["kind"] for each in objects if "release" in each["metadata"]["labels"]] == [kind]


@needs_helm
@pytest.mark.parametrize(
    ("values", "label", "name"),
    [
        ({}, "lazymesh", "lazymesh"),
        ({"nameOverride": "edge"}, "edge", "lazymesh-edge"),
        ({"fullnameOverride": "edge"}, "lazymesh", "edge"),
        ({"fullnameOverride": "x" * 63}, "lazymesh", "x" * 52),
    ],
)
def test_names_follow_the_overrides(values: dict[str, Any], label: str, name: str) -> None:
    """Every object's, and the daemonset that an alert asks for; the pods are still found by their labels."""
    objects = rendered(values | MONITORED)
    assert {each["metadata"]["labels"]["app.kubernetes.io/name"] for each in objects} == {label}
    names = {each["metadata"]["name"] for each in objects}
    assert names == {name, f"{name}-dashboard", f"{name}-uninstall"}
    assert max(map(len, names)) <= 63
    by_kind = {each["kind"]: each["spec"] for each in objects if "spec" in each}
    wanted = by_kind["DaemonSet"]["selector"]["matchLabels"].items()
    assert wanted <= by_kind["DaemonSet"]["template"]["metadata"]["labels"].items()
    assert by_kind["PodMonitor"]["selector"]["matchLabels"].items() == wanted
    assert f'{{daemonset="{name}"}}' in by_kind["PrometheusRule"]["groups"][0]["rules"][0]["expr"]


@needs_helm
def test_extra_arguments_and_variables_come_last() -> None:
    """Where they take precedence; the pod's own stay."""
    extra = {
        "extraArgs": ["--log-level", "debug"],
        "extraEnv": [{"name": "LAZYMESH_DATAPATH", "value": "auto"}],
    }
    before, after = (
        next(
            each["spec"]["template"]["spec"]["containers"][0]
            for each in objects
            if each["kind"] == "DaemonSet"
        )
        for objects in (rendered({}), rendered(extra))
    )
    assert after["args"] == [*before["args"], *extra["extraArgs"]]
    assert after["env"] == [*before["env"], *extra["extraEnv"]]


@needs_helm
@pytest.mark.parametrize("milliseconds", [250, 100.5])
def test_slow_is_what_is_longer_than_packets_are_held(milliseconds: float) -> None:
    """Both the threshold and the text have the value."""
    (rules,) = [
        each
        for each in rendered({"holdTimeout": milliseconds} | MONITORED)
        if each["kind"] == "PrometheusRule"
    ]
    (slow,) = [each for each in rules["spec"]["groups"][0]["rules"] if each["alert"] == "LazymeshSlow"]
    assert slow["expr"].endswith(f" > {milliseconds} / 1000")
    assert f"holdTimeout ({milliseconds} ms)" in slow["annotations"]["summary"]


def test_what_is_wrong_on_many_nodes_is_one_alert() -> None:
    """A store that is down, for example: neither node nor pod is left in what is counted."""
    alerts = {each["name"]: each for each in yaml.safe_load((CHART / "alerts.yaml").read_text())["alerts"]}
    for name in ("LazymeshClusterNotReady", "LazymeshOwnerNotReady", "LazymeshNoClusters", "LazymeshProblem"):
        assert alerts[name]["expr"].startswith("count without (node, instance")
        assert "{{ $value }} nodes" in alerts[name]["summary"]
