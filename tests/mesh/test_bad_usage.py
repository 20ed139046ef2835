"""Whatever is wrong with the call or the node: one line that says what to do, and exit code 2 or 3."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import Authority, EtcdServer, EtcdSettings, cilium_roles, free_port
from tests.support.lab import METRICS_PORT, POLICY, Lab
from tests.support.node import filters, launched, options, pins, status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab in which no agent ever comes up."""
    with Lab(pods=1) as built:
        yield built


@pytest.fixture(autouse=True)
def nothing_is_left_behind(lab: Lab) -> Iterator[None]:
    """A start that fails leaves no pin, not even an empty directory for them."""
    yield
    assert not (lab.bpffs / "lazymesh").exists()


def lazymesh(lab: Lab, *argv: str, through: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the program on node a, behind another command if there is one."""
    words = lab.node_a.command(*through, sys.executable, "-m", "lazymesh", *argv)
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def last_word(words: str) -> str:
    """Return the one line that says why; an agent that got as far as that has logged before it."""
    *logged, line = words.splitlines()
    assert not [each for each in logged if each.startswith("lazymesh") or "Traceback" in each]
    return line


def refused(lab: Lab, code: int, *argv: str, through: tuple[str, ...] = ()) -> str:
    """Run it and expect this exit code and one line, which is returned."""
    done = lazymesh(lab, *argv, through=through)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    line = last_word(done.stderr)
    assert line.startswith("lazymesh")
    return line


def agent_refused(lab: Lab, code: int, *more: str, **changes: str | None) -> str:
    """Start an agent, expect it to refuse, and to leave nothing attached."""
    line = refused(lab, code, "agent", *options(lab, **changes), *more)
    assert filters(lab.node_a) == []
    return line


def file(lab: Lab, name: str, text: str) -> str:
    """Write a file for a test and return its path."""
    path = lab.directory / name
    path.write_text(text)
    return str(path)


def directory(lab: Lab, name: str, **files: str) -> str:
    """Make a directory of files and return its path."""
    path = lab.directory / name
    path.mkdir()
    for file_name, text in files.items():
        (path / file_name).write_text(text)
    return str(path)


def as_nobody(lab: Lab) -> tuple[str, ...]:
    """Return the words that run a command as nobody, or skip where nobody cannot even read the program."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv here")
    words = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if lazymesh(lab, "--version", through=words).returncode:
        pytest.skip("nobody cannot read the program")
    return words


def test_agent_needs_root(lab: Lab) -> None:
    """Said before anything else is tried."""
    line = refused(lab, 3, "agent", *options(lab), through=as_nobody(lab))
    assert "needs root" in line


@pytest.mark.parametrize("command", [["ipcache", "list"], ["ipcache", "get", "10.2.0.5"]])
def test_map_cannot_be_read_without_root(lab: Lab, command: list[str]) -> None:
    """A line, not a traceback, also where the directory may not even be searched."""
    private = lab.directory / "private"
    private.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    line = refused(lab, 3, *command, "--bpffs", str(private / "bpf"), through=as_nobody(lab))
    assert "Permission denied: that needs root" in line


@pytest.fixture
def for_root_alone(lab: Lab) -> Iterator[Path]:
    """An agent's socket and a BPF file system in a place that others can look into, but not at these two."""
    path = lab.directory / "agent-of-root.sock"
    bpffs = lab.directory / "bpf-of-root"
    bpffs.mkdir(mode=stat.S_IRWXU)
    mode = lab.directory.stat().st_mode
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen()
        lab.directory.chmod(0o755)
        yield path
    lab.directory.chmod(stat.S_IMODE(mode))
    path.unlink()
    bpffs.rmdir()


