"""to_onnx of models beyond RNN, LSTM and GRU: projections, user-defined cells, masks, held outputs, reversed time."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_cases import is_batch_first, random_params, run_onnxruntime
from support.onnx_layer_models import COMPOSITE_MODELS

import xprnn
from xprnn import ActivationLayer, HoldLastOutput, LastStep, Linear, Masking, MergeDirections, ReverseTime, Sequential
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx")
FLOAT32 = np.zeros(0, np.float32)
each_model = pytest.mark.parametrize("name", COMPOSITE_MODELS)
USER_DEFINED = {
    "user-defined cell",
    "user-defined activation",
    "user-defined activation, gru reset before",
    "last step of activation",
}


def random_input(rng, name, steps, rows, dtype=np.float32):
    """x with steps that the Masking layer of the model detects; with three rows or more, all of row 0 is masked."""
    lead = (rows, steps) if is_batch_first(COMPOSITE_MODELS[name]) else (steps, rows)
    padding = rng.random(lead) < 0.35
    padding[(0, ...) if lead[0] == rows else (..., 0)] |= rows > 2
    if name == "masked ids":
        return np.where(padding, 0, rng.integers(1, 7, lead))
    x = rng.standard_normal((*lead, 3)).astype(dtype)
    x[padding] = np.nan if "nan" in name else 0 if "masked" in name else x[padding]
    return x


def state_arrays(state):
    """The arrays of a nested state, in the order of the outputs that to_onnx writes."""
    if isinstance(state, dict):
        return [a for s in state.values() for a in state_arrays(s)]
    return [a for s in state for a in state_arrays(s)] if isinstance(state, tuple) else [state]


def random_state_like(rng, state):
    if isinstance(state, dict):
        return {k: random_state_like(rng, s) for k, s in state.items()}
    if isinstance(state, tuple):
        return tuple(random_state_like(rng, s) for s in state)
    return rng.standard_normal(state.shape).astype(state.dtype)


def assert_onnx_runtime_agrees(proto, model, params, x, tolerance, **options):
    """ONNX Runtime returns the y and the final states of the model; options: lengths, state."""
    y, final = model(params, x, **options)
    inputs = {"x": x}
    if "lengths" in options:
        inputs["lengths"] = options["lengths"].astype(np.int32)
    if "state" in options:
        names = [i.name for i in proto.graph.input if "initial" in i.name]
        inputs |= dict(zip(names, state_arrays(options["state"]), strict=True))
    outputs = run_onnxruntime(proto, inputs)
    for found, expected in zip(outputs.values(), [y, *state_arrays(final)], strict=True):
        assert found.shape == expected.shape
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.needs("onnxruntime")
@each_model
def test_onnx_runtime_agrees(rng, name):
    """For several T and N; first with x alone, then with lengths and initial states."""
    model = COMPOSITE_MODELS[name]
    params = random_params(rng, model)
    proto = xprnn.to_onnx(model, params)
    for steps, rows in ((6, 3), (1, 1), (9, 2)):
        x = random_input(rng, name, steps, rows)
        assert_onnx_runtime_agrees(proto, model, params, x, 2e-6)
        state = random_state_like(rng, model(params, x)[1])
        lengths = rng.integers(1, steps + 1, rows)
        assert_onnx_runtime_agrees(proto, model, params, x, 2e-6, lengths=lengths, state=state)


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize(
    "name", ["projected, bidirectional", "projected, reverse", "projected, peephole cell", "user-defined cell"]
)
def test_scan_agrees_in_float64(rng, name):
    """ONNX Runtime has no float64 recurrent operators, but a Scan runs in float64, with a tolerance of 1e-13."""
    model = COMPOSITE_MODELS[name]
    params = random_params(rng, model, np.float64)
    proto = xprnn.to_onnx(model, params, dtype="float64")
    x = random_input(rng, name, 5, 4, np.float64)
    state = random_state_like(rng, model(params, x)[1])
    lengths = np.asarray([5, 0, 2, 1])
    assert_onnx_runtime_agrees(proto, model, params, x, 1e-13, lengths=lengths, state=state)


@each_model
def test_from_onnx_returns_equal_model_and_bits(rng, name):
    model = COMPOSITE_MODELS[name]
    params = random_params(rng, model)
    for options in ({}, {"lengths": False}, {"dtype": "float64"}, {"optional": False}):
        if "optional" in options and any(k.startswith(("initial", "b.initial")) for k in params):
            continue  # a learned state is the default value of an optional input
        proto = xprnn.to_onnx(model, params, **options)
        loaded_model, loaded = xprnn.from_onnx(proto)
        if name in USER_DEFINED:
            assert isinstance(loaded_model, GraphModel)
            continue
        assert loaded_model == model or repr(loaded_model) == repr(model)  # NaN is not equal to itself
        assert list(loaded) == list(params)
        assert all(np.array_equal(loaded[k], params[k]) for k in params)
        assert {a.dtype.name for a in loaded.values()} == {options.get("dtype", "float32")}


@each_model
def test_graph_without_metadata_computes_the_same(rng, name, xp):
    model = COMPOSITE_MODELS[name]
    params = random_params(rng, model)
    proto = xprnn.to_onnx(model, params)
    del proto.metadata_props[:]
    loaded_model, loaded = xprnn.from_onnx(proto, like=xp.asarray(FLOAT32))
    x, lengths = random_input(rng, name, 5, 4), np.asarray([5, 1, 2, 4])
    expected, expected_state = model(params, x, lengths=lengths)
    with xp.allow_host_conversion():
        if isinstance(loaded_model, GraphModel):
            y, state = loaded_model(loaded, {"x": xp.asarray(x), "lengths": xp.asarray(lengths.astype(np.int32))})
            for a, b in zip(state_arrays(state), state_arrays(expected_state), strict=True):
                np.testing.assert_allclose(xp.to_numpy(a), b, rtol=0, atol=2e-6)
        else:
            y, _ = loaded_model(loaded, xp.asarray(x), lengths=lengths)
    np.testing.assert_allclose(xp.to_numpy(y), expected, rtol=0, atol=2e-6)


def first_node(proto, op):
    return next(n for n in proto.graph.node if n.op_type == op)


def make_cumsum_exclusive(proto):
    attribute = first_node(proto, "CumSum").attribute.add()
    attribute.name, attribute.i, attribute.type = "exclusive", 1, 2


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.graph.node.add(op_type="Identity", input=["x"], output=["z"]),
        lambda p: setattr(first_node(p, "Max"), "op_type", "Min"),
        lambda p: setattr(next(t for t in p.graph.initializer if t.name == "float_0.0"), "raw_data", b"\0\0\x80?"),
        make_cumsum_exclusive,
    ],
    ids=["added node", "changed operator", "changed constant", "added attribute"],
)
def test_changed_graph_becomes_graph_model(rng, change):
    """The metadata still describes the model that was exported."""
    model = COMPOSITE_MODELS["masked"]
    params = random_params(rng, model)
    proto = xprnn.to_onnx(model, params)
    assert xprnn.from_onnx(proto)[0] == model
    change(proto)
    assert isinstance(xprnn.from_onnx(proto)[0], GraphModel)


def test_changed_weights_are_read(rng):
    """A file with changed weights is still read as the model."""
    model = COMPOSITE_MODELS["projected"]
    params = random_params(rng, model)
    proto = xprnn.to_onnx(model, params)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("weight_hr"))
    changed = np.frombuffer(tensor.raw_data, "<f4") * np.float32(2)
    tensor.raw_data = changed.tobytes()
    loaded_model, loaded = xprnn.from_onnx(proto)
    assert loaded_model == model
    np.testing.assert_array_equal(loaded["weight_hr_l0"], 2 * params["weight_hr_l0"])


@pytest.mark.parametrize(
    "metadata",
    [
        '{"type": "LSTM", "input_size": 3, "hidden_size": 4, "proj_size": 2}',
        '{"type": "RNN", "input_size": 3, "hidden_size": 4, "num_layers": 1000000000}',
        '{"type": "RNN", "input_size": 3, "hidden_size": 1000000000}',
        '{"type": "Sequential", "layers": {"a": {"type": "ContextShift", "hidden_size": 2}}}',
        '{"type": "Sequential", "layers": {"a": {"type": "MergeDirections", "hidden_size": 2, "mode": "pair"}}}',
    ],
)
def test_false_metadata_is_rejected_without_large_allocation(rng, metadata):
    for model in (xprnn.RNN(3, 4), COMPOSITE_MODELS["projected"]):
        proto = xprnn.to_onnx(model, random_params(rng, model))
        proto.metadata_props[0].value = metadata
        loaded_model, _ = xprnn.from_onnx(proto)
        assert loaded_model == model if model == xprnn.RNN(3, 4) else isinstance(loaded_model, GraphModel)


def test_state_names_of_nested_sequentials():
    model = Sequential(low=Sequential(a=xprnn.RNN(3, 4), b=Sequential(c=xprnn.LSTM(4, 4))), head=Linear(4, 2))
    proto = xprnn.to_onnx(model, model.init(np.random.default_rng(0), FLOAT32))
    states = ["low.a.initial_h", "low.b.c.initial_h", "low.b.c.initial_c"]
    assert [i.name for i in proto.graph.input] == ["x", "lengths", *states]
    assert [o.name for o in proto.graph.output] == ["y", *(s.replace("initial", "final") for s in states)]


def random_sequential(r):
    """A Sequential of five random layers, one of them recurrent; its input size; and batch_first."""
    first, width, layers = bool(r.integers(2)), int(r.integers(1, 4)), {}
    time, input_size = {"batch_first": first}, width
    recurrent = int(r.integers(4))
    for k in range(5):
        direction = [{}, {"bidirectional": True}, {"reverse": True}][r.integers(3)]
        h = int(r.integers(2, 5))
        if k == recurrent:
            kinds = [xprnn.RNN(width, h, **direction, **time), xprnn.GRU(width, h, 2, **direction, **time)]
            kinds += [xprnn.LSTM(width, h, proj_size=p, **direction, **time) for p in (0, 1)]
        else:
            side = ("forward", "reverse", "both")[int(r.integers(3 if width % 2 == 0 else 2))]
            kinds = [
                Masking(),
                HoldLastOutput(direction=side, **time),
                ReverseTime(reverse_mask=bool(r.integers(2)), **time),
                ActivationLayer("softsign"),
            ]
            kinds += [Linear(width, h)] + (
                [Sequential(merge=MergeDirections(width // 2, "ave"))] if width % 2 == 0 else []
            )
            kinds += [LastStep(direction=side, valid_only=bool(r.integers(2)), **time)] * 2 if k == 4 else []
        layer = kinds[r.integers(len(kinds))]
        width = width // 2 if isinstance(layer, Sequential) else getattr(layer, "output_size", width)
        width = getattr(layer, "out_features", width)
        layers[f"p{k}"] = layer
    return Sequential(**layers), input_size, first


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("seed", range(60))
def test_random_sequential_round_trip(seed):
    """ONNX Runtime agrees, and from_onnx returns the same model with the same bits."""
    r = np.random.default_rng(seed)
    model, width, first = random_sequential(r)
    params = random_params(r, model)
    proto = xprnn.to_onnx(model, params)
    steps, rows = (int(k) for k in r.integers(1, 6, 2))
    x = r.standard_normal((rows, steps, width) if first else (steps, rows, width)).astype(np.float32)
    x[r.random(x.shape[:2]) < 0.3] = 0
    assert_onnx_runtime_agrees(proto, model, params, x, 2e-6, lengths=r.integers(1, steps + 1, rows))
    loaded_model, loaded = xprnn.from_onnx(proto)
    assert loaded_model == model
    assert all(np.array_equal(loaded[k], params[k]) for k in params)


class UserLayer(xprnn.layers.base.StatelessLayer):
    """A user-defined layer."""


def cumulative_sum(xp):
    return xp.cumulative_sum, lambda y: y


def branching(xp):
    return lambda v: v if v > 0 else -v, lambda y: y


def test_error_lists_everything_that_cannot_be_written(rng):
    model = Sequential(
        a=xprnn.RNN(3, 4, nonlinearity=xprnn.Activation("cumulative", cumulative_sum)),
        b=ActivationLayer(xprnn.Activation("branching", branching)),
        c=UserLayer(),
        d=Sequential(e=xprnn.GRU(4, 4, batch_first=True, bidirectional=True), f=MergeDirections(4, "pair")),
    )
    with pytest.raises(xprnn.InputError) as caught:
        xprnn.to_onnx(model, model.init(rng, like=FLOAT32))
    for reason in (
        "a: the cell 'elman' cannot be written: it uses xp.cumulative_sum, which has no ONNX counterpart",
        "b: ONNX has no operator for the activation 'branching', and it branches on the value of an array",
        "c: UserLayer is a user-defined layer",
        'd.f: mode="pair" has two outputs',
        "some layers are batch_first and some are not",
    ):
        assert reason in str(caught.value)
    for layers, reason in (
        (
            {"a": xprnn.RNN(3, 4), "b": LastStep(), "s": UserLayer(), "c": HoldLastOutput()},
            "c: there is no time axis after b, a LastStep",
        ),
        ({"a": Linear(3, 4)}, "there is no recurrent layer"),
    ):
        model = Sequential(**layers)
        with pytest.raises(xprnn.InputError, match=reason):
            xprnn.to_onnx(model, model.init(rng, like=FLOAT32))
