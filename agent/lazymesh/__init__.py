"""lazymesh: demand paging for the Cilium ipcache. ARCHITECTURE.md draws the house."""

__version__ = "0.1.0"
