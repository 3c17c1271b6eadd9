"""Benchmarks on the CPU: time, memory, installation."""
