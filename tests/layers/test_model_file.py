"""Model files: exact round trips, and errors for other or damaged files."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib

import numpy as np
import pytest
from support.safetensors_files import raw_safetensors

import xprnn
from xprnn.arrays.namespace import InputError
from xprnn.io import archive
from xprnn.io.archive import FORMAT
from xprnn.layers import model_file

SUFFIXES = (".safetensors", ".npz")


@pytest.fixture
def model():
    return xprnn.Sequential(rnn=xprnn.RNN(5, 4), head=xprnn.Linear(4, 5))


@pytest.fixture
def params(model, rng):
    return model.init(rng, like=np.zeros(1, np.float32))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip_is_exact(tmp_path, model, rng, suffix, dtype):
    params = model.init(rng, like=np.zeros(1, dtype))
    params["head.weight"] = np.asfortranarray(params["head.weight"])
    metadata = {"vocabulary": "aé🙂\n", "bits": 1.5}
    path = tmp_path / f"model{suffix}"
    xprnn.save(path, model, params, metadata)
    loaded_model, loaded = xprnn.load(path)
    assert loaded_model == model
    assert loaded.keys() == params.keys()
    for name, array in params.items():
        assert loaded[name].dtype == dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert model_file.load_metadata(path) == metadata
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_converts_to_the_array_library_of_like(tmp_path, model, params, xp, suffix):
    path = tmp_path / f"model{suffix}"
    xprnn.save(path, model, params)
    like = xp.asarray(np.zeros(1), "float32")
    _, loaded = xprnn.load(path, like=like)
    for name, array in loaded.items():
        xp.assert_like(array, like)
        np.testing.assert_array_equal(xp.to_numpy(array), params[name])


def xprnn_metadata(text: str) -> dict[str, str]:
    return {FORMAT: text, "xprnn.crc32": str(zlib.crc32(text.encode()))}


def foreign_safetensors() -> bytes:
    return raw_safetensors({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, None, b"\0" * 4)


def oversized_safetensors() -> bytes:
    """Return a file of a few bytes whose header claims 4 TB."""
    return raw_safetensors({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, None, b"")


def oversized_npz() -> bytes:
    out, array = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("head.weight.npy", array.getvalue())
    return out.getvalue()


def pickled_npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, w=np.array([{"a": 1}], dtype=object))
    return out.getvalue()


def compressed_npz() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, w=np.zeros(100_000))
    return out.getvalue()


def foreign_npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, w=np.zeros(3))
    return out.getvalue()


def huge_model() -> bytes:
    """Return a small file whose configuration describes a model of 10^18 parameters."""
    config = xprnn.Sequential(rnn=xprnn.RNN(10**9, 10**9), head=xprnn.Linear(10**9, 5)).config()
    shapes = xprnn.Sequential(rnn=xprnn.RNN(1, 1), head=xprnn.Linear(1, 1)).shapes()
    tensors = {
        name: {"dtype": "F32", "shape": [1] * len(shape), "data_offsets": [4 * i, 4 * i + 4]}
        for i, (name, shape) in enumerate(shapes.items())
    }
    metadata = xprnn_metadata(json.dumps({"model": config, "metadata": {}}))
    return raw_safetensors(tensors, metadata, b"\0" * 4 * len(shapes))


def unknown_model() -> bytes:
    return raw_safetensors({}, xprnn_metadata(json.dumps({"model": {"type": "Transformer"}})), b"")


BAD_FILES = {
    "empty": (".safetensors", b"", "damaged"),
    "text": (".safetensors", b"once upon a time there was a model", "damaged"),
    "foreign": (".safetensors", foreign_safetensors(), "not written by xprnn"),
    "oversized": (".safetensors", oversized_safetensors(), "damaged"),
    "huge": (".safetensors", huge_model(), "the model expects"),
    "unknown": (".safetensors", unknown_model(), "holds no model this xprnn knows"),
    "not JSON": (".safetensors", raw_safetensors({}, xprnn_metadata("{"), b""), "damaged"),
    "list": (".safetensors", raw_safetensors({}, xprnn_metadata("[]"), b""), "not a JSON object"),
    "no checksum": (".safetensors", raw_safetensors({}, {FORMAT: "{}"}, b""), "does not match its checksum"),
    "empty npz": (".npz", b"", "damaged"),
    "text npz": (".npz", b"once upon a time there was a model", "damaged"),
    "foreign npz": (".npz", foreign_npz(), "not written by xprnn"),
    "oversized npz": (".npz", oversized_npz(), "does not have the size of its shape"),
    "pickled npz": (".npz", pickled_npz(), "damaged"),
    "compressed npz": (".npz", compressed_npz(), "compressed"),
    "other suffix": (".h5", b"\x89HDF", "expected a .safetensors or .npz file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_other_files_raise_a_one_line_error(tmp_path, case):
    suffix, content, message = BAD_FILES[case]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        xprnn.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files_raise_input_error(tmp_path, model, params, suffix):
    path = tmp_path / f"model{suffix}"
    xprnn.save(path, model, params)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            xprnn.load(path)


def test_missing_files_and_directories_raise_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        xprnn.load(tmp_path / "no.safetensors")
    (tmp_path / "dir.npz").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        xprnn.load(tmp_path / "dir.npz")


def without_bias(params):
    return {k: v for k, v in params.items() if k != "head.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_bias, "missing parameters head.bias"),
        (lambda p: {**p, "more": p["head.bias"]}, "extra parameters more"),
        (lambda p: {**p, "head.bias": p["head.bias"][:3]}, r"head.bias has shape \(3,\), the model expects \(5,\)"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_that_do_not_fit_the_model_raise_input_error(tmp_path, model, params, suffix, change, message):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(InputError, match=message):
        xprnn.save(path, model, change(params))
    assert list(tmp_path.iterdir()) == []
    arrays = {k: np.asarray(v) for k, v in change(params).items()}
    archive.write_arrays(path, arrays, {"model": model.config(), "metadata": {}})
    with pytest.raises(InputError, match=message):
        xprnn.load(path)


def test_failed_write_leaves_the_old_file_unchanged(tmp_path, model, params, monkeypatch):
    path = tmp_path / "model.safetensors"
    xprnn.save(path, model, params, {"version": "old"})

    def raise_disk_full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(InputError, match="No space left on device"):
        xprnn.save(path, model, params, {"version": "new"})
    assert list(tmp_path.iterdir()) == [path]
    assert model_file.load_metadata(path) == {"version": "old"}


def test_save_to_an_invalid_path_raises_input_error(tmp_path, model, params):
    with pytest.raises(InputError, match="cannot be written"):
        xprnn.save(tmp_path / "no" / "model.safetensors", model, params)
    with pytest.raises(InputError, match=r"expected a name ending in \.safetensors or \.npz, found \.h5"):
        xprnn.save(tmp_path / "model.h5", model, params)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nested_state_keys_do_not_collide(tmp_path, suffix):
    state = {"a": {"b": np.ones(1)}, "a.b": np.zeros(1), "a\0/..": (np.full(1, 2.0), {"": None})}
    xprnn.save_state(tmp_path / f"s{suffix}", state)
    assert xprnn.load_state(tmp_path / f"s{suffix}") == state
    with pytest.raises(InputError, match="dicts with strings as keys"):
        xprnn.save_state(tmp_path / f"s{suffix}", {1: np.ones(1), "1": np.zeros(1)})


def convert_params(convert):
    return lambda model, params: {"params": {name: convert(array) for name, array in params.items()}}


UNSAVABLE = {
    "lists": (convert_params(lambda a: a.tolist()), "must be an array"),
    "none": (convert_params(lambda _: None), "must be an array, found None"),
    "objects": (convert_params(lambda a: a.astype(object)), "has dtype object, a file holds float16"),
    "complex": (convert_params(lambda a: a.astype(np.complex64)), "has dtype complex64"),
    "no params": (lambda *_: {"params": None}, "params must be a dict, found NoneType"),
    "number as name": (lambda _, p: {"params": {**p, 1: np.zeros(1), "x": np.zeros(1)}}, "extra parameters 1, x"),
    "no model": (lambda *_: {"model": None}, "model must be a layer or Sequential, found NoneType"),
    "a class": (lambda *_: {"model": xprnn.RNN}, "model must be a layer or Sequential, found type"),
    "list as metadata": (lambda *_: {"metadata": [1]}, "metadata must be a dict, found list"),
    "set in metadata": (lambda *_: {"metadata": {"a": {1}}}, "metadata that JSON can hold, but .* set"),
    "path": (lambda *_: {"path": None}, "save: expected a path, found NoneType"),
    "zero in a path": (lambda *_: {"path": "a\0b.npz"}, r"found 'a\\x00b\.npz' with a NUL character"),
}
if np.longdouble(0).dtype.itemsize > 8:
    UNSAVABLE["long double"] = (convert_params(np.longdouble), "has dtype (longdouble|float128|float96)")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", UNSAVABLE)
def test_save_of_invalid_arguments_raises_a_one_line_error(tmp_path, model, params, suffix, case):
    change, message = UNSAVABLE[case]
    arguments = {"path": tmp_path / f"m{suffix}", "model": model, "params": params, "metadata": {}}
    with pytest.raises(InputError, match=message) as error:
        xprnn.save(**{**arguments, **change(model, params)})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_with_invalid_arguments_raises_input_error(tmp_path, model, params, suffix):
    path = tmp_path / f"m{suffix}"
    xprnn.save(path, model, params)
    xprnn.save_state(tmp_path / f"s{suffix}", params)
    for load, file in ((xprnn.load, path), (xprnn.load_state, tmp_path / f"s{suffix}")):
        for bad in (None, 3, "a\0.npz"):
            with pytest.raises(InputError, match="expected a path, found"):
                load(bad)
        with pytest.raises(InputError, match="like must be an array"):
            load(file, like=[1.0])


@pytest.mark.needs("torch")
def test_torch_bfloat16_cannot_be_saved_or_loaded(tmp_path, model, params):
    import torch

    bfloat16_params = {name: torch.tensor(array, dtype=torch.bfloat16) for name, array in params.items()}
    with pytest.raises(InputError, match=r"is torch\.bfloat16, which NumPy cannot hold"):
        xprnn.save(tmp_path / "m.npz", model, bfloat16_params)
    xprnn.save(tmp_path / "m.npz", model, params)
    with pytest.raises(InputError, match=r"cannot be loaded as torch\.bfloat16"):
        xprnn.load(tmp_path / "m.npz", like=next(iter(bfloat16_params.values())))
