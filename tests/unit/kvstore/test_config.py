"""Cilium's etcd client files: what is taken from them, and what a person is told about a wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import SettingsError
from lazymesh.kvstore.config import Endpoint, load_config, parse_config

if TYPE_CHECKING:
    from pathlib import Path

CILIUM_FILE = """\
endpoints:
- https://clustermesh-apiserver.kube-system.svc:2379
trusted-ca-file: /var/lib/cilium/clustermesh/local-etcd-client-ca.crt
key-file: /var/lib/cilium/clustermesh/local-etcd-client.key
cert-file: /var/lib/cilium/clustermesh/local-etcd-client.crt
"""


def test_file_written_by_cilium_is_understood() -> None:
    """The file that a Helm installation mounts gives one TLS endpoint and three files."""
    config = parse_config(CILIUM_FILE, "b")
    assert [str(endpoint) for endpoint in config.endpoints] == [
        "https://clustermesh-apiserver.kube-system.svc:2379"
    ]
    assert config.tls
    assert config.ca_file == "/var/lib/cilium/clustermesh/local-etcd-client-ca.crt"
    assert (config.cert_file or "").endswith(".crt")
    assert (config.key_file or "").endswith(".key")


def test_host_aliases_give_addresses_to_dial_and_keep_the_name() -> None:
    """Each aliased address is an endpoint of its own; the host stays, for the server's certificate."""
    text = """\
endpoints: ["https://b.mesh.cilium.io:32379", "https://other:2379"]
cilium-host-aliases:
- hostname: b.mesh.cilium.io
  ips: [192.0.2.7, "2001:db8::7"]
"""
    endpoints = parse_config(text, "b").endpoints
    assert [endpoint.target for endpoint in endpoints] == [
        "ipv4:192.0.2.7:32379",
        "ipv6:[2001:db8::7]:32379",
        "dns:///other:2379",
    ]
    assert [endpoint.host for endpoint in endpoints[:2]] == ["b.mesh.cilium.io"] * 2


def test_ipv6_endpoint_is_dialled_as_literal_address() -> None:
    """Brackets of a URL are not part of the address."""
    endpoint = parse_config("endpoints: ['http://[fd00::1]:2379']", "b").endpoints[0]
    assert endpoint == Endpoint("http", "fd00::1", 2379)
    assert endpoint.target == "ipv6:[fd00::1]:2379"
    assert str(endpoint) == "http://[fd00::1]:2379"


def test_unknown_words_are_tolerated_and_a_numeric_password_is_text() -> None:
    """Newer Cilium may write more; YAML reads a password of digits as a number."""
    text = (
        "{endpoints: ['http://a:1'], username: u, password: 1234, dial-timeout: 5, cilium-host-aliases: null}"
    )
    config = parse_config(text, "b")
    assert (config.username, config.password) == ("u", "1234")
    assert "1234" not in repr(config)


@pytest.mark.parametrize(
    ("extra", "scheme"),
    [("", "http"), ("trusted-ca-file: ca.crt", "https")],
    ids=["in the clear", "with a CA"],
)
def test_endpoint_without_scheme_uses_tls_when_tls_files_are_named(extra: str, scheme: str) -> None:
    """That is what etcd's own client does with such an endpoint."""
    assert parse_config(f"endpoints: ['a:2379']\n{extra}", "b").endpoints[0].scheme == scheme


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("endpoints: [", "line 1", id="not YAML"),
        pytest.param("just words", "not a mapping", id="not a mapping"),
        pytest.param("trusted-ca-file: x", "no endpoints", id="no endpoints"),
        pytest.param("endpoints: []", "no endpoints", id="empty endpoints"),
        pytest.param("endpoints: ['http://a:1', 'https://b:1']", "mix http and https", id="mixed schemes"),
        pytest.param("endpoints: ['https://a']", "'https://a'", id="no port"),
        pytest.param("endpoints: ['https://a:x']", "malformed", id="bad port"),
        pytest.param("endpoints: ['https://a..b:1']", "malformed", id="no host name"),
        pytest.param("endpoints: ['ftp://a:1']", "https://HOST:PORT", id="other scheme"),
        pytest.param("{endpoints: ['https://a:1'], cert-file: c}", "add key-file", id="no key"),
        pytest.param("{endpoints: ['https://a:1'], key-file: k}", "add cert-file", id="no certificate"),
        pytest.param("{endpoints: ['https://a:1'], username: k}", "username and password", id="no password"),
        pytest.param("{endpoints: ['https://a:1'], cert-file: [c]}", "must be text", id="list for text"),
        pytest.param(
            "{endpoints: ['https://a:1'], cilium-host-aliases: [{hostname: a, ips: [x]}]}",
            "cilium-host-aliases",
            id="bad alias",
        ),
    ],
)
def test_wrong_file_is_told_in_one_line_with_its_name(text: str, words: str) -> None:
    """The line names the file and what is wrong in it."""
    with pytest.raises(SettingsError) as caught:
        parse_config(text, "/etc/mesh/b")
    line = str(caught.value)
    assert line.startswith("/etc/mesh/b: ")
    assert words in line
    assert "\n" not in line


