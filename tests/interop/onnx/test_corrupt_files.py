"""ONNX files that are corrupt, contradict themselves, refer to files elsewhere or are unsupported: one-line errors."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from support.corrupt_files import BOUNDARY_NUMBERS, corrupt_bytes

import xprnn

pytestmark = pytest.mark.needs("onnx")


@pytest.fixture
def valid(rng):
    """A small model, its parameters and its ModelProto."""
    model = xprnn.Sequential(rnn=xprnn.LSTM(3, 4, 2, bidirectional=True), head=xprnn.Linear(8, 2))
    params = {k: a.astype(np.float32) for k, a in model.init(rng, like=np.zeros(1)).items()}
    return model, params, xprnn.to_onnx(model, params)


def assert_rejected(source, *texts):
    """from_onnx raises an InputError of one line that contains all texts."""
    with pytest.raises(xprnn.InputError) as caught:
        xprnn.from_onnx(source)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def test_files_that_are_not_onnx_raise(tmp_path):
    for content in (b"", b"\0" * 9, b"hello, world", b"\xff" * 1000):
        (tmp_path / "bad.onnx").write_bytes(content)
        assert_rejected(tmp_path / "bad.onnx", "bad.onnx: damaged, or not an ONNX file")
    assert_rejected(tmp_path / "none.onnx", "cannot be read")
    assert_rejected(tmp_path, "cannot be read")
    assert_rejected(None, "expected a path, found NoneType")


def test_error_names_everything_unsupported(valid):
    from onnx import helper

    proto = valid[2]
    proto.graph.node.extend(
        [
            helper.make_node("Conv", ["x", "y"], ["z"], name="conv"),
            helper.make_node("Custom", ["x"], ["w"], name="custom", domain="com.example"),
            helper.make_node("ArgMax", ["y"], ["v"], name="argmax", select_last_index=1),
            helper.make_node("Trilu", ["y"], ["u"], name=""),
        ]
    )
    proto.opset_import.extend([helper.make_opsetid("com.example", 1)])
    count = len(proto.graph.node) - 1
    assert_rejected(
        proto,
        "Conv 'conv'",
        "com.example.Custom 'custom' is of another domain",
        "ArgMax 'argmax' has select_last_index=1",
        f"Trilu 'Trilu_{count}'",
    )


def test_unsupported_opsets_raise(valid):
    for version in (6, 29, 1000):
        valid[2].opset_import[0].version = version
        assert_rejected(valid[2])


@pytest.mark.parametrize("dims", [[2**40, 2**40], [-1, 4], [5], [0], [2**62, 2, 2]])
def test_shape_that_does_not_fit_data_raises(valid, dims):
    from onnx import TensorProto

    proto = valid[2]
    proto.graph.initializer.append(TensorProto(name="weight", data_type=1, dims=dims, raw_data=b"1234"))
    assert_rejected(proto, "tensor weight")


def test_non_numeric_types_raise(valid):
    from onnx import TensorProto

    for kind in (0, 8, 14, 999):
        weights = valid[2].graph.initializer
        weights.append(TensorProto(name="weight", data_type=kind, dims=[1], raw_data=b"1234"))
        assert_rejected(valid[2], "tensor weight")
        del weights[-1]


def add_external_tensor(proto, name, **entries):
    from onnx import TensorProto

    weight = TensorProto(name=name, data_type=1, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        weight.external_data.add(key=key, value=str(value))
    proto.graph.initializer.append(weight)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"location": "../secret.bin"}, "only files in the folder of the model are opened"),
        ({"location": "/etc/hostname"}, "only files in the folder of the model are opened"),
        ({"location": "link.bin"}, "only files in the folder of the model are opened"),
        ({"location": "."}, "only files in the folder of the model are opened"),
        ({"location": ""}, "only files in the folder of the model are opened"),
        ({}, "only files in the folder of the model are opened"),
        ({"location": "a\0b"}, "tensor external"),
        ({"location": "external.bin", "offset": -8}, "needs 16 bytes"),
        ({"location": "external.bin", "offset": 2**70}, "needs 16 bytes"),
        ({"location": "external.bin", "length": 2**40}, "needs 16 bytes"),
        ({"location": "external.bin", "length": 8}, "needs 16 bytes"),
        ({"location": "external.bin", "offset": "x"}, "cannot be read"),
        ({"location": "external.bin", "offset": 10}, "needs 16 bytes"),
    ],
)
def test_external_data_outside_folder_is_not_opened(valid, tmp_path, entries, text):
    (tmp_path / "secret.bin").write_bytes(b"\1" * 64)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "external.bin").write_bytes(b"\1" * 20)
    add_external_tensor(valid[2], "external", **entries)
    (folder / "model.onnx").write_bytes(valid[2].SerializeToString())
    assert_rejected(folder / "model.onnx", text)
    assert_rejected(valid[2], "pass the path of the model")


def test_external_data_in_folder_is_read(valid, tmp_path):
    import onnx

    model, params, proto = valid
    onnx.save(
        proto, str(tmp_path / "model.onnx"), save_as_external_data=True, location="external.bin", size_threshold=0
    )
    assert (tmp_path / "external.bin").stat().st_size > 1000
    loaded_model, loaded = xprnn.from_onnx(tmp_path / "model.onnx")
    assert loaded_model == model
    assert all(np.array_equal(a, params[k]) for k, a in loaded.items())


def test_error_names_missing_extra(monkeypatch, valid):
    monkeypatch.setitem(sys.modules, "onnx", None)  # makes `import onnx` fail
    with pytest.raises(xprnn.InputError, match=r'from_onnx: needs onnx: pip install "\.\[onnx\]"'):
        xprnn.from_onnx("model.onnx")
    with pytest.raises(xprnn.InputError, match=r'to_onnx: needs onnx: pip install "\.\[onnx\]"'):
        xprnn.to_onnx(*valid[:2])


def with_random_change(proto, r):
    """A copy of a ModelProto with one field changed."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    node, weight = r.choice(copy.graph.node), r.choice(copy.graph.initializer)
    value = r.choice(list(copy.graph.input) + list(copy.graph.output))
    integers = [n for n in BOUNDARY_NUMBERS if isinstance(n, int) and abs(n) < 2**63]
    match r.randrange(8):
        case 0:
            weight.dims[:] = [r.choice(integers) for _ in range(r.randrange(4))]
        case 1:
            weight.data_type = r.randrange(20)
        case 2:
            node.op_type = r.choice([n.op_type for n in copy.graph.node] + ["Loop", "If", "Shape", "Gather"])
        case 3 if node.input:
            node.input[r.randrange(len(node.input))] = r.choice([w.name for w in copy.graph.initializer] + ["", "x"])
        case 4 if node.attribute:
            attribute = r.choice(node.attribute)
            attribute.i, attribute.f, attribute.s = r.choice(integers), r.choice([0.0, -1.0, 1e30]), b"sideways"
            attribute.ints[:] = [r.choice(integers) for _ in range(r.randrange(4))]
        case 5:
            value.type.tensor_type.elem_type = r.randrange(20)
        case 6 if value.type.tensor_type.shape.dim:
            r.choice(value.type.tensor_type.shape.dim).dim_value = r.choice(integers)
        case _:
            weight.raw_data = corrupt_bytes(weight.raw_data, r)
    return copy


@pytest.mark.parametrize("kind", ["bytes", "fields"])
def test_corrupted_files_are_read_or_raise_one_line(valid, tmp_path, kind):
    """Reading and running either succeed or raise an InputError of one line."""
    proto, messages = valid[2], []
    content = proto.SerializeToString()
    for seed in range(300):
        r = random.Random(seed)
        corrupted = corrupt_bytes(content, r) if kind == "bytes" else with_random_change(proto, r).SerializeToString()
        (tmp_path / "bad.onnx").write_bytes(corrupted)
        try:
            model, params = xprnn.from_onnx(tmp_path / "bad.onnx", like=np.zeros(1, np.float32))
            with np.errstate(all="ignore"):  # flipped bits make huge weights
                model(params, np.zeros((2, 1, 3), np.float32))
        except xprnn.InputError as error:
            messages.append(str(error))
    assert not [m for m in messages if "\n" in m or len(m) > 5000]
    assert 10 < len(messages) < 290
