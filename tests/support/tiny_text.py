"""A short text, and options with which the `train` command takes a second on it."""

TEXT = "It was the best of times, it was the worst of times.\n" * 30
QUICK_ARGUMENTS = ["--hidden", "8", "--batch", "4", "--window", "16", "--steps", "20", "--backend", "numpy"]