@pytest.mark.parametrize(
    "command",
    [["status"], ["misses"], ["audit"], ["config", "on-miss", "pass"], ["ipcache", "list"]],
    ids=" ".join,
)
def test_nobody_but_root_is_answered(lab: Lab, for_root_alone: Path, command: list[str]) -> None:
    """That is no wrong usage of an option that was not given."""
    where = [f"LAZYMESH_SOCKET={for_root_alone}", f"LAZYMESH_BPFFS={for_root_alone.parent}/bpf-of-root"]
    assert "needs root" in refused(lab, 3, *command, through=("env", *where, *as_nobody(lab)))


@pytest.mark.needs("tcx")
def test_check_without_root_does_not_say_what_it_cannot_know(lab: Lab) -> None:
    """A question that is refused has no answer."""
    done = lazymesh(lab, "check", "--clustermesh-config", str(lab.directory), through=as_nobody(lab))
    assert done.returncode == 3
    (hook,) = [line for line in done.stdout.splitlines() if " hook " in line]
    assert hook.startswith("FAIL")
    assert "as root" in hook


def test_directory_that_is_no_bpffs(lab: Lab) -> None:
    """It says how to mount one."""
    line = agent_refused(lab, 3, bpffs=directory(lab, "plain"))
    assert "mount -t bpf" in line


def test_no_kernel_headers(lab: Lab) -> None:
    """It names the package; another kernel's headers will do."""
    words = [sys.executable, "-m", "lazymesh", "agent", *options(lab, program_cache="off")]
    hide = 'mount -t tmpfs none /lib/modules && exec "$@"'
    inside = lab.node_a.command("unshare", "--mount", "sh", "-c", hide, "sh", *words)
    env = os.environ | {"XDG_CACHE_HOME": str(lab.no_config)}
    done = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == 3, done.stderr
    line = last_word(done.stderr)
    assert "install linux-headers" in line


@pytest.mark.parametrize("option", ["interface", "uplink"])
def test_unknown_interface(lab: Lab, option: str) -> None:
    """A name without a wildcard must exist."""
    line = agent_refused(lab, 3, **{option: "nosuch0"})
    assert "no interface nosuch0" in line
    assert "ip link" in line


def test_interface_that_is_no_ethernet(lab: Lab) -> None:
    """Attaching there would read garbage."""
    lab.node_a.ip(["tuntap add dev tun7 mode tun"])
    done = lazymesh(lab, "agent", *options(lab, uplink="tun7"))
    assert done.returncode == 3
    line = done.stderr.splitlines()[-1]
    assert "tun7" in line
    assert "Ethernet" in line
    assert (filters(lab.node_a), pins(lab)) == ([], []), "a first start that fails leaves nothing behind"
    lab.node_a.ip(["link del tun7"])


def test_nothing_to_attach_to(lab: Lab) -> None:
    """Neither pods' interfaces nor an uplink were named."""
    assert "--interface" in agent_refused(lab, 2, interface=None, uplink=None)


@pytest.mark.parametrize("option", ["interface", "uplink"])
def test_policy_that_could_judge_one_direction_only(lab: Lab, option: str) -> None:
    """The other's rules would count for nothing, and answers would be denied that nobody saw asked for."""
    assert f"--policy needs --{option} (for example" in agent_refused(lab, 2, **{option: None})


def test_clustermesh_directory_that_is_not_there(lab: Lab) -> None:
    """It says which option names another."""
    line = agent_refused(lab, 2, clustermesh_config=str(lab.directory / "nowhere"))
    assert "--clustermesh-config" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("endpoints: [", "not YAML"),
        ("endpoints: nowhere\n", "no endpoints"),
        ("endpoints: [ftp://x:1]\n", "not of the form"),
        ("endpoints: ['https://x:1']\ncert-file: /x\n", "add key-file"),
        ("- endpoints:\n", "not a mapping"),
    ],
)
def test_malformed_clustermesh_file(lab: Lab, text: str, words: str) -> None:
    """File and reason are named; an agent that starts is stricter than one that runs."""
    where = directory(lab, f"bad{hash(text)}", b=text)
    line = agent_refused(lab, 2, clustermesh_config=where)
    assert words in line
    assert f"{where}/b" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no policy found"),
        ("kind: [", "not YAML"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n", "only cilium.io/v2"),
        (POLICY.replace("toEndpoints", "toFQDNs"), "'toFQDNs' is not supported"),
    ],
)
def test_malformed_policy(lab: Lab, text: str, words: str) -> None:
    """File, line and reason; nothing is ignored."""
    path = file(lab, "bad-policy.yaml", text)
    line = agent_refused(lab, 2, policy=path)
    assert f"{path}:" in line
    assert words in line


