"""Comparison of features: each answer comes from running a library."""
