"""Keras files that lie or are damaged: one clear error, no code run, no memory taken for what is not there."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from support.paths import DATA

import xprnn

h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.needs("h5py")
FILES = DATA / "keras_files"
LSTM = "layers/lstm/cell/vars"


def members(stem="lstm_alone"):
    with zipfile.ZipFile(FILES / f"{stem}.keras") as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(path, parts, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def with_config(path, change, stem="lstm_alone"):
    """The file with its architecture changed by `change(config)`, which may return another one."""
    parts = members(stem)
    config = json.loads(parts["config.json"])
    changed = change(config)
    parts["config.json"] = json.dumps(config if changed is None else changed)
    return zipped(path, parts)


def with_arrays(path, change, stem="lstm_alone"):
    """The file with its HDF5 part changed by `change(file)`."""
    parts = members(stem)
    memory = io.BytesIO(parts["model.weights.h5"])
    with h5py.File(memory, "r+") as file:
        change(file)
    parts["model.weights.h5"] = memory.getvalue()
    return zipped(path, parts)


def refused(path, *messages, **options):
    """The error's text, one line; reading takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(xprnn.InputError) as error:
            xprnn.from_keras(path, **options)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    said = str(error.value)
    assert "\n" not in said
    for message in messages:
        assert message in said, said
    return said


def layer(config, kind="LSTM"):
    return next(entry for entry in config["config"]["layers"] if entry["class_name"] == kind)


def replaced(name, make):
    def change(file):
        del file[f"{LSTM}/{name}"]
        make(file[LSTM], name)

    return change


def virtual(group, name):
    layout = h5py.VirtualLayout((3, 16), "f8")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (3, 16))
    group.create_virtual_dataset(name, layout)


