"""click commands, one file per noun: they print and exit, they decide nothing."""
