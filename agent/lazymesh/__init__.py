"""lazymesh: demand paging for the Cilium ipcache. ARCHITECTURE.md describes the code."""

__version__ = "0.1.0"
