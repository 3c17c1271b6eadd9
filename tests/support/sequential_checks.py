"""Check that a Sequential cannot be constructed, shared by the tests of feature widths and of the time axis."""

from __future__ import annotations

import pytest

from xprnn import InputError, Sequential
from xprnn.layers.sequential import from_config


def assert_construction_raises(layers, message):
    """Assert that Sequential(**layers) raises this message, and that from_config raises too."""
    with pytest.raises(InputError) as caught:
        Sequential(**layers)
    assert str(caught.value).startswith("Sequential: ")
    assert message in str(caught.value)
    with pytest.raises(InputError, match="Sequential"):
        from_config({"type": "Sequential", "layers": {name: layer.config() for name, layer in layers.items()}})
