"""From installation to the last trace, as docs/ has people type it, against a real Kubernetes API.

API, controllers, Helm and kubectl are real, and so are the image, crun and the agent; the kubelet is the tests' own.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.cilium import Cilium
from tests.support.container import filtered
from tests.support.docs import ROOT, blocks, shell
from tests.support.etcd import wait_until
from tests.support.kubelet import Kubelet
from tests.support.kubernetes import Cluster
from tests.support.lab import NODE_A, Lab, remote_address
from tests.support.node import connect, filters

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.needs("Kubernetes", "helm", "clang"), pytest.mark.patience(300)]

SYSTEM = "/api/v1/namespaces/kube-system"


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A node with a Cilium on it."""
    with Lab(pods=1) as built, Cilium(built):
        yield built


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """The cluster to which the lab's node belongs, with what Cilium's chart has made for the mesh."""
    with Cluster(lab.node_a, lab.directory / "kubernetes", NODE_A[0]) as running:
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cilium-clustermesh"}}
        files = {path.name: path.read_text() for path in lab.config.iterdir()}
        running.create(f"{SYSTEM}/secrets", secret | {"stringData": files})
        yield running


@pytest.fixture
def kubelet(lab: Lab, cluster: Cluster, image: Path) -> Iterator[Kubelet]:
    """What runs pods on it."""
    tun = Path("/dev/net/tun")
    paths = {"/sys/fs/bpf": lab.bpffs, str(tun): tun, "/run/lazymesh": lab.directory / "run"}
    with Kubelet(cluster, image, lab.directory / "kubelet", paths) as running:
        yield running


class Story:
    """What is done from outside, and what there is to see."""

    def __init__(self, lab: Lab, cluster: Cluster, kubelet: Kubelet) -> None:
        self.lab, self.cluster, self.kubelet = lab, cluster, kubelet
        self._peers = iter(range(100))
        self.seen: set[str] = set()

    def type(self, text: str) -> None:
        """Run a block as it stands in docs/."""
        shell(text, self.cluster.node.command(), self.cluster.environment)
        self.kubelet.check()

    def blocks(self, mark: str, page: str) -> list[str]:
        """Return the blocks of a page."""
        found = [text for name, text in blocks(mark) if name == page]
        assert found, page
        return found

    def rolled_out(self) -> dict[str, Any]:
        """Wait for the one pod of the DaemonSet as it is now; return it, which is not one that was seen before."""
        self.type("kubectl -n kube-system rollout status daemonset/lazymesh --timeout=90s")
        (pod,) = self.pods("agent")
        assert pod["metadata"]["uid"] not in self.seen
        self.seen.add(pod["metadata"]["uid"])
        return pod

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Return the pods that there are of an agent or an uninstallation."""
        query = f"labelSelector=app.kubernetes.io/component%3D{component}"
        return list(self.cluster.get(f"{SYSTEM}/pods?{query}")["items"])

    def connects(self, *, known: str | None = None) -> str | None:
        """Connect to a pod that nobody has talked to yet, or to a known one; None if it was not reached."""
        peer = known or remote_address(next(self._peers))
        self.lab.publish(peer, space="ondemand")
        return peer if connect(self.lab.pods[0].namespace, peer) is not None else None

    def has_ended(self) -> None:
        """Wait until nothing is left."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self.leftovers() == [], 30)
        assert self.leftovers() == []

    def leftovers(self) -> list[str]:
        """Return what is left of lazymesh: on the node, in the API."""
        words = ("--all-namespaces", "--selector=app.kubernetes.io/name=lazymesh", "--output=name")
        kinds = "all,configmaps,serviceaccounts,roles,rolebindings"
        done = self.cluster.run("kubectl", "get", kinds, *words)
        assert done.returncode == 0, done.stderr
        pinned = [str(path) for path in self.lab.bpffs.glob("lazymesh")]
        return [*done.stdout.split(), *pinned, *filters(self.lab.node_a)]


@pytest.fixture
def story(lab: Lab, cluster: Cluster, kubelet: Kubelet) -> Story:
    """All of it, in a cluster that is ready for an installation."""
    told = Story(lab, cluster, kubelet)
    for text in told.blocks("run cluster", "install.md"):
        told.type(text)
    return told


