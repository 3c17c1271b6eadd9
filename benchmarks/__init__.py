"""Benchmarks of xprnn against other libraries; run them as modules from the repository root."""
