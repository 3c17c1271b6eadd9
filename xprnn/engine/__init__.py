"""Stacks of recurrent layers: directions, dropout, checkpoints, state layout, argument checks, the call cache."""