def test_policy_that_cannot_be_read(lab: Lab) -> None:
    """The file is named."""
    assert "nowhere.yaml" in agent_refused(lab, 2, policy=str(lab.directory / "nowhere.yaml"))


def test_map_of_an_unknown_layout(lab: Lab) -> None:
    """Another version's pins are not reused, and not removed."""
    home = lab.bpffs / "lazymesh"
    home.mkdir()
    pin = home / "lm_ipcache"
    make = [
        "bpftool",
        "map",
        "create",
        pin,
        "type",
        "hash",
        "key",
        "4",
        "value",
        "4",
        "entries",
        "1",
        "name",
        "x",
    ]
    subprocess.run(make, check=True)
    try:
        line = agent_refused(lab, 3)
        assert "another layout" in line
        assert f"remove {home}" in line
        assert "is not an ipcache of a known layout" in refused(
            lab, 3, "ipcache", "list", "--bpffs", str(lab.bpffs)
        )
        done = lazymesh(lab, "check", "--bpffs", str(lab.bpffs), "--clustermesh-config", str(lab.config))
        assert done.returncode == 3
        assert "FAIL  map layout" in done.stdout
        assert pin.exists()
    finally:
        pin.unlink()
        home.rmdir()


def test_taken_metrics_port_and_taken_socket(lab: Lab) -> None:
    """Both name the option that helps; whoever has them is not disturbed."""
    with lab.node_a.call(socket.create_server, ("127.0.0.1", METRICS_PORT)):
        port = agent_refused(lab, 3)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(lab.socket))
        other.listen()
        sock = agent_refused(lab, 3)
        assert lab.socket.is_socket()
        lab.socket.unlink()
    assert not (lab.bpffs / "lazymesh").exists()
    assert f"127.0.0.1:{METRICS_PORT}" in port
    assert "--metrics-address" in port
    assert "another agent listens" in sock
    assert "--socket" in sock


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster_id": "256"}, "--cluster-id 256"),
        ({"cluster_id": "-1"}, "--cluster-id -1"),
        ({"cluster_id": "one"}, "--cluster-id"),
        ({"cluster_id": None, "cluster_name": None}, "--cluster-name and --cluster-id"),
        ({"cluster_id": None}, "--cluster-name and --cluster-id"),
        ({"cluster_name": None}, "--cluster-name and --cluster-id"),
        ({"cluster_name": "Not_A_Name"}, "--cluster-name"),
        ({"cluster_name": "x" * 33}, "--cluster-name"),
        ({"metrics_address": "9968x"}, "--metrics-address 9968x"),
        ({"metrics_address": "127.0.0.1:70000"}, "--metrics-address"),
        ({"datapath": "magic"}, "--datapath"),
        ({"mesh_cidr": "10.2.0.0/16"}, "CLUSTER=CIDR"),
        ({"mesh_cidr": "b=10.2.0.1/16"}, "host bits"),
        ({"on_miss": "pray"}, "--on-miss"),
        ({"signal_rate": "-5"}, "--signal-rate"),
        ({"nonsense": "1"}, "--nonsense"),
    ],
)
def test_wrong_option(lab: Lab, changes: dict[str, str], words: str) -> None:
    """The option is named, and what it takes."""
    assert words in agent_refused(lab, 2, **changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("interfaces: [lxc+]\n", "no option is called 'interfaces'"),
        ("interface: [", "not YAML"),
        ("- interface\n", "expected `option: value` lines"),
        ("config: x.yaml\n", "no option is called 'config'"),
    ],
)
def test_wrong_config_file(lab: Lab, text: str, words: str) -> None:
    """Misspelt options are not ignored."""
    path = file(lab, "agent.yaml", text)
    line = refused(lab, 2, "agent", "--config", path)
    assert words in line
    assert path in line


