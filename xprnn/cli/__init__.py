"""Command line `python -m xprnn`: train, sample, bench, convert, info, run."""