def test_tls_files_that_are_not_where_they_are_named_are_taken_from_beside_the_configuration(
    tmp_path: Path,
) -> None:
    """Decided anew each time: they come and go, and where they are named goes first."""
    here, there = tmp_path / "secret", tmp_path / "clustermesh"
    here.mkdir()
    there.mkdir()
    named = [there / f"b.etcd-client{ending}" for ending in ("-ca.crt", ".crt", ".key")]
    ca, cert, key = named
    words = f"endpoints: ['https://b:1']\ntrusted-ca-file: {ca}\ncert-file: {cert}\nkey-file: {key}\n"
    config = parse_config(words, str(here / "b"))

    def at_hand() -> list[str | None]:
        found = config.with_files_at_hand()
        return [found.ca_file, found.cert_file, found.key_file]

    assert at_hand() == list(map(str, named)), "none of them anywhere: errors say what is named"
    beside = [here / path.name for path in named]
    for path in beside:
        path.touch()
    assert at_hand() == list(map(str, beside))
    ca.touch()
    assert at_hand() == list(map(str, [ca, *beside[1:]]))
    plain = parse_config("endpoints: ['http://b:1']", str(here / "b"))
    assert plain.with_files_at_hand() == plain


def test_file_is_loaded_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    """Absent and binary files are the user's to correct."""
    path = tmp_path / "b"
    with pytest.raises(SettingsError, match=r"b: cannot be read \(No such file"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load_config(path)
    path.write_text(CILIUM_FILE)
    assert load_config(path).source == str(path)


@pytest.mark.parametrize(
    "words",
    [
        "password: 0123",
        "password: yes",
        "password: 2001-99-99",
        "password: !!int ''",
        "password: 1:99",
        "password: nobody",
        "password: " + "1" * 5_000,
    ],
)
def test_a_password_is_the_text_that_it_is(words: str) -> None:
    """YAML's numbers, dates and truths are somebody else's idea."""
    text = f"endpoints: ['http://b:2379']\nusername: u\n{words}\n"
    expected = words.removeprefix("password: ").removeprefix("!!int ").strip("'")
    if expected:
        assert parse_config(text, "b").password == expected
    else:
        with pytest.raises(SettingsError, match="go together"):
            parse_config(text, "b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x: " + "[" * 3_000, "nested too deeply"),
        ("endpoints: ['http://b:2379']\ncilium-host-aliases: 5", "needs 'hostname'"),
        ("endpoints: ['http://b:2379']\ncilium-host-aliases: [x]", "needs 'hostname'"),
        ("a: &a [x, x]\nendpoints: [*a]", "no endpoints"),
        ("endpoints: [~]", "no endpoints"),
        ('endpoints: ["\\U00110000"]', "not YAML"),
        ('endpoints: ["\\UFFFFFFFF"]', "not YAML"),
        ("%YAML " + "1" * 5_000 + ".1\n--- {}", "not YAML"),
    ],
    ids=[
        "deep",
        "a number of aliases",
        "an alias that is a word",
        "a list of lists",
        "nothing",
        "a character that there is not",
        "a character beyond all numbers",
        "a version beyond all numbers",
    ],
)
def test_words_of_the_wrong_shape_are_refused_in_one_line(text: str, said: str) -> None:
    """A file that cannot be used must cost its cluster, never the agent."""
    with pytest.raises(SettingsError, match=said) as refused:
        parse_config(text, "b")
    assert len(str(refused.value).splitlines()) == 1
