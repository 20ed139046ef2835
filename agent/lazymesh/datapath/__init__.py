"""The kernel and only the kernel: the only importer of bcc and pyroute2."""