def test_missing_config_file(lab: Lab) -> None:
    """The file is named."""
    assert "nowhere.yaml" in refused(lab, 2, "agent", "--config", "/nowhere.yaml")


def test_nobody_answers(lab: Lab) -> None:
    """Commands that ask the agent, or read its map, say that there is none."""
    for command in ("status", "misses"):
        line = refused(lab, 3, command, "--socket", str(lab.directory / "no.sock"))
        assert "no agent answers" in line
    long = str(lab.directory / ("x" * 120))
    assert "no agent answers" in refused(lab, 3, "status", "--socket", long)
    for words in (["list"], ["get", "10.2.0.5"], ["watch"]):
        assert "start `lazymesh agent` first" in refused(lab, 3, "ipcache", *words, "--bpffs", str(lab.bpffs))


def test_unknown_command_and_bad_address(lab: Lab) -> None:
    """Usage errors exit 2."""
    assert "No such command" in refused(lab, 2, "frobnicate")
    assert "Missing argument" in refused(lab, 2, "ipcache", "get")


@pytest.fixture(scope="module")
def secured(lab: Lab) -> Iterator[tuple[EtcdServer, Authority, Path]]:
    """An etcd on node a that demands certificates, with Cilium's users; its authority; an empty directory."""
    where = lab.directory / "tls"
    authority = Authority(where / "ca")
    settings = EtcdSettings(command_prefix=tuple(lab.node_a.command()), tls=authority)
    with EtcdServer(settings, port=free_port()) as server:
        server.put("cilium/cluster-config/b", '{"id":2,"capabilities":{"maxConnectedClusters":255}}')
        server.put("cilium/state/identities/v1/id/131073", "k8s:app=server;")
        server.enable_auth(cilium_roles("b"))
        yield server, authority, where


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("good", "readable"),
        ("other authority", "certificate"),
        ("expired", "expired"),
        ("other user", "permission"),
        ("missing file", "cannot read"),
        ("garbage", "does not contain a certificate in pem format"),
    ],
)
def test_wrong_certificate_is_told_by_check_and_status(
    lab: Lab, secured: tuple[EtcdServer, Authority, Path], kind: str, words: str
) -> None:
    """Check says which file, status says which cluster; the agent itself comes up all the same."""
    server, authority, where = secured
    home = where / kind.replace(" ", "-")
    home.mkdir()
    issuer = Authority(home / "ca", "another") if kind == "other authority" else authority
    pair = issuer.issue("stranger" if kind == "other user" else "remote", expired=kind == "expired")
    cert = home / "nowhere.crt" if kind == "missing file" else pair.cert
    if kind == "garbage":
        cert = home / "garbage.crt"
        cert.write_text("no certificate\n")
    files = f"trusted-ca-file: {authority.cert}\ncert-file: {cert}\nkey-file: {pair.key}\n"
    config = directory(lab, f"tls-{home.name}", b=f"endpoints: ['{server.url}']\n{files}")
    check = lab.cli("check", "--clustermesh-config", config, check=False)
    told = [
        line for line in check.stdout.splitlines() if " b " in f"{line} " and line.startswith(("FAIL", "ok"))
    ]
    assert words in " ".join(told).lower(), check.stdout
    assert check.returncode == (0 if kind == "good" else 3)
    with launched(lab, *options(lab, clustermesh_config=config), "--cleanup") as agent:
        agent.wait_ready()
        wrong = " ".join(status(lab)["wrong"]).lower()
        if kind == "good":
            assert "cluster b is" not in wrong or "not listed yet" in wrong
        else:
            assert "cluster b" in wrong
            assert any(word in wrong for word in (words, "certificate", "read", "tls files")), wrong
