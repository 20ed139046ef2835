"""The errors that reach a person, each one line: what is wrong and what to do about it.

Adapters (datapath, kvstore, roles) translate at their edge and chain the cause; the command line alone prints
the line and picks the exit code. The core raises none of these: what it expects to go wrong are events.
"""

from typing import Literal

KvstoreErrorKind = Literal["unavailable", "timeout", "permission", "certificate", "protocol", "exhausted"]
"""``exhausted``: the answer is larger than we take, or the server has too much to do."""


class LazymeshError(Exception):
    """Something lazymesh needs is missing, taken or broken; the message is one line for a person."""

    exit_code = 3


class SettingsError(LazymeshError):
    """The words given by the user are wrong: an option, a file's content, a combination."""

    exit_code = 2


class DatapathError(LazymeshError):
    """The kernel half refused: load, attach, pin, or a map operation."""


class MapFullError(DatapathError):
    """A map has no room for one more element."""


class KvstoreError(LazymeshError):
    """Etcd refused or could not be reached; ``kind`` is the machine-readable half."""

    def __init__(self, message: str, kind: KvstoreErrorKind = "unavailable") -> None:
        super().__init__(message)
        self.kind: KvstoreErrorKind = kind
