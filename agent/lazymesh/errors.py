"""The errors that reach a person, each one line: what is wrong and what to do about it.

Adapters (datapath, kvstore, roles) translate at their edge and chain the cause; only the command line prints
the line and picks the exit code. The core raises none of these, except SettingsError for a policy file: what it
expects to go wrong arrives as events.
"""

from typing import Literal

KvstoreErrorKind = Literal["unavailable", "timeout", "permission", "certificate", "protocol", "exhausted"]
"""``exhausted``: the answer is larger than we take, or the server has too much to do."""


class LazymeshError(Exception):
    """Something lazymesh needs is missing, taken or broken; the message is one line for a person."""

    exit_code = 3


class SettingsError(LazymeshError):
    """What the user gave is wrong: an option, a file's content, a combination."""

    exit_code = 2


class DatapathError(LazymeshError):
    """The kernel side refused: load, attach, pin, or a map operation."""


class MapFullError(DatapathError):
    """A map has no room for one more element."""


class KvstoreError(LazymeshError):
    """Etcd refused or could not be reached; ``kind`` is the machine-readable half."""

    def __init__(self, message: str, kind: KvstoreErrorKind = "unavailable") -> None:
        super().__init__(message)
        self.kind: KvstoreErrorKind = kind
