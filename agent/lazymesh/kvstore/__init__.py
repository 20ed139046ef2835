"""etcd and only etcd: the only importer of grpc.

``config`` reads Cilium's client files; ``client`` is the client, over a ``supervisor`` that keeps one
``connection`` at a time and a ``hub`` that keeps all watches on one stream; ``follower`` and ``lease`` are
the two long stories that are told with it: mirroring a prefix, and keeping what was written alive. ``model``
has the values and protocols of them all.
"""

import os

# grpc's C core writes lines of its own to stderr, in the middle of a JSON log; what they say is in our errors.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
