"""Files from elsewhere: what torch and safetensors wrote is read to the bit, and nothing in a file is believed."""

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
from layers.test_model_file import raw_safetensors
from support.paths import ROOT, TESTS

import xprnn
from xprnn.arrays.namespace import InputError

needs_torch = pytest.mark.needs("torch")


def weights(rng, dtype=np.float64):
    layer = xprnn.LSTM(3, 4, 2, bidirectional=True)
    params = layer.init(rng, like=np.zeros(0, dtype))
    return layer, params


def same(have, want):
    assert have.keys() == want.keys()
    for name, array in want.items():
        assert have[name].dtype == array.dtype
        np.testing.assert_array_equal(have[name], array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_safetensors_of_others(tmp_path, rng, dtype):
    layer, params = weights(rng, np.float64)
    params = {name: array.astype(dtype) for name, array in params.items()}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(params, path, {"format": "pt"})
    again, read = xprnn.from_torch(path)
    assert again == layer
    same(read, params)
    assert xprnn.from_torch(path, batch_first=True)[0].batch_first


def test_names_in_a_file_are_sorted_and_their_order_says_nothing(tmp_path, rng):
    """Alphabetically the head, "a", comes before the layer, and the second layer, "l", before the first, "r"."""
    shapes = {"a": xprnn.Linear(6, 2), "l": xprnn.GRU(4, 6), "r": xprnn.RNN(3, 4), "embed": xprnn.Embedding(9, 3)}
    arrays = {f"{n}.{k}": rng.normal(size=s) for n, part in shapes.items() for k, s in part.shapes().items()}
    safetensors.numpy.save_file(arrays, tmp_path / "m.safetensors")
    model, params = xprnn.from_torch(tmp_path / "m.safetensors")
    assert model == xprnn.Sequential(**{n: shapes[n] for n in ("embed", "r", "l", "a")})
    same(params, arrays)
    square = {f"{n}.weight_{k}h_l0": rng.normal(size=(12, 4)) for n in "ab" for k in "ih"}
    safetensors.numpy.save_file(square, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"more than one order .* fits: a \(GRU 4 -> 4\), b .*pass order="):
        xprnn.from_torch(tmp_path / "s.safetensors")
    assert list(xprnn.from_torch(tmp_path / "s.safetensors", order="ba")[0].layers) == ["b", "a"]


def test_more_parts_than_orders_can_be_tried_for(tmp_path, rng):
    square = {f"p{i}.weight": rng.normal(size=(4, 3 + (i > 0))) for i in range(9)}
    safetensors.numpy.save_file(square, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="no order"):
        xprnn.from_torch(tmp_path / "s.safetensors")


def test_bfloat16_in_a_file_becomes_float32(tmp_path, rng):
    numbers = rng.normal(size=(4, 3)).astype("f4")
    halves = (numbers.view("u4") >> 16).astype("<u2")
    header = {"fc.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    header["fc.weight"] = {"dtype": "BF16", "shape": [4, 3], "data_offsets": [8, 32]}
    data = halves[:, 0].tobytes() + halves.tobytes()
    (tmp_path / "m.safetensors").write_bytes(raw_safetensors(header, None, data))
    model, params = xprnn.from_torch(tmp_path / "m.safetensors")
    assert model == xprnn.Sequential(fc=xprnn.Linear(3, 4))
    want = (halves.astype("u4") << 16).view("f4")
    same(params, {"fc.weight": want, "fc.bias": want[:, 0]})


@needs_torch
@pytest.mark.parametrize("ending", [".pt", ".pth"])
def test_files_of_torch(tmp_path, rng, ending):
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
        same(params, {name: value.numpy() for name, value in module.state_dict().items()})


@needs_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_what_safetensors_wrote_for_torch(tmp_path, dtype):
    import torch
    from safetensors.torch import save_file

    module = torch.nn.RNN(3, 4, dtype=getattr(torch, dtype))
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    _, params = xprnn.from_torch(tmp_path / "m.safetensors", like=np.zeros(0))
    same(params, {name: value.double().numpy() for name, value in module.state_dict().items()})


def hostile_tensors():
    import torch

    spread = torch.zeros(1).expand(10**11)
    nowhere = torch.empty(10**11, device="meta")
    sparse = torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (10**11,), check_invariants=True
    )
    return {"spread": spread, "nowhere": nowhere, "sparse": sparse}


@needs_torch
@pytest.mark.parametrize("kind", ["spread", "nowhere", "sparse"])
def test_tensors_larger_than_their_file(tmp_path, kind):
    import torch

    torch.save({"weight": hostile_tensors()[kind]}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"weight is not a dense tensor|weights-only loader"):
        xprnn.from_torch(tmp_path / "m.pt")


@needs_torch
def test_what_is_no_state_dict_of_torch(tmp_path):
    import torch

    path = tmp_path / "m.pt"
    torch.save(torch.nn.GRU(3, 4), path)
    with pytest.raises(InputError, match=r"weights-only loader cannot read .*torch\.save\(model\.state_dict\(\), path\)"):
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


def test_torch_files_without_torch(tmp_path, monkeypatch):
    (tmp_path / "m.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r'm\.pt: needs torch: pip install "xprnn\[torch\]"'):
        xprnn.from_torch(tmp_path / "m.pt")
    layer = xprnn.GRU(3, 4)
    with pytest.raises(InputError, match='to_torch: needs torch: pip install "xprnn'):
        xprnn.to_torch(layer, layer.init(np.random.default_rng(0), like=np.zeros(0)))


def test_files_that_are_not_for_from_torch(tmp_path, rng):
    layer, params = weights(rng)
    xprnn.save(tmp_path / "ours.safetensors", layer, params)
    with pytest.raises(InputError, match=r"ours\.safetensors: written by xprnn.*read it with xprnn\.load"):
        xprnn.from_torch(tmp_path / "ours.safetensors")
    (tmp_path / "m.h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected a \.safetensors, \.pt or \.pth file"):
        xprnn.from_torch(tmp_path / "m.h5")
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        xprnn.from_torch(tmp_path / "no.safetensors")


def bomb_npz(kind):
    """A small file that would be 4 GB in memory."""
    out, array = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (10**9,)})
    with zipfile.ZipFile(
        out, "w", zipfile.ZIP_STORED if kind == "lies" else zipfile.ZIP_DEFLATED, compresslevel=1
    ) as z:
        z.writestr("a.npy", array.getvalue() + bytes(10**7 if kind == "packed" else 0))
    return out.getvalue()


