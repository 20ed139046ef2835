"""etcd and only etcd: the only importer of grpc."""
