"""etcd and only etcd, over a gRPC client that is mostly our own.

``config`` reads Cilium's client files. ``client`` is the client, built on a ``supervisor``, which keeps one
``connection`` at a time, and a ``hub``, which keeps all watches on one stream. ``follower`` mirrors a prefix
with it, ``lease`` keeps written keys alive. ``model`` has the values and protocols that they share. A connection
runs over a ``channel``: ``native``, whose protocol is in ``wire``, or ``grpcio``, the only importer of grpc.
"""
