"""Losses, optimisers, gradient clipping, truncated back-propagation through time, data-parallel gradients."""