def lying_safetensors(length):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header


BOMBS = {
    "npz that lies": ("m.npz", bomb_npz("lies")),
    "npz that swells": ("m.npz", bomb_npz("packed")),
    "safetensors": ("m.safetensors", lying_safetensors(None)),
    "safetensors, length of the header": ("m.safetensors", lying_safetensors(2**63 - 1)),
    "safetensors, length below its limit": ("m.safetensors", lying_safetensors(99_000_000)),
}


@pytest.mark.parametrize("case", BOMBS)
def test_no_claim_in_a_file_takes_memory(tmp_path, case):
    name, content = BOMBS[case]
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


def fuzzed(*options):
    """The fuzzer in a process of its own, under a limit on memory; the timeout is for a reader that hangs."""
    paths = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "support.corrupt_files", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_files_that_lie_are_refused_and_nothing_worse():
    run = fuzzed("--examples", "60", "--no-torch")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " refused" in run.stdout


@needs_torch
def test_so_are_those_of_torch():
    run = fuzzed("--examples", "60", "--only", ".pt")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " refused" in run.stdout


def test_the_fuzzer_can_fail(tmp_path, monkeypatch):
    """With a reader that believes the file, it does not pass."""
    import random

    from support import corrupt_files

    path = tmp_path / "ours.npz"
    content = corrupt_files.valid_files(tmp_path)["ours.npz"]

    def trusting(path):
        with zipfile.ZipFile(path) as file:
            return [np.lib.format.read_array(io.BytesIO(file.read(name))) for name in file.namelist()]

    monkeypatch.setattr(xprnn, "load", trusting)
    outcomes = set()
    for seed in range(100):
        path.write_bytes(corrupt_files.corrupt_file("ours.npz", content, random.Random(seed)))
        try:
            outcomes.update(corrupt_files.read_with_all(path, "ours.npz"))
        except Exception as error:
            outcomes.add(type(error))
    assert {zipfile.BadZipFile, ValueError} <= outcomes
