"""The click commands, one file each: they print and exit, and decide nothing."""
