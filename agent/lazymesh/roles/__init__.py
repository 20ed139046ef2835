"""The imperative shells: one file per process role, and the parts they are made of."""
