"""Files written by torch and safetensors are read exactly; damaged and malicious files raise InputError."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from support.paths import ROOT, TESTS
from support.safetensors_files import raw_safetensors

import xprnn
from xprnn.arrays.namespace import InputError

needs_torch = pytest.mark.needs("torch")


def lstm_and_params(rng, dtype=np.float64):
    layer = xprnn.LSTM(3, 4, 2, bidirectional=True)
    params = layer.init(rng, like=np.zeros(0, dtype))
    return layer, params


def assert_arrays_equal(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_safetensors_file_without_xprnn_metadata(tmp_path, rng, dtype):
    layer, params = lstm_and_params(rng, np.float64)
    params = {name: array.astype(dtype) for name, array in params.items()}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(params, path, {"format": "pt"})
    model, read_params = xprnn.from_torch(path)
    assert model == layer
    assert_arrays_equal(read_params, params)
    assert xprnn.from_torch(path, batch_first=True)[0].batch_first


def test_order_of_layers_in_safetensors_is_inferred_from_widths(tmp_path, rng):
    """The names are sorted: the head "a" is before the recurrent layers, and the second, "l", before the first, "r"."""
    layers = {"a": xprnn.Linear(6, 2), "l": xprnn.GRU(4, 6), "r": xprnn.RNN(3, 4), "embed": xprnn.Embedding(9, 3)}
    arrays = {
        f"{name}.{key}": rng.normal(size=shape)
        for name, layer in layers.items()
        for key, shape in layer.shapes().items()
    }
    safetensors.numpy.save_file(arrays, tmp_path / "m.safetensors")
    model, params = xprnn.from_torch(tmp_path / "m.safetensors")
    assert model == xprnn.Sequential(**{name: layers[name] for name in ("embed", "r", "l", "a")})
    assert_arrays_equal(params, arrays)
    equal_widths = {f"{name}.weight_{key}h_l0": rng.normal(size=(12, 4)) for name in "ab" for key in "ih"}
    safetensors.numpy.save_file(equal_widths, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"more than one order .* fits: a \(GRU 4 -> 4\), b .*pass order="):
        xprnn.from_torch(tmp_path / "s.safetensors")
    assert list(xprnn.from_torch(tmp_path / "s.safetensors", order="ba")[0].layers) == ["b", "a"]


def test_order_of_nine_layers_is_not_searched(tmp_path, rng):
    arrays = {f"p{i}.weight": rng.normal(size=(4, 3 + (i > 0))) for i in range(9)}
    safetensors.numpy.save_file(arrays, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="no order"):
        xprnn.from_torch(tmp_path / "s.safetensors")


def test_bfloat16_in_a_file_becomes_float32(tmp_path, rng):
    numbers = rng.normal(size=(4, 3)).astype("f4")
    bfloat16_bits = (numbers.view("u4") >> 16).astype("<u2")
    header = {"fc.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    header["fc.weight"] = {"dtype": "BF16", "shape": [4, 3], "data_offsets": [8, 32]}
    data = bfloat16_bits[:, 0].tobytes() + bfloat16_bits.tobytes()
    (tmp_path / "m.safetensors").write_bytes(raw_safetensors(header, None, data))
    model, params = xprnn.from_torch(tmp_path / "m.safetensors")
    assert model == xprnn.Sequential(fc=xprnn.Linear(3, 4))
    expected = (bfloat16_bits.astype("u4") << 16).view("f4")
    assert_arrays_equal(params, {"fc.weight": expected, "fc.bias": expected[:, 0]})


@needs_torch
@pytest.mark.parametrize("ending", [".pt", ".pth"])
def test_pt_files_with_a_state_dict_and_with_a_checkpoint(tmp_path, rng, ending):
    import torch

    module = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "out": torch.nn.Linear(4, 2)})
    path = tmp_path / f"model{ending}"
    for content in (
        module.state_dict(),
        {"epoch": 3, "model": module.state_dict(), "optimizer": {"state": {}, "param_groups": [{"lr": 1.0}]}},
    ):
        torch.save(content, path)
        model, params = xprnn.from_torch(path)
        assert model == xprnn.Sequential(rnn=xprnn.GRU(3, 4), out=xprnn.Linear(4, 2))
        assert_arrays_equal(params, {name: value.numpy() for name, value in module.state_dict().items()})


@needs_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_safetensors_file_of_a_torch_module(tmp_path, dtype):
    import torch
    from safetensors.torch import save_file

    module = torch.nn.RNN(3, 4, dtype=getattr(torch, dtype))
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    _, params = xprnn.from_torch(tmp_path / "m.safetensors", like=np.zeros(0))
    assert_arrays_equal(params, {name: value.double().numpy() for name, value in module.state_dict().items()})


def tensors_without_data():
    """Tensors whose shape claims 10**11 numbers, of which a file contains at most one."""
    import torch

    expanded = torch.zeros(1).expand(10**11)
    meta = torch.empty(10**11, device="meta")
    sparse = torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (10**11,), check_invariants=True
    )
    return {"expanded": expanded, "meta": meta, "sparse": sparse}


@needs_torch
@pytest.mark.parametrize("kind", ["expanded", "meta", "sparse"])
def test_tensors_without_their_data_in_the_file_raise(tmp_path, kind):
    import torch

    torch.save({"weight": tensors_without_data()[kind]}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"weight is not a dense tensor|weights-only loader"):
        xprnn.from_torch(tmp_path / "m.pt")


@needs_torch
def test_pt_files_without_a_state_dict_raise(tmp_path):
    import torch

    path = tmp_path / "m.pt"
    torch.save(torch.nn.GRU(3, 4), path)
    with pytest.raises(
        InputError, match=r"weights-only loader cannot read .*torch\.save\(model\.state_dict\(\), path\)"
    ):
        xprnn.from_torch(path)
    torch.save(torch.nn.GRU(3, 4).state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"not written by torch\.save of torch 1\.6 or newer"):
        xprnn.from_torch(path)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(InputError, match="expected a state_dict, found list"):
        xprnn.from_torch(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match=r"expected a state_dict \(name -> array\), found 'epoch' \(int\)"):
        xprnn.from_torch(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", bytes(10**7))
    with pytest.raises(InputError, match="its members are compressed"):
        xprnn.from_torch(path)


def test_error_without_torch_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "m.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r'm\.pt: needs torch: pip install "\.\[torch\]"'):
        xprnn.from_torch(tmp_path / "m.pt")
    layer = xprnn.GRU(3, 4)
    with pytest.raises(InputError, match='to_torch: needs torch: pip install "'):
        xprnn.to_torch(layer, layer.init(np.random.default_rng(0), like=np.zeros(0)))


def test_files_of_other_formats_raise(tmp_path, rng):
    layer, params = lstm_and_params(rng)
    xprnn.save(tmp_path / "xprnn.safetensors", layer, params)
    with pytest.raises(InputError, match=r"xprnn\.safetensors: written by xprnn.*read it with xprnn\.load"):
        xprnn.from_torch(tmp_path / "xprnn.safetensors")
    (tmp_path / "m.h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected a \.safetensors, \.pt or \.pth file"):
        xprnn.from_torch(tmp_path / "m.h5")
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        xprnn.from_torch(tmp_path / "no.safetensors")


def oversized_npz(kind):
    """A small .npz file that claims an array of 4 GB: without its data ("truncated"), or compressed zeros."""
    content, array = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (10**9,)})
    with zipfile.ZipFile(
        content, "w", zipfile.ZIP_STORED if kind == "truncated" else zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        archive.writestr("a.npy", array.getvalue() + bytes(10**7 if kind == "compressed" else 0))
    return content.getvalue()


def oversized_safetensors(length):
    """A small file that claims a tensor of 2**62 bytes; `length` replaces the true length of the header."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header


