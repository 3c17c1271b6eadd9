"""Losses, optimizers, gradient clipping, truncated back-propagation through time, data-parallel gradients."""
