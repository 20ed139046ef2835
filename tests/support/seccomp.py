"""The system calls that a container runtime allows by default, in the form of the OCI's runtime specification.

Podman, CRI-O and buildah share the profile of Debian's golang-github-containers-common; its entries hold for some
processors and capabilities only, and each runtime picks those of the container at hand, as is done here.
"""

from __future__ import annotations

import json
from pathlib import Path
from platform import machine
from typing import Any

PROFILE = Path("/usr/share/containers/seccomp.json")
_ARCHITECTURES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}


def default_profile(capabilities: tuple[str, ...]) -> dict[str, Any]:
    """Return ``linux.seccomp`` for a container with these capabilities, each without its ``CAP_``."""
    profile = json.loads(PROFILE.read_text(encoding="ascii"))
    go, here = _ARCHITECTURES[machine()]
    has = {"arches": {go}, "caps": {f"CAP_{name}" for name in capabilities}}
    (others,) = [each["subArchitectures"] for each in profile["archMap"] if each["architecture"] == here]
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [here, *others],
        "syscalls": [_rule(each) for each in profile["syscalls"] if _holds(each, has)],
    }


def _holds(entry: dict[str, Any], has: dict[str, set[str]]) -> bool:
    wanted, unwanted = entry["includes"], entry["excludes"]
    if wanted.keys() | unwanted.keys() > has.keys():
        raise ValueError(f"{PROFILE}: a condition that is not known here: {entry}")
    arches, caps = set(wanted.get("arches", ())), set(wanted.get("caps", ()))
    return (
        (not arches or bool(arches & has["arches"]))
        and caps <= has["caps"]
        and not any(set(unwanted.get(kind, ())) & has[kind] for kind in has)
    )


def _rule(entry: dict[str, Any]) -> dict[str, Any]:
    rule = {"names": entry["names"], "action": entry["action"]}
    if "errnoRet" in entry:
        rule["errnoRet"] = entry["errnoRet"]
    if entry["args"]:
        rule["args"] = entry["args"]
    return rule
