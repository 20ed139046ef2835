"""The Kubernetes API, and only that."""
