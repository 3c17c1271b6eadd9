"""Damaged and malicious Keras files raise one clear error, run no code and allocate no memory for missing data."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from support.paths import DATA

import xprnn

with suppress(ImportError):  # without h5py, all tests of this file are deselected
    import h5py

pytestmark = pytest.mark.needs("h5py")
FILES = DATA / "keras_files"
LSTM = "layers/lstm/cell/vars"


def read_members(stem="lstm_alone"):
    """Return name -> content of the members of a recorded .keras file."""
    with zipfile.ZipFile(FILES / f"{stem}.keras") as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write_zip(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def with_config(path, change, stem="lstm_alone"):
    """Write the file with an architecture changed by `change(config)`, in place or by returning another one."""
    contents = read_members(stem)
    config = json.loads(contents["config.json"])
    changed = change(config)
    contents["config.json"] = json.dumps(config if changed is None else changed)
    return write_zip(path, contents)


def with_arrays(path, change, stem="lstm_alone"):
    """Write the file with its HDF5 member changed by `change(file)`."""
    contents = read_members(stem)
    memory = io.BytesIO(contents["model.weights.h5"])
    with h5py.File(memory, "r+") as file:
        change(file)
    contents["model.weights.h5"] = memory.getvalue()
    return write_zip(path, contents)


def assert_refused(path, *messages, **options):
    """Assert that reading raises InputError with these messages in one line, and allocates less than 32 MiB."""
    tracemalloc.start()
    try:
        with pytest.raises(xprnn.InputError) as error:
            xprnn.from_keras(path, **options)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    text = str(error.value)
    assert "\n" not in text
    for message in messages:
        assert message in text, text
    return text


def layer_entry(config, class_name="LSTM"):
    """Return the first layer of this class in an architecture."""
    return next(entry for entry in config["config"]["layers"] if entry["class_name"] == class_name)


def replace_array(name, create):
    def change(file):
        del file[f"{LSTM}/{name}"]
        create(file[LSTM], name)

    return change


def create_virtual_dataset(group, name):
    layout = h5py.VirtualLayout((3, 16), "f8")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (3, 16))
    group.create_virtual_dataset(name, layout)


INVALID_ARRAYS = {
    "external link": (
        lambda g, n: g.__setitem__(n, h5py.ExternalLink("other.h5", "/x")),
        "is a ExternalLink: links to other objects or files are not followed",
    ),
    "soft link": (lambda g, n: g.__setitem__(n, h5py.SoftLink(f"/{LSTM}/1")), "is a SoftLink"),
    "virtual": (create_virtual_dataset, "expected a contiguous array"),
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


@pytest.mark.parametrize("name", INVALID_ARRAYS)
def test_arrays_that_are_not_stored_as_contiguous_floats_raise(tmp_path, name):
    create, message = INVALID_ARRAYS[name]
    assert_refused(
        with_arrays(tmp_path / "m.keras", replace_array("0", create)), "lstm", LSTM.removesuffix("/vars"), message
    )


def test_large_shape_without_data_raises(tmp_path):
    """A file of 10 kB claims an array of 0.5 petabytes, and the architecture requires that shape."""
    units = 1 << 22

    def replace_arrays(file):
        for name, rows in (("0", 3), ("1", units)):
            replace_array(name, lambda g, n, rows=rows: g.create_dataset(n, (rows, 4 * units), "f8"))(file)

    contents = read_members()
    with_arrays(tmp_path / "big.keras", replace_arrays)
    with zipfile.ZipFile(tmp_path / "big.keras") as archive:
        contents["model.weights.h5"] = archive.read("model.weights.h5")
    config = json.loads(contents["config.json"])
    layer_entry(config)["config"]["units"] = units
    contents["config.json"] = json.dumps(config)
    assert_refused(write_zip(tmp_path / "m.keras", contents), "bytes that are not in the file")


def test_array_with_many_hard_links_raises(tmp_path):
    """With hard links, the arrays of all layers would be larger than the file."""
    count = 400
    contents = read_members()
    memory = io.BytesIO(contents["model.weights.h5"])
    with h5py.File(memory, "r+") as file:
        replace_array("0", lambda g, n: g.create_dataset(n, data=np.ones((4, 16))))(file)
        for k in range(1, count):
            file[f"layers/lstm_{k}"] = file["layers/lstm"]
    config = json.loads(contents["config.json"])
    config["config"]["layers"] += [layer_entry(config)] * (count - 1)
    contents |= {"model.weights.h5": memory.getvalue(), "config.json": json.dumps(config)}
    assert_refused(write_zip(tmp_path / "m.keras", contents), "bytes that are not in the file")


def set_option(key, value):
    return lambda config: layer_entry(config)["config"].__setitem__(key, value)


def nest_deeply(config):
    for _ in range(40):
        config = {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": [config]}}
    return config


FUNCTION_CONFIG = {"module": "builtins", "class_name": "function", "config": "os.system", "registered_name": "function"}
INVALID_CONFIGS = {
    "units 0": (set_option("units", 0), "units must be an integer >= 1, found 0"),
    "units true": (set_option("units", True), "units must be an integer >= 1, found True"),
    "units huge": (set_option("units", 10**30), "expected shape"),
    "units text": (set_option("units", "4"), "units must be an integer >= 1, found '4'"),
    "flag": (set_option("go_backwards", "no"), "go_backwards must be true or false, found 'no'"),
    "activation": (set_option("activation", "no_such"), "activation 'no_such' has no equivalent"),
    "activation list": (set_option("activation", ["tanh"]), "activation \"['tanh']\" has no equivalent"),
    "code": (
        set_option("activation", FUNCTION_CONFIG),
        "(function) is not a Keras layer; user-defined code is never run",
    ),
    "lambda": (lambda c: layer_entry(c).update(class_name="Lambda"), "(Lambda): has no equivalent in xprnn"),
    "registered": (lambda c: layer_entry(c).update(registered_name="mine>LSTM"), "mine>LSTM) is not a Keras layer"),
    "module": (lambda c: layer_entry(c).update(module="os"), "is not a Keras layer; user-defined code is never run"),
    "no list": (lambda c: c["config"].__setitem__("layers", {}), "has no list of layers"),
    "empty": (lambda c: c["config"].__setitem__("layers", []), "has no layer that computes anything"),
    "not layers": (lambda c: c["config"].__setitem__("layers", [1, None, {}]), "expected a layer's class_name and con"),
    "a list": (lambda c: [c], "expected the architecture of a model"),
    "deep": (nest_deeply, "expected a Sequential or a functional model"),
    "another model": (lambda c: c.update(class_name="Mine"), "(Mine): expected a Sequential or a functional model"),
}


@pytest.mark.parametrize("name", INVALID_CONFIGS)
def test_invalid_architectures_raise(tmp_path, name):
    change, message = INVALID_CONFIGS[name]
    assert_refused(with_config(tmp_path / "m.keras", change), "from_keras ", "m.keras", message)


def test_deeply_nested_json_raises(tmp_path):
    assert_refused(
        write_zip(tmp_path / "m.keras", read_members() | {"config.json": "[" * 200_000}),
        "config.json: expected an arch",
    )


def test_cyclic_functional_model_raises(tmp_path):
    def make_cycle(config):
        layers = {entry["name"]: entry for entry in config["config"]["layers"]}
        gru = next(entry for entry in layers.values() if entry["class_name"] == "GRU")
        history = gru["inbound_nodes"][0]["args"][0]["config"]["keras_history"]
        history[0] = gru["name"]

    path = with_config(tmp_path / "m.keras", make_cycle, "pair_with_states")
    assert_refused(path, "expected a chain from the input to the output in which every layer occurs once")


def test_mask_with_another_value_raises(tmp_path):
    def other_value(config):
        op = next(e for e in config["config"]["layers"] if e["class_name"] == "NotEqual")
        op["inbound_nodes"][0]["args"][1] = 5.0

    path = with_config(tmp_path / "m.keras", other_value, "pair_with_states")
    assert_refused(path, "its mask argument is not the mask of the Masking or Embedding before it")


def write_bytes(path, data):
    path.write_bytes(data)
    return path


def write_compressed_spaces(path):
    contents = read_members() | {"config.json": " " * (1 << 25)}
    return write_zip(path, contents, zipfile.ZIP_DEFLATED)


def write_duplicate_member(path):
    write_zip(path, read_members())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", b"{}")
    return path


def write_flipped_bit(path):
    data = bytearray((FILES / "lstm_alone.keras").read_bytes())
    data[data.index(b"\x89HDF") + 2000] ^= 1
    path.write_bytes(data)
    return path


INVALID_ARCHIVES = {
    "compressed spaces": (write_compressed_spaces, "the maximum ratio is 100"),
    "duplicate member": (write_duplicate_member, "expected one config.json in the archive, found 2"),
    "a flipped bit": (write_flipped_bit, "damaged"),
    "bzip2": (
        lambda p: write_zip(p, read_members(), zipfile.ZIP_BZIP2),
        "has compression method 12, which Keras does not use",
    ),
    "no weights": (
        lambda p: write_zip(p, {"config.json": read_members()["config.json"]}),
        "expected one model.weights.h5 in the archive, found 0",
    ),
    "no hdf5": (
        lambda p: write_zip(p, read_members() | {"model.weights.h5": b"no" * 999}),
        "damaged, or not a file of Keras",
    ),
    "nothing": (lambda p: write_bytes(p, b"no"), "damaged, or not a file of Keras 3"),
    "a directory": (lambda p: p.mkdir() or p, "is a directory: save the model as one .keras file"),
}


@pytest.mark.parametrize("name", INVALID_ARCHIVES)
def test_invalid_archives_raise(tmp_path, name):
    write, message = INVALID_ARCHIVES[name]
    assert_refused(write(tmp_path / "m.keras"), message)


def test_compressed_archive_is_read(tmp_path):
    write_zip(tmp_path / "m.keras", read_members(), zipfile.ZIP_DEFLATED)
    assert xprnn.from_keras(tmp_path / "m.keras")[0] == xprnn.LSTM(3, 4, bias=False, batch_first=True)


def test_invalid_arguments_and_missing_h5py_raise(tmp_path, monkeypatch):
    weights = FILES / "lstm_stack.weights.h5"
    assert_refused(weights, "contains the weights of dense, dropout, lstm, lstm_1, but not the architecture", "config=")
    assert_refused(weights, "config must be the result of model.to_json()", config=tmp_path / "none.json")
    assert_refused(weights, "expected the architecture of a model", config={"a": 1})
    assert_refused(weights, "config: expected an architecture as JSON", config="{")
    assert_refused(
        FILES / "lstm_alone.keras",
        "the architecture is read from the .keras file: leave config out",
        config=(FILES / "lstm_stack.json").read_text(),
    )
    assert_refused(None, "from_keras: expected a path, found NoneType")
    assert_refused(FILES / "lstm_alone.keras", "like must be an array", like=3)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["model_config"] = "{}"
    assert_refused(tmp_path / "old.h5", "is an .h5 file of Keras 2: load it there and save it as .keras")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert_refused(weights, 'needs h5py: pip install ".[keras]"')


def test_bidirectional_layer_passes_its_mask_on(tmp_path):
    """Without zero_output_for_mask, the LSTM after the Bidirectional gets a HoldLastOutput only if it has a mask."""
    path = with_config(tmp_path / "m.keras", set_option("zero_output_for_mask", False), "masks_go_on")
    classes = [type(layer).__name__ for layer in xprnn.from_keras(path)[0].layers.values()]
    assert classes == ["Masking", "GRU", "MergeDirections", "LSTM", "HoldLastOutput", "Linear", "Softmax"]