def test_helm_installs_upgrades_and_uninstalls(story: Story) -> None:
    """The blocks of install.md, upgrade.md and uninstall.md in their order, and privileges taken away in between."""
    install, rollout, serious = story.blocks("run helm", "install.md")
    story.type(install)
    story.type(rollout)
    story.rolled_out()
    assert story.connects() is None, "in the shadow nothing is written"
    story.type(serious)
    story.rolled_out()
    known = story.connects()
    assert known is not None
    assert not filtered(story.lab.node_a)
    story.type(
        "helm upgrade lazymesh deploy/chart -n kube-system --reset-then-reuse-values --set privileged=false"
    )
    story.rolled_out()
    assert filtered(story.lab.node_a)
    assert story.connects(known=known)
    assert story.connects()
    (upgrade,) = story.blocks("run helm", "upgrade.md")
    story.type(upgrade)
    pod = story.rolled_out()
    assert pod["spec"]["containers"][0]["image"] == "REGISTRY/lazymesh:VERSION"
    assert story.connects(known=known)
    assert story.connects()
    (uninstall,) = story.blocks("run helm", "uninstall.md")
    story.type(uninstall)
    story.has_ended()
    assert story.connects() is None, "Cilium alone, as before"
    assert story.cluster.asked_by("lazymesh") == set()
    assert story.cluster.asked_by("lazymesh-uninstall") == {
        ("list", "pods", ""),
        ("patch", "configmaps", "lazymesh"),
    }


def test_release_stays_while_a_node_has_not_heard(story: Story) -> None:
    """The Job gives up before Helm does, and names the node; the word can be taken back; without it agents just end."""
    install, rollout, serious = story.blocks("run helm", "install.md")
    story.type(install)
    story.type(rollout)
    story.type(f"{serious.rstrip()} --set uninstall.timeout=1")
    story.rolled_out()
    story.kubelet.late = True
    done = story.cluster.run("helm", "uninstall", "lazymesh", "--namespace", "kube-system")
    assert done.returncode != 0
    assert "BackoffLimitExceeded" in done.stderr
    (pod,) = story.pods("uninstall")
    (line,) = story.kubelet.log(pod["metadata"]["name"]).splitlines()
    assert "it is not known that these nodes will be cleaned up: node-a;" in line
    story.kubelet.late = False
    story.type(
        "kubectl -n kube-system wait --for=condition=Ready=false pod -l app.kubernetes.io/component=agent"
    )
    assert story.connects(), "the agent works on"
    for text in story.blocks("run keep", "uninstall.md"):
        story.type(text)
    story.type("kubectl -n kube-system wait --for=condition=Ready pod -l app.kubernetes.io/component=agent")
    for text in story.blocks("run no hooks", "uninstall.md"):
        story.type(text)
    wait_until(lambda: story.pods("agent") == [], 30, "no agent")
    assert filters(story.lab.node_a), "as after any other stop"
    story.type(f"lazymesh uninstall --bpffs {story.lab.bpffs}")
    story.has_ended()


def test_kubectl_installs_and_uninstalls(story: Story, tmp_path: Path) -> None:
    """With the overlay of install.md; and by hand what Helm's Job does."""
    (overlay,) = re.findall(
        r"^```yaml kustomization\n((?:.*\n)*?)```$", (ROOT / "docs/install.md").read_text(), re.MULTILINE
    )
    here = os.path.relpath(ROOT / "deploy/kubernetes", tmp_path)
    (apply,) = story.blocks("run kubectl", "install.md")
    for text in (overlay, re.sub(r".*LAZYMESH_SHADOW.*\n", "", overlay)):
        (tmp_path / "kustomization.yaml").write_text(text.replace("deploy/kubernetes", here))
        story.type(apply.replace("-k .", f"-k {tmp_path}"))
        pod = story.rolled_out()
        assert pod["spec"]["containers"][0]["image"] == "REGISTRY/lazymesh:0.1.0"
        assert (story.connects() is None) == ("SHADOW" in text)
    (uninstall,) = story.blocks("run kubectl", "uninstall.md")
    story.type(uninstall.replace("-k .", f"-k {tmp_path}"))
    story.has_ended()
