"""Gradients by torch's autograd for nested tuples of arrays; torch is imported only where it is used."""

from __future__ import annotations


def leaf(tree):
    """Return torch tensors with requires_grad for the arrays of nested tuples."""
    import torch

    if isinstance(tree, tuple):
        return tuple(leaf(a) for a in tree)
    return torch.tensor(tree, requires_grad=True)


def grads(tree):
    """Return the gradients of the leaves as NumPy arrays."""
    return tuple(grads(a) for a in tree) if isinstance(tree, tuple) else tree.grad.numpy()


def pairing(outputs, cotangents):
    """Return <outputs, cotangents>, a scalar whose gradients are those of the cotangents."""
    import torch

    if isinstance(outputs, tuple):
        return sum(pairing(a, b) for a, b in zip(outputs, cotangents, strict=True))
    return (outputs * torch.tensor(cotangents)).sum()