ARRAYS = {
    "external link": (lambda g, n: g.__setitem__(n, h5py.ExternalLink("other.h5", "/x")), "is a ExternalLink: links to other objects or files are not followed"),
    "soft link": (lambda g, n: g.__setitem__(n, h5py.SoftLink(f"/{LSTM}/1")), "is a SoftLink"),
    "virtual": (virtual, "expected a contiguous array"),
    "external storage": (
        lambda g, n: g.create_dataset(n, (3, 16), "f8", external=[("/etc/hostname", 0, 384)]),
        "expected a contiguous array",
    ),
    "chunks": (
        lambda g, n: g.create_dataset(n, (3, 16), "f8", chunks=(1, 16), compression="gzip"),
        "expected a contiguous array",
    ),
    "references": (lambda g, n: g.create_dataset(n, (3, 16), h5py.ref_dtype), "expected float16, float32 or float64"),
    "strings": (lambda g, n: g.create_dataset(n, (3, 16), h5py.string_dtype()), "expected float16, float32 or float64"),
    "integers": (lambda g, n: g.create_dataset(n, (3, 16), "i4"), "expected float16, float32 or float64, found int32"),
    "a group": (lambda g, n: g.create_group(n), "expected a Dataset, found Group"),
    "nothing stored": (lambda g, n: g.create_dataset(n, (3, 16), "f8"), "claims 384 bytes that are not in the file"),
    "another shape": (
        lambda g, n: g.create_dataset(n, data=np.zeros((3, 12))),
        "expected shape (any, 16), found (3, 1",
    ),
    "missing": (lambda g, n: None, "expected 2 arrays, found 1"),
    "one more": (lambda g, n: [g.create_dataset(k, data=np.zeros(2)) for k in (n, "7")], "expected 2 arrays, found 3"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_not_plain_ones_of_the_file(tmp_path, name):
    make, message = ARRAYS[name]
    refused(with_arrays(tmp_path / "m.keras", replaced("0", make)), "lstm", LSTM.removesuffix("/vars"), message)


def test_a_shape_without_numbers(tmp_path):
    """An array of a petabyte in a file of 10 kB, and an architecture that asks for it."""
    units = 1 << 22

    def arrays(file):
        for name, rows in (("0", 3), ("1", units)):
            replaced(name, lambda g, n, rows=rows: g.create_dataset(n, (rows, 4 * units), "f8"))(file)

    parts = members()
    with_arrays(tmp_path / "big.keras", arrays)
    with zipfile.ZipFile(tmp_path / "big.keras") as archive:
        parts["model.weights.h5"] = archive.read("model.weights.h5")
    config = json.loads(parts["config.json"])
    layer(config)["config"]["units"] = units
    parts["config.json"] = json.dumps(config)
    refused(zipped(tmp_path / "m.keras", parts), "bytes that are not in the file")


def test_one_array_under_many_names(tmp_path):
    """Hard links make a file read many times its size; what is read is never more than the file has."""
    count = 400
    parts = members()
    memory = io.BytesIO(parts["model.weights.h5"])
    with h5py.File(memory, "r+") as file:
        replaced("0", lambda g, n: g.create_dataset(n, data=np.ones((4, 16))))(file)
        for k in range(1, count):
            file[f"layers/lstm_{k}"] = file["layers/lstm"]
    config = json.loads(parts["config.json"])
    config["config"]["layers"] += [layer(config)] * (count - 1)
    parts |= {"model.weights.h5": memory.getvalue(), "config.json": json.dumps(config)}
    refused(zipped(tmp_path / "m.keras", parts), "bytes that are not in the file")


def option(key, value):
    return lambda config: layer(config)["config"].__setitem__(key, value)


def nested(config):
    for _ in range(40):
        config = {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": [config]}}
    return config


CODE = {"module": "builtins", "class_name": "function", "config": "os.system", "registered_name": "function"}
CONFIGS = {
    "units 0": (option("units", 0), "units must be an integer >= 1, found 0"),
    "units true": (option("units", True), "units must be an integer >= 1, found True"),
    "units huge": (option("units", 10**30), "expected shape"),
    "units text": (option("units", "4"), "units must be an integer >= 1, found '4'"),
    "flag": (option("go_backwards", "no"), "go_backwards must be true or false, found 'no'"),
    "activation": (option("activation", "no_such"), "activation 'no_such' has no equivalent"),
    "activation list": (option("activation", ["tanh"]), "activation \"['tanh']\" has no equivalent"),
    "code": (option("activation", CODE), "(function) is not a Keras layer; user-defined code is never run"),
    "lambda": (lambda c: layer(c).update(class_name="Lambda"), "(Lambda): has no equivalent in xprnn"),
    "registered": (lambda c: layer(c).update(registered_name="mine>LSTM"), "mine>LSTM) is not a Keras layer"),
    "module": (lambda c: layer(c).update(module="os"), "is not a Keras layer; user-defined code is never run"),
    "no list": (lambda c: c["config"].__setitem__("layers", {}), "has no list of layers"),
    "empty": (lambda c: c["config"].__setitem__("layers", []), "has no layer that computes anything"),
    "not layers": (lambda c: c["config"].__setitem__("layers", [1, None, {}]), "expected a layer's class_name and con"),
    "a list": (lambda c: [c], "expected the architecture of a model"),
    "deep": (nested, "expected a Sequential or a functional model"),
    "another model": (lambda c: c.update(class_name="Mine"), "(Mine): expected a Sequential or a functional model"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_that_lie(tmp_path, name):
    change, message = CONFIGS[name]
    refused(with_config(tmp_path / "m.keras", change), "from_keras ", "m.keras", message)


def test_json_too_deep_to_read(tmp_path):
    refused(zipped(tmp_path / "m.keras", members() | {"config.json": "[" * 200_000}), "config.json: expected an arch")


def test_chains_that_go_round(tmp_path):
    def round_and_round(config):
        layers = {entry["name"]: entry for entry in config["config"]["layers"]}
        gru = next(entry for entry in layers.values() if entry["class_name"] == "GRU")
        first = gru["inbound_nodes"][0]["args"][0]["config"]["keras_history"]
        first[0] = gru["name"]

    path = with_config(tmp_path / "m.keras", round_and_round, "pair_with_states")
    refused(path, "expected a chain from the input to the output in which every layer occurs once")


def test_a_mask_that_is_another_one(tmp_path):
    def other_value(config):
        op = next(e for e in config["config"]["layers"] if e["class_name"] == "NotEqual")
        op["inbound_nodes"][0]["args"][1] = 5.0

    path = with_config(tmp_path / "m.keras", other_value, "pair_with_states")
    refused(path, "its mask argument is not the mask of the Masking or Embedding before it")


def written(path, data):
    path.write_bytes(data)
    return path


def bomb(path):
    parts = members() | {"config.json": " " * (1 << 25)}
    return zipped(path, parts, zipfile.ZIP_DEFLATED)


def twice(path):
    zipped(path, members())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", b"{}")
    return path


def flipped(path):
    data = bytearray((FILES / "lstm_alone.keras").read_bytes())
    data[data.index(b"\x89HDF") + 2000] ^= 1
    path.write_bytes(data)
    return path


ARCHIVES = {
    "bomb": (bomb, "the maximum ratio is 100"),
    "twice": (twice, "expected one config.json in the archive, found 2"),
    "a flipped bit": (flipped, "damaged"),
    "bzip2": (lambda p: zipped(p, members(), zipfile.ZIP_BZIP2), "has compression method 12, which Keras does not use"),
    "no weights": (
        lambda p: zipped(p, {"config.json": members()["config.json"]}),
        "expected one model.weights.h5 in the archive, found 0",
    ),
    "no hdf5": (lambda p: zipped(p, members() | {"model.weights.h5": b"no" * 999}), "damaged, or not a file of Keras"),
    "nothing": (lambda p: written(p, b"no"), "damaged, or not a file of Keras 3"),
    "a directory": (lambda p: p.mkdir() or p, "is a directory: save the model as one .keras file"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_lie(tmp_path, name):
    make, message = ARCHIVES[name]
    refused(make(tmp_path / "m.keras"), message)


def test_a_compressed_archive_is_fine(tmp_path):
    zipped(tmp_path / "m.keras", members(), zipfile.ZIP_DEFLATED)
    assert xprnn.from_keras(tmp_path / "m.keras")[0] == xprnn.LSTM(3, 4, bias=False, batch_first=True)


def test_use(tmp_path, monkeypatch):
    weights = FILES / "lstm_stack.weights.h5"
    refused(weights, "contains the weights of dense, dropout, lstm, lstm_1, but not the architecture", "config=")
    refused(weights, "config must be the result of model.to_json()", config=tmp_path / "none.json")
    refused(weights, "expected the architecture of a model", config={"a": 1})
    refused(weights, "config: expected an architecture as JSON", config="{")
    refused(
        FILES / "lstm_alone.keras",
        "the architecture is read from the .keras file: leave config out",
        config=(FILES / "lstm_stack.json").read_text(),
    )
    refused(None, "from_keras: expected a path, found NoneType")
    refused(FILES / "lstm_alone.keras", "like must be an array", like=3)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["model_config"] = "{}"
    refused(tmp_path / "old.h5", "is an .h5 file of Keras 2: load it there and save it as .keras")
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(weights, 'needs h5py: pip install "xprnn[keras]"')


def test_a_mask_goes_on_behind_two_directions(tmp_path):
    """Not hostile: the last layer of the recorded model, told to hold outputs, does so only if the mask is there."""
    path = with_config(tmp_path / "m.keras", option("zero_output_for_mask", False), "masks_go_on")
    kinds = [type(part).__name__ for part in xprnn.from_keras(path)[0].layers.values()]
    assert kinds == ["Masking", "GRU", "MergeDirections", "LSTM", "HoldLastOutput", "Linear", "Softmax"]
