"""etcd and only etcd, over gRPC that is mostly our own.

``config`` reads Cilium's client files; ``client`` is the client, over a ``supervisor`` that keeps one
``connection`` at a time and a ``hub`` that keeps all watches on one stream; ``follower`` and ``lease`` are
the two long stories that are told with it: mirroring a prefix, and keeping what was written alive. ``model``
has the values and protocols of them all. Below a connection is a ``channel``: ``native``, whose protocol is in
``wire``, or ``grpcio``, the only importer of grpc.
"""
