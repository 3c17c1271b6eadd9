"""A missing Keras file is reported as missing, not as damaged."""

from __future__ import annotations

import pytest

import xprnn


@pytest.mark.regression
@pytest.mark.needs("h5py")
def test_missing_file_is_not_reported_as_damaged():
    with pytest.raises(
        xprnn.InputError, match=r"^from_keras nope.keras: cannot be read \(No such file or directory\)$"
    ):
        xprnn.from_keras("nope.keras")