OVERSIZED_FILES = {
    "npz without the data": ("m.npz", oversized_npz("truncated")),
    "npz, compressed zeros": ("m.npz", oversized_npz("compressed")),
    "safetensors": ("m.safetensors", oversized_safetensors(None)),
    "safetensors, header of 2**63 bytes": ("m.safetensors", oversized_safetensors(2**63 - 1)),
    "safetensors, header of 99 MB": ("m.safetensors", oversized_safetensors(99_000_000)),
}


@pytest.mark.parametrize("case", OVERSIZED_FILES)
def test_false_sizes_raise_without_allocation(tmp_path, case):
    name, content = OVERSIZED_FILES[case]
    (tmp_path / name).write_bytes(content)
    readers = [xprnn.load, xprnn.load_state] + [xprnn.from_torch] * name.endswith(".safetensors")
    for read in readers:
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=r"damaged|not written by xprnn|does not have the size"):
                read(tmp_path / name)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 5 * len(content)
        finally:
            tracemalloc.stop()


def run_fuzzer(*options):
    """Run the fuzzer in a subprocess, because it limits the memory of its process; a timeout ends a hanging reader."""
    paths = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "support.corrupt_files", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_corrupted_files_are_read_or_raise_input_error():
    run = run_fuzzer("--examples", "60", "--no-torch")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " refused" in run.stdout


@needs_torch
def test_corrupted_torch_files_are_read_or_raise_input_error():
    run = run_fuzzer("--examples", "60", "--only", ".pt")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " refused" in run.stdout


def test_fuzzer_finds_errors_of_an_unchecked_reader(tmp_path, monkeypatch):
    import random

    from support import corrupt_files

    path = tmp_path / "xprnn_model.npz"
    content = corrupt_files.valid_files(tmp_path)["xprnn_model.npz"]

    def read_without_checks(path):
        with zipfile.ZipFile(path) as file:
            return [np.lib.format.read_array(io.BytesIO(file.read(name))) for name in file.namelist()]

    monkeypatch.setattr(xprnn, "load", read_without_checks)
    outcomes = set()
    for seed in range(100):
        path.write_bytes(corrupt_files.corrupt_file("xprnn_model.npz", content, random.Random(seed)))
        try:
            outcomes.update(corrupt_files.read_with_all(path, "xprnn_model.npz"))
        except Exception as error:
            outcomes.add(type(error))
    assert {zipfile.BadZipFile, ValueError} <= outcomes
