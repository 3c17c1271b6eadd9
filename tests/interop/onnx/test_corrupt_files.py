"""ONNX files that lie, are damaged, reach outside their folder, or ask for what is not supported: one clear line."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from support.corrupt_files import BOUNDARY_NUMBERS, corrupt_bytes

import xprnn

pytestmark = pytest.mark.needs("onnx")


@pytest.fixture
def good(rng):
    """A small model, its parameters and its ModelProto."""
    model = xprnn.Sequential(rnn=xprnn.LSTM(3, 4, 2, bidirectional=True), head=xprnn.Linear(8, 2))
    params = {k: a.astype(np.float32) for k, a in model.init(rng, like=np.zeros(1)).items()}
    return model, params, xprnn.to_onnx(model, params)


def refused(source, *texts):
    with pytest.raises(xprnn.InputError) as caught:
        xprnn.from_onnx(source)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def test_not_a_model(tmp_path):
    for content in (b"", b"\0" * 9, b"hello, world", b"\xff" * 1000):
        (tmp_path / "bad.onnx").write_bytes(content)
        refused(tmp_path / "bad.onnx", "bad.onnx: damaged, or not an ONNX file")
    refused(tmp_path / "none.onnx", "cannot be read")
    refused(tmp_path, "cannot be read")
    refused(None, "expected a path, found NoneType")


def test_everything_unsupported_is_named_at_once(good):
    from onnx import helper

    proto = good[2]
    proto.graph.node.extend(
        [
            helper.make_node("Conv", ["x", "y"], ["z"], name="filter"),
            helper.make_node("Mystery", ["x"], ["w"], name="whatever", domain="somewhere.else"),
            helper.make_node("ArgMax", ["y"], ["v"], name="best", select_last_index=1),
            helper.make_node("Trilu", ["y"], ["u"], name=""),
        ]
    )
    proto.opset_import.extend([helper.make_opsetid("somewhere.else", 1)])
    count = len(proto.graph.node) - 1
    refused(
        proto,
        "Conv 'filter'",
        "somewhere.else.Mystery 'whatever' is of another domain",
        "ArgMax 'best' has select_last_index=1",
        f"Trilu 'Trilu_{count}'",
    )


def test_opsets(good):
    for version in (6, 29, 1000):
        good[2].opset_import[0].version = version
        refused(good[2])


@pytest.mark.parametrize("dims", [[2**40, 2**40], [-1, 4], [5], [0], [2**62, 2, 2]])
def test_lying_shapes_take_no_memory(good, dims):
    from onnx import TensorProto

    proto = good[2]
    proto.graph.initializer.append(TensorProto(name="liar", data_type=1, dims=dims, raw_data=b"1234"))
    refused(proto, "tensor liar")


def test_types_that_are_no_numbers(good):
    from onnx import TensorProto

    for kind in (0, 8, 14, 999):
        weights = good[2].graph.initializer
        weights.append(TensorProto(name="liar", data_type=kind, dims=[1], raw_data=b"1234"))
        refused(good[2], "tensor liar")
        del weights[-1]


def external(proto, name, **about):
    from onnx import TensorProto

    weight = TensorProto(name=name, data_type=1, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in about.items():
        weight.external_data.add(key=key, value=str(value))
    proto.graph.initializer.append(weight)


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"location": "../secret.bin"}, "only files in the folder of the model are opened"),
        ({"location": "/etc/hostname"}, "only files in the folder of the model are opened"),
        ({"location": "link.bin"}, "only files in the folder of the model are opened"),
        ({"location": "."}, "only files in the folder of the model are opened"),
        ({"location": ""}, "only files in the folder of the model are opened"),
        ({}, "only files in the folder of the model are opened"),
        ({"location": "a\0b"}, "tensor far"),
        ({"location": "far.bin", "offset": -8}, "needs 16 bytes"),
        ({"location": "far.bin", "offset": 2**70}, "needs 16 bytes"),
        ({"location": "far.bin", "length": 2**40}, "needs 16 bytes"),
        ({"location": "far.bin", "length": 8}, "needs 16 bytes"),
        ({"location": "far.bin", "offset": "x"}, "cannot be read"),
        ({"location": "far.bin", "offset": 10}, "needs 16 bytes"),
    ],
)
def test_data_outside_the_folder_is_never_opened(good, tmp_path, about, text):
    (tmp_path / "secret.bin").write_bytes(b"\1" * 64)
    home = tmp_path / "home"
    home.mkdir()
    (home / "link.bin").symlink_to(tmp_path / "secret.bin")
    (home / "far.bin").write_bytes(b"\1" * 20)
    external(good[2], "far", **about)
    (home / "model.onnx").write_bytes(good[2].SerializeToString())
    refused(home / "model.onnx", text)
    refused(good[2], "pass the path of the model")


def test_data_beside_the_model_is_read(good, tmp_path):
    import onnx

    model, params, proto = good
    onnx.save(proto, str(tmp_path / "model.onnx"), save_as_external_data=True, location="far.bin", size_threshold=0)
    assert (tmp_path / "far.bin").stat().st_size > 1000
    back, found = xprnn.from_onnx(tmp_path / "model.onnx")
    assert back == model
    assert all(np.array_equal(a, params[k]) for k, a in found.items())


def test_the_extra_is_named(monkeypatch, good):
    monkeypatch.setitem(sys.modules, "onnx", None)  # an import then fails
    with pytest.raises(xprnn.InputError, match=r'from_onnx: needs onnx: pip install "xprnn\[onnx\]"'):
        xprnn.from_onnx("model.onnx")
    with pytest.raises(xprnn.InputError, match=r'to_onnx: needs onnx: pip install "xprnn\[onnx\]"'):
        xprnn.to_onnx(*good[:2])


def lying(proto, r):
    """A copy with one field in it changed."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    node, weight = r.choice(copy.graph.node), r.choice(copy.graph.initializer)
    value = r.choice(list(copy.graph.input) + list(copy.graph.output))
    whole = [n for n in BOUNDARY_NUMBERS if isinstance(n, int) and abs(n) < 2**63]
    match r.randrange(8):
        case 0:
            weight.dims[:] = [r.choice(whole) for _ in range(r.randrange(4))]
        case 1:
            weight.data_type = r.randrange(20)
        case 2:
            node.op_type = r.choice([n.op_type for n in copy.graph.node] + ["Loop", "If", "Shape", "Gather"])
        case 3 if node.input:
            node.input[r.randrange(len(node.input))] = r.choice([w.name for w in copy.graph.initializer] + ["", "x"])
        case 4 if node.attribute:
            attribute = r.choice(node.attribute)
            attribute.i, attribute.f, attribute.s = r.choice(whole), r.choice([0.0, -1.0, 1e30]), b"sideways"
            attribute.ints[:] = [r.choice(whole) for _ in range(r.randrange(4))]
        case 5:
            value.type.tensor_type.elem_type = r.randrange(20)
        case 6 if value.type.tensor_type.shape.dim:
            r.choice(value.type.tensor_type.shape.dim).dim_value = r.choice(whole)
        case _:
            weight.raw_data = corrupt_bytes(weight.raw_data, r)
    return copy


@pytest.mark.parametrize("kind", ["bytes", "fields"])
def test_fuzzed_files(good, tmp_path, kind):
    """Refused in one line, or read, and then run or refused in one line: nothing else."""
    proto, messages = good[2], []
    content = proto.SerializeToString()
    for seed in range(300):
        r = random.Random(seed)
        bad = corrupt_bytes(content, r) if kind == "bytes" else lying(proto, r).SerializeToString()
        (tmp_path / "bad.onnx").write_bytes(bad)
        try:
            model, params = xprnn.from_onnx(tmp_path / "bad.onnx", like=np.zeros(1, np.float32))
            with np.errstate(all="ignore"):  # flipped bits make numbers of any size
                model(params, np.zeros((2, 1, 3), np.float32))
        except xprnn.InputError as error:
            messages.append(str(error))
    assert not [m for m in messages if "\n" in m or len(m) > 5000]
    assert 10 < len(messages) < 290
