"""Models in files of every format: the commands `convert`, `info` and `run`, and what reads and writes for them."""
