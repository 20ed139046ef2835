"""The imperative shells: one file per process role, and the parts that the roles are made of."""
