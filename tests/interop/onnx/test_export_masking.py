"""to_onnx of what no single operator says: projections, cells of one's own, masks, held outputs, turned time."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_cases import run_onnxruntime
from support.onnx_layer_models import COMPOSITE_MODELS

import xprnn
from xprnn import ActivationLayer, HoldLastOutput, LastStep, Linear, Masking, MergeDirections, ReverseTime, Sequential
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx")
FLOAT32 = np.zeros(0, np.float32)


each_model = pytest.mark.parametrize("name", COMPOSITE_MODELS)
OF_ONES_OWN = {"own cell", "own activation", "own activation before the product", "last of both ways of anything"}


def trained(rng, model, dtype=np.float32):
    params = model.init(rng, like=np.zeros(0, dtype))
    return {k: (rng.standard_normal(a.shape) * 0.6).astype(dtype) for k, a in params.items()}


def batch_first(model):
    parts = getattr(model, "layers", {"": model}).values()
    return any(getattr(p, "batch_first", False) for p in parts)


def sequence(rng, name, steps, rows, dtype=np.float32):
    """With padding of the kind that the model looks for, one row of nothing else."""
    lead = (rows, steps) if batch_first(COMPOSITE_MODELS[name]) else (steps, rows)
    padding = rng.random(lead) < 0.35
    padding[(0, ...) if lead[0] == rows else (..., 0)] |= rows > 2
    if name == "masked words":
        return np.where(padding, 0, rng.integers(1, 7, lead))
    x = rng.standard_normal((*lead, 3)).astype(dtype)
    x[padding] = np.nan if "nan" in name else 0 if "masked" in name else x[padding]
    return x


def arrays(state):
    """Arrays in nested states, in the order in which to_onnx names them."""
    if isinstance(state, dict):
        return [a for s in state.values() for a in arrays(s)]
    return [a for s in state for a in arrays(s)] if isinstance(state, tuple) else [state]


def like_state(rng, state):
    if isinstance(state, dict):
        return {k: like_state(rng, s) for k, s in state.items()}
    if isinstance(state, tuple):
        return tuple(like_state(rng, s) for s in state)
    return rng.standard_normal(state.shape).astype(state.dtype)


def check(proto, model, params, x, tolerance, **flags):
    """The file's outputs are the model's: y and every final state, in order."""
    y, final = model(params, x, **{k: v for k, v in flags.items() if v is not None})
    given = {"x": x}
    if flags.get("lengths") is not None:
        given["lengths"] = flags["lengths"].astype(np.int32)
    if flags.get("state") is not None:
        names = [i.name for i in proto.graph.input if "initial" in i.name]
        given |= dict(zip(names, arrays(flags["state"]), strict=True))
    found = run_onnxruntime(proto, given)
    for have, want in zip(found.values(), [y, *arrays(final)], strict=True):
        assert have.shape == want.shape
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max(initial=0))))


@pytest.mark.needs("onnxruntime")
@each_model
def test_onnx_runtime_gives_the_same_numbers(rng, name):
    """Alone, ragged, from a state, for sizes that the file was never told."""
    model = COMPOSITE_MODELS[name]
    params = trained(rng, model)
    proto = xprnn.to_onnx(model, params)
    for steps, rows in ((6, 3), (1, 1), (9, 2)):
        x = sequence(rng, name, steps, rows)
        check(proto, model, params, x, 2e-6)
        state = like_state(rng, model(params, x)[1])
        check(proto, model, params, x, 2e-6, lengths=rng.integers(1, steps + 1, rows), state=state)


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize(
    "name", ["projected, both ways", "projected backwards", "projected, of another cell", "own cell"]
)
def test_scans_run_in_float64(rng, name):
    """ONNX Runtime's recurrent operators are float32 alone; a Scan is not, and shows each last place."""
    model = COMPOSITE_MODELS[name]
    params = trained(rng, model, np.float64)
    proto = xprnn.to_onnx(model, params, dtype="float64")
    x = sequence(rng, name, 5, 4, np.float64)
    state = like_state(rng, model(params, x)[1])
    check(proto, model, params, x, 1e-13, lengths=np.asarray([5, 0, 2, 1]), state=state)


