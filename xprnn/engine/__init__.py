"""Recurrent layers as stacks of scans, on parameters that the caller passes.

layer.py            protocols of layers, base classes that cache fast paths
arguments.py        checks of what the caller passes
state_layout.py     parameters and states of each layer and direction: from the caller's layout and back
stack.py            forward, backward and step of a recurrent layer: all layers, all directions, dropout
checkpointing.py    layers of one direction, run segment by segment in bounded memory
call_cache.py       plans of calls on plain NumPy arrays, cached by each layer
step_calls.py       steps of recurrent layers on plain NumPy arrays
fast_steps.py       steps of Linear, Embedding and Sequential on plain NumPy arrays
explain.py          which kernel a call will run on
"""
