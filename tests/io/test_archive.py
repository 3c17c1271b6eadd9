"""Files are checked as they are read: whatever bit flips in one, no number comes out other than it went in."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn.arrays.namespace import InputError
from xprnn.io import archive
from xprnn.layers import model_file

ENDINGS = (".safetensors", ".npz")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, ending):
    layer = xprnn.RNN(2, 2)
    params = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    path = tmp_path / f"model{ending}"
    xprnn.save(path, layer, params, {"vocabulary": "ab"})
    content, bits = path.read_bytes(), np.random.default_rng(1).integers(0, 8, 10_000)
    missed = []
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bits[place])]) + content[place + 1 :])
        try:
            again, loaded = xprnn.load(path)
            same = again == layer and all(np.array_equal(loaded[k], params[k]) for k in params)
            # The directory of a zip has bytes that nobody reads: times, comments, versions.
            if not same or model_file.load_metadata(path) != {"vocabulary": "ab"} or ending == ".safetensors":
                missed.append(place)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert missed == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_numbers_are_found_in_states_and_runs(tmp_path, ending):
    path = tmp_path / f"state{ending}"
    xprnn.save_state(path, (np.full((2, 3), 7.0), np.ones(4)))
    content = path.read_bytes()
    place = content.index(np.full(6, 7.0).tobytes())
    path.write_bytes(content[: place + 3] + b"\1" + content[place + 4 :])
    for read in (xprnn.load_state, archive.read_arrays):
        with pytest.raises(InputError, match="damaged"):
            read(path)


def test_the_same_bits_as_another_dtype_are_damage(tmp_path):
    path = tmp_path / "state.safetensors"
    xprnn.save_state(path, np.ones(4, np.float32))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"I32"'))
    with pytest.raises(InputError, match=r"state\.0 does not match its checksum"):
        xprnn.load_state(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_arrays_of_any_byte_order_length_and_rank(tmp_path, ending):
    path, x = tmp_path / f"state{ending}", np.arange(6.0).reshape(2, 3)
    state = {"big": x.astype(">f4"), "turned": x.T, "none": np.zeros((0, 3)), "one": np.array(5), "half": np.float16(x)}
    xprnn.save_state(path, state)
    again = xprnn.load_state(path)
    assert again.keys() == state.keys()
    for name, array in state.items():
        assert again[name].dtype == array.dtype.newbyteorder("<")
        assert again[name].shape == array.shape
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("ending", ENDINGS)
def test_parameters_of_several_dtypes_come_back_in_theirs(tmp_path, rng, ending):
    model = xprnn.Sequential(rnn=xprnn.RNN(3, 4), head=xprnn.Linear(4, 2))
    params = model.init(rng, like=np.zeros(1))
    params = {k: a.astype(t) for (k, a), t in zip(params.items(), ("f8", "f4", "f2", ">f8", "f4", "f2"), strict=True)}
    xprnn.save(tmp_path / f"m{ending}", model, params)
    _, back = xprnn.load(tmp_path / f"m{ending}")
    for name, array in params.items():
        assert back[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(back[name], array)
    _, back = xprnn.load(tmp_path / f"m{ending}", like=np.zeros(1, np.float32))
    assert {a.dtype.name for a in back.values()} == {"float32"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_parameters_of_several_libraries_are_saved(tmp_path, rng, ending, xp):
    model = xprnn.Sequential(rnn=xprnn.RNN(3, 4), head=xprnn.Linear(4, 2))
    params = model.init(rng, like=np.zeros(1, np.float32))
    mixed = {k: xp.asarray(a) if k.startswith("head") else a for k, a in params.items()}
    with xp.allow_host_conversion():
        xprnn.save(tmp_path / f"m{ending}", model, mixed)
    _, back = xprnn.load(tmp_path / f"m{ending}")
    for name, array in params.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("name", ["complex64", "bfloat16"])
def test_which_parameter_has_which_dtype_is_said(tmp_path, rng, name):
    """Of many, the one that a file cannot hold; bfloat16 is JAX's."""
    layer = xprnn.RNN(3, 4)
    params = layer.init(rng, like=np.zeros(1))
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name
    params["bias_hh_l0"] = params["bias_hh_l0"].astype(dtype)
    with pytest.raises(InputError, match=f"bias_hh_l0 has dtype {name}, a file holds float16, float32, float64"):
        xprnn.save(tmp_path / "m.npz", layer, params)


@pytest.mark.parametrize(
    ("ending", "writes", "reads"),
    [
        (".onnx", " (use xprnn.to_onnx for .onnx)", " (use xprnn.from_onnx for .onnx)"),
        (".pth", " (use xprnn.to_torch for .pth)", " (use xprnn.from_torch for .pth)"),
        (".keras", "", " (use xprnn.from_keras for .keras)"),
        (".txt", "", ""),
    ],
)
def test_another_ending_says_whose_it_is(tmp_path, rng, ending, writes, reads):
    layer, path = xprnn.RNN(3, 4), tmp_path / f"m{ending}"
    with pytest.raises(InputError) as error:
        xprnn.save(path, layer, layer.init(rng, like=np.zeros(1)))
    assert str(error.value) == f"{path}: expected a name ending in .safetensors or .npz, found {ending}{writes}"
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        xprnn.load(path)
    assert str(error.value) == f"{path}: expected a .safetensors or .npz file{reads}"
