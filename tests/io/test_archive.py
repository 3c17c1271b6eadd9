"""Archives: checksums detect every changed bit, and arrays of any dtype, layout and library are stored exactly."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import xprnn
from xprnn.arrays.namespace import InputError
from xprnn.io import archive
from xprnn.layers import model_file

SUFFIXES = (".safetensors", ".npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_flipped_bit_is_detected(tmp_path, suffix):
    layer = xprnn.RNN(2, 2)
    params = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    path = tmp_path / f"model{suffix}"
    xprnn.save(path, layer, params, {"vocabulary": "ab"})
    content, bits = path.read_bytes(), np.random.default_rng(1).integers(0, 8, 10_000)
    undetected = []
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ (1 << bits[i])]) + content[i + 1 :])
        try:
            loaded_layer, loaded = xprnn.load(path)
            equal = loaded_layer == layer and all(np.array_equal(loaded[k], params[k]) for k in params)
            # A zip directory has unused bytes (times, comments, versions), so that an npz file may load unchanged.
            if not equal or model_file.load_metadata(path) != {"vocabulary": "ab"} or suffix == ".safetensors":
                undetected.append(i)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert undetected == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_array_data_raises_in_load_state_and_read_arrays(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    xprnn.save_state(path, (np.full((2, 3), 7.0), np.ones(4)))
    content = path.read_bytes()
    start = content.index(np.full(6, 7.0).tobytes())
    path.write_bytes(content[: start + 3] + b"\1" + content[start + 4 :])
    for read in (xprnn.load_state, archive.read_arrays):
        with pytest.raises(InputError, match="damaged"):
            read(path)


def test_changed_dtype_is_detected(tmp_path):
    path = tmp_path / "state.safetensors"
    xprnn.save_state(path, np.ones(4, np.float32))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"I32"'))
    with pytest.raises(InputError, match=r"state\.0 does not match its checksum"):
        xprnn.load_state(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_of_any_byte_order_layout_and_rank_round_trip(tmp_path, suffix):
    path, x = tmp_path / f"state{suffix}", np.arange(6.0).reshape(2, 3)
    state = {
        "big_endian": x.astype(">f4"),
        "transposed": x.T,
        "empty": np.zeros((0, 3)),
        "scalar": np.array(5),
        "half": np.float16(x),
    }
    xprnn.save_state(path, state)
    loaded = xprnn.load_state(path)
    assert loaded.keys() == state.keys()
    for name, array in state.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("<")
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_of_mixed_dtypes_keep_their_dtypes(tmp_path, rng, suffix):
    model = xprnn.Sequential(rnn=xprnn.RNN(3, 4), head=xprnn.Linear(4, 2))
    params = model.init(rng, like=np.zeros(1))
    params = {k: a.astype(t) for (k, a), t in zip(params.items(), ("f8", "f4", "f2", ">f8", "f4", "f2"), strict=True)}
    xprnn.save(tmp_path / f"m{suffix}", model, params)
    _, loaded = xprnn.load(tmp_path / f"m{suffix}")
    for name, array in params.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(loaded[name], array)
    _, loaded = xprnn.load(tmp_path / f"m{suffix}", like=np.zeros(1, np.float32))
    assert {a.dtype.name for a in loaded.values()} == {"float32"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_of_mixed_array_libraries_are_saved(tmp_path, rng, suffix, xp):
    model = xprnn.Sequential(rnn=xprnn.RNN(3, 4), head=xprnn.Linear(4, 2))
    params = model.init(rng, like=np.zeros(1, np.float32))
    mixed = {k: xp.asarray(a) if k.startswith("head") else a for k, a in params.items()}
    with xp.allow_host_conversion():
        xprnn.save(tmp_path / f"m{suffix}", model, mixed)
    _, loaded = xprnn.load(tmp_path / f"m{suffix}")
    for name, array in params.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("name", ["complex64", pytest.param("bfloat16", marks=pytest.mark.needs("ml_dtypes"))])
def test_save_names_the_parameter_with_an_unsupported_dtype(tmp_path, rng, name):
    """Two dtypes that files do not store; bfloat16 is JAX's, from ml_dtypes."""
    layer = xprnn.RNN(3, 4)
    params = layer.init(rng, like=np.zeros(1))
    dtype = np.dtype(name) if name == "complex64" else importlib.import_module("ml_dtypes").bfloat16
    params["bias_hh_l0"] = params["bias_hh_l0"].astype(dtype)
    with pytest.raises(InputError, match=f"bias_hh_l0 has dtype {name}, a file holds float16, float32, float64"):
        xprnn.save(tmp_path / "m.npz", layer, params)


@pytest.mark.parametrize(
    ("suffix", "save_hint", "load_hint"),
    [
        (".onnx", " (use xprnn.to_onnx for .onnx)", " (use xprnn.from_onnx for .onnx)"),
        (".pth", " (use xprnn.to_torch for .pth)", " (use xprnn.from_torch for .pth)"),
        (".keras", "", " (use xprnn.from_keras for .keras)"),
        (".txt", "", ""),
    ],
)
def test_another_suffix_raises_with_the_function_for_it(tmp_path, rng, suffix, save_hint, load_hint):
    layer, path = xprnn.RNN(3, 4), tmp_path / f"m{suffix}"
    with pytest.raises(InputError) as error:
        xprnn.save(path, layer, layer.init(rng, like=np.zeros(1)))
    assert str(error.value) == f"{path}: expected a name ending in .safetensors or .npz, found {suffix}{save_hint}"
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        xprnn.load(path)
    assert str(error.value) == f"{path}: expected a .safetensors or .npz file{load_hint}"
