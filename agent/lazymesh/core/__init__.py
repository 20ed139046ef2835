"""The pure core: state machines and decisions, without I/O, clock, threads or randomness of its own."""