@each_model
def test_comes_back_bit_for_bit(rng, name):
    model = COMPOSITE_MODELS[name]
    params = trained(rng, model)
    for options in ({}, {"lengths": False}, {"dtype": "float64"}, {"optional": False}):
        if "optional" in options and any(k.startswith(("initial", "b.initial")) for k in params):
            continue  # a learned state is the value of an input that may be left out
        proto = xprnn.to_onnx(model, params, **options)
        back, found = xprnn.from_onnx(proto)
        if name in OF_ONES_OWN:
            assert isinstance(back, GraphModel)
            continue
        assert back == model or repr(back) == repr(model)  # nan is not itself
        assert list(found) == list(params)
        assert all(np.array_equal(found[k], params[k]) for k in params)
        assert {a.dtype.name for a in found.values()} == {options.get("dtype", "float32")}


@each_model
def test_a_graph_without_our_word_runs_here(rng, name, xp):
    """The operators alone, on every array library: the same numbers."""
    model = COMPOSITE_MODELS[name]
    host = trained(rng, model)
    proto = xprnn.to_onnx(model, host)
    del proto.metadata_props[:]
    back, found = xprnn.from_onnx(proto, like=xp.asarray(FLOAT32))
    x, lengths = sequence(rng, name, 5, 4), np.asarray([5, 1, 2, 4])
    want, want_state = model(host, x, lengths=lengths)
    with xp.allow_host_conversion():
        if isinstance(back, GraphModel):
            y, state = back(found, {"x": xp.asarray(x), "lengths": xp.asarray(lengths.astype(np.int32))})
            for have, final in zip(arrays(state), arrays(want_state), strict=True):
                np.testing.assert_allclose(xp.to_numpy(have), final, rtol=0, atol=2e-6)
        else:
            y, _ = back(found, xp.asarray(x), lengths=lengths)
    np.testing.assert_allclose(xp.to_numpy(y), want, rtol=0, atol=2e-6)


def node_of(proto, op):
    return next(n for n in proto.graph.node if n.op_type == op)


def exclusive(proto):
    """Make another sum of the cumulative one."""
    attribute = node_of(proto, "CumSum").attribute.add()
    attribute.name, attribute.i, attribute.type = "exclusive", 1, 2


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.graph.node.add(op_type="Identity", input=["x"], output=["z"]),
        lambda p: setattr(node_of(p, "Max"), "op_type", "Min"),
        lambda p: setattr(next(t for t in p.graph.initializer if t.name == "float_0.0"), "raw_data", b"\0\0\x80?"),
        exclusive,
    ],
    ids=["a node more", "another operator", "another constant", "another attribute"],
)
def test_a_graph_that_was_changed_is_not_taken_for_the_model(rng, change):
    """Its metadata still says that it is."""
    model = COMPOSITE_MODELS["masked"]
    params = trained(rng, model)
    proto = xprnn.to_onnx(model, params)
    assert xprnn.from_onnx(proto)[0] == model
    change(proto)
    assert isinstance(xprnn.from_onnx(proto)[0], GraphModel)


def test_other_weights_are_the_models(rng):
    """A file whose weights were changed is still one of ours, with these weights."""
    model = COMPOSITE_MODELS["projected"]
    params = trained(rng, model)
    proto = xprnn.to_onnx(model, params)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("weight_hr"))
    changed = np.frombuffer(tensor.raw_data, "<f4") * np.float32(2)
    tensor.raw_data = changed.tobytes()
    back, found = xprnn.from_onnx(proto)
    assert back == model
    np.testing.assert_array_equal(found["weight_hr_l0"], 2 * params["weight_hr_l0"])


@pytest.mark.parametrize(
    "lie",
    [
        '{"type": "LSTM", "input_size": 3, "hidden_size": 4, "proj_size": 2}',
        '{"type": "RNN", "input_size": 3, "hidden_size": 4, "num_layers": 1000000000}',
        '{"type": "RNN", "input_size": 3, "hidden_size": 1000000000}',
        '{"type": "Sequential", "layers": {"a": {"type": "ContextShift", "hidden_size": 2}}}',
        '{"type": "Sequential", "layers": {"a": {"type": "MergeDirections", "hidden_size": 2, "mode": "pair"}}}',
    ],
)
def test_a_lie_beside_a_graph_costs_nothing(rng, lie):
    for model in (xprnn.RNN(3, 4), COMPOSITE_MODELS["projected"]):
        proto = xprnn.to_onnx(model, trained(rng, model))
        proto.metadata_props[0].value = lie
        back, _ = xprnn.from_onnx(proto)
        assert back == model if model == xprnn.RNN(3, 4) else isinstance(back, GraphModel)


def test_names_of_nested_states():
    model = Sequential(low=Sequential(a=xprnn.RNN(3, 4), b=Sequential(c=xprnn.LSTM(4, 4))), head=Linear(4, 2))
    proto = xprnn.to_onnx(model, model.init(np.random.default_rng(0), FLOAT32))
    states = ["low.a.initial_h", "low.b.c.initial_h", "low.b.c.initial_c"]
    assert [i.name for i in proto.graph.input] == ["x", "lengths", *states]
    assert [o.name for o in proto.graph.output] == ["y", *(s.replace("initial", "final") for s in states)]


def drawn(r):
    """A chain of any parts that fit, with a recurrent layer in it."""
    first, width, parts = bool(r.integers(2)), int(r.integers(1, 4)), {}
    time, inputs = {"batch_first": first}, width
    recurrent = int(r.integers(4))
    for k in range(5):
        way = [{}, {"bidirectional": True}, {"reverse": True}][r.integers(3)]
        h = int(r.integers(2, 5))
        if k == recurrent:
            kinds = [xprnn.RNN(width, h, **way, **time), xprnn.GRU(width, h, 2, **way, **time)]
            kinds += [xprnn.LSTM(width, h, proj_size=p, **way, **time) for p in (0, 1)]
        else:
            walk = ("forward", "reverse", "both")[int(r.integers(3 if width % 2 == 0 else 2))]
            kinds = [
                Masking(),
                HoldLastOutput(direction=walk, **time),
                ReverseTime(reverse_mask=bool(r.integers(2)), **time),
                ActivationLayer("softsign"),
            ]
            kinds += [Linear(width, h)] + (
                [Sequential(merge=MergeDirections(width // 2, "ave"))] if width % 2 == 0 else []
            )
            kinds += [LastStep(direction=walk, valid_only=bool(r.integers(2)), **time)] * 2 if k == 4 else []
        part = kinds[r.integers(len(kinds))]
        width = width // 2 if isinstance(part, Sequential) else getattr(part, "output_size", width)
        width = getattr(part, "out_features", width)
        parts[f"p{k}"] = part
    return Sequential(**parts), inputs, first


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("seed", range(60))
def test_any_chain_goes_around(seed):
    """xprnn -> ONNX -> ONNX Runtime and back to xprnn."""
    r = np.random.default_rng(seed)
    model, width, first = drawn(r)
    params = trained(r, model)
    proto = xprnn.to_onnx(model, params)
    steps, rows = (int(k) for k in r.integers(1, 6, 2))
    x = r.standard_normal((rows, steps, width) if first else (steps, rows, width)).astype(np.float32)
    x[r.random(x.shape[:2]) < 0.3] = 0
    check(proto, model, params, x, 2e-6, lengths=r.integers(1, steps + 1, rows))
    back, found = xprnn.from_onnx(proto)
    assert back == model
    assert all(np.array_equal(found[k], params[k]) for k in params)


class Strange(xprnn.layers.base.StatelessLayer):
    """A part of one's own."""


def cumulated(xp):
    return xp.cumulative_sum, lambda y: y


def choosing(xp):
    return lambda v: v if v > 0 else -v, lambda y: y


def test_what_cannot_be_written_is_said_all_at_once(rng):
    model = Sequential(
        a=xprnn.RNN(3, 4, nonlinearity=xprnn.Activation("cumulated", cumulated)),
        b=ActivationLayer(xprnn.Activation("choosing", choosing)),
        c=Strange(),
        d=Sequential(e=xprnn.GRU(4, 4, batch_first=True, bidirectional=True), f=MergeDirections(4, "pair")),
    )
    with pytest.raises(xprnn.InputError) as caught:
        xprnn.to_onnx(model, model.init(rng, like=FLOAT32))
    for reason in (
        "a: the cell 'elman' cannot be written: it uses xp.cumulative_sum, which has no ONNX counterpart",
        "b: ONNX has no operator for the activation 'choosing', and it branches on the value of an array",
        "c: Strange is a user-defined layer",
        'd.f: mode="pair" has two outputs',
        "some layers are batch_first and some are not",
    ):
        assert reason in str(caught.value)
    for parts, reason in (
        (
            {"a": xprnn.RNN(3, 4), "b": LastStep(), "s": Strange(), "c": HoldLastOutput()},
            "c: there is no time axis after b, a LastStep",
        ),
        ({"a": Linear(3, 4)}, "there is no recurrent layer"),
    ):
        model = Sequential(**parts)
        with pytest.raises(xprnn.InputError, match=reason):
            xprnn.to_onnx(model, model.init(rng, like=FLOAT32))
