"""to_onnx: ONNX Runtime gives the same numbers, states stream, and from_onnx brings the same model back."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_cases import run_onnxruntime
from support.onnx_models import OPERATOR_MODELS

import xprnn

pytestmark = pytest.mark.needs("onnx")
# Time-major, and walked forward.
STREAMS = [
    "rnn",
    "elu",
    "clipped",
    "lstm",
    "coupled",
    "gru",
    "gru of one's own",
    "with a head",
    "of many parts",
    "bent",
]
each_model = pytest.mark.parametrize("model", OPERATOR_MODELS.values(), ids=OPERATOR_MODELS)


def trained(rng, model, like):
    """Parameters none of which is special."""
    params = model.init(rng, like=like)
    return {k: (rng.standard_normal(a.shape) * 0.6).astype(a.dtype) for k, a in params.items()}


def batch_first(model):
    parts = getattr(model, "layers", {"": model}).values()
    return any(getattr(p, "batch_first", False) for p in parts)


def sequence(rng, model, steps, rows):
    lead = (rows, steps) if batch_first(model) else (steps, rows)
    if "words" in getattr(model, "layers", {}):
        return rng.integers(0, 7, lead)
    return rng.standard_normal((*lead, 3)).astype(np.float32)


def leaves(state):
    """Arrays in nested states, under the names that to_onnx gives them."""
    if isinstance(state, dict):
        return {f"{part}.{k}": a for part, s in state.items() for k, a in leaves(s).items()}
    pair = state if isinstance(state, tuple) and not is_sizes(state) else (state,)
    out = {}
    for letter, s in zip("hc", pair, strict=False):
        out |= {letter: s} if not isinstance(s, tuple) else {f"{letter}_l{k}": a for k, a in enumerate(s)}
    return out


def is_sizes(state):
    """Whether a tuple is one state of several sizes, not the pair of an LSTM."""
    return all(not isinstance(s, tuple) for s in state) and len({s.shape[-1] for s in state}) > 1


def renamed(state, what):
    out = {}
    for name, a in leaves(state).items():
        part, dot, letter = name.rpartition(".")
        out[f"{part}{dot}{what}_{letter}"] = a
    return out


def close(got, y, state):
    wanted = {"y": y, **renamed(state, "final")}
    assert wanted.keys() == got.keys()
    for name, a in wanted.items():
        near(got[name], a)


def near(have, want):
    """1e-6, of the largest number where the activations have no bound."""
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-6 * max(1.0, float(np.abs(want).max())))


@pytest.mark.needs("onnxruntime")
@each_model
def test_onnx_runtime_gives_the_same_numbers(rng, model, tmp_path):
    """Alone, from a state, ragged, and for other T and N than those it was never told."""
    params = trained(rng, model, np.zeros(1, np.float32))
    path = tmp_path / "model.onnx"
    xprnn.to_onnx(model, params, path)
    for steps, rows in ((6, 3), (1, 1), (9, 2)):
        x = sequence(rng, model, steps, rows)
        y, state = model(params, x)
        close(run_onnxruntime(str(path), {"x": x}), y, state)
        lengths = rng.integers(1, steps + 1, rows)
        y, state = model(params, x, state, lengths=lengths)
        given = {"x": x, "lengths": lengths.astype(np.int32), **renamed(model(params, x)[1], "initial")}
        close(run_onnxruntime(str(path), given), y, state)


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("name", STREAMS)
def test_states_stream(rng, name):
    """Chunks, each from the final state before it, are the whole."""
    model = OPERATOR_MODELS[name]
    params = trained(rng, model, np.zeros(1, np.float32))
    x = sequence(rng, model, 7, 2)
    want, _ = model(params, x)
    content, state, got = xprnn.to_onnx(model, params).SerializeToString(), {}, []
    for a, b in ((0, 3), (3, 4), (4, 7)):
        out = run_onnxruntime(content, {"x": x[a:b], **state})
        got.append(out.pop("y"))
        state = {k.replace("final", "initial"): v for k, v in out.items()}
    near(np.concatenate(got), want)


@each_model
@pytest.mark.parametrize("told", [True, False], ids=["told", "from the graph alone"])
def test_comes_back_bit_for_bit(rng, model, told):
    params = trained(rng, model, np.zeros(1, np.float32))
    proto = xprnn.to_onnx(model, params)
    if not told:
        del proto.metadata_props[:]  # names of parts, dropout
    back, found = xprnn.from_onnx(proto)
    if told:
        assert repr(back) == repr(model) or back == model
        assert found.keys() == params.keys()
        assert all(np.array_equal(found[k], params[k]) for k in params)
    x = sequence(rng, model, 5, 3)
    np.testing.assert_array_equal(back(found, x, lengths=[5, 0, 2])[0], model(params, x, lengths=[5, 0, 2])[0])
    y, _, tape = back.forward(found, x)
    mine, _, own_tape = model.forward(params, x)
    grads, want = back.backward(tape, y).dparams, model.backward(own_tape, mine).dparams
    for a, b in zip(sorted(grads.values(), key=norm), sorted(want.values(), key=norm), strict=False):
        if told or grads.keys() == want.keys():
            np.testing.assert_array_equal(a, b)


def drawn(r):
    """A recurrent layer of any configuration, perhaps with a head."""
    options = {k: bool(r.integers(2)) for k in ("bias", "batch_first", "learned_state")}
    options |= [{}, {"bidirectional": True}, {"reverse": True}][r.integers(3)]
    layers, width = (int(k) for k in r.integers(1, 4, 2))
    hidden = tuple(int(k) for k in r.integers(1, 4, layers)) if layers > 1 and r.integers(2) else int(r.integers(1, 4))
    kind = (xprnn.RNN, xprnn.LSTM, xprnn.GRU)[r.integers(3)]
    special = {xprnn.RNN: {"nonlinearity": "relu"}, xprnn.GRU: {"reset_after": False}}.get(kind, {})
    layer = kind(width, hidden, layers, **options, **(special if r.integers(2) else {}))
    if r.integers(2):
        return xprnn.Sequential(net=layer, head=xprnn.Linear(layer.output_size, 2, bool(r.integers(2)))), width
    return layer, width


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("seed", range(40))
def test_any_model_goes_around(seed):
    """xprnn -> ONNX -> ONNX Runtime, and back to xprnn, with and without our own word for what it is."""
    r = np.random.default_rng(seed)
    model, width = drawn(r)
    params = trained(r, model, np.zeros(1, np.float32))
    steps, rows = (int(k) for k in r.integers(1, 5, 2))
    lead = (rows, steps) if batch_first(model) else (steps, rows)
    x, lengths = r.standard_normal((*lead, width)).astype(np.float32), r.integers(1, steps + 1, rows)
    y, _ = model(params, x, lengths=lengths)
    proto = xprnn.to_onnx(model, params)
    near(run_onnxruntime(proto, {"x": x, "lengths": lengths.astype(np.int32)})["y"], y)
    assert xprnn.from_onnx(proto)[0] == model
    del proto.metadata_props[:]
    back, found = xprnn.from_onnx(proto)
    np.testing.assert_array_equal(back(found, x, lengths=lengths)[0], y)


def norm(a):
    return float(np.sum(a.astype(np.float64) ** 2))


def test_wrong_metadata_is_not_believed(rng):
    model = xprnn.GRU(3, 4)
    params = trained(rng, model, np.zeros(1, np.float32))
    proto = xprnn.to_onnx(model, params)
    for lie in ('{"type": "LSTM", "input_size": 3, "hidden_size": 4}', "[[[", '{"type": 3}', "9" * 5000):
        proto.metadata_props[0].value = lie
        back, found = xprnn.from_onnx(proto)
        assert back == model
        np.testing.assert_array_equal(found["weight_hh_l0"], params["weight_hh_l0"])


def test_from_any_array_library(xp):
    model = xprnn.LSTM(3, 4)
    rng = np.random.default_rng(1)
    params = trained(rng, model, np.zeros(1, np.float32))
    with xp.allow_host_conversion():
        proto = xprnn.to_onnx(model, xp.asarray(params))
    back, found = xprnn.from_onnx(proto, like=xp.asarray(np.zeros(1, np.float32)))
    assert back == model
    xp.assert_close(found, params, condition=0)


def test_float64_stays_float64(rng):
    model = xprnn.GRU(3, 4, 2)
    params = trained(rng, model, np.zeros(1))
    back, found = xprnn.from_onnx(xprnn.to_onnx(model, params, dtype="float64"))
    assert back == model
    assert all(a.dtype == np.float64 and np.array_equal(a, params[k]) for k, a in found.items())


@pytest.mark.needs("onnxruntime")
def test_inputs_may_be_required(rng):
    model = xprnn.LSTM(3, 4)
    params = trained(rng, model, np.zeros(1, np.float32))
    proto = xprnn.to_onnx(model, params, optional=False)
    assert [i.name for i in proto.graph.input] == ["x", "lengths", "initial_h", "initial_c"]
    assert not {i.name for i in proto.graph.input} & {t.name for t in proto.graph.initializer}
    x, state = sequence(rng, model, 4, 2), (np.ones((1, 2, 4), np.float32), np.zeros((1, 2, 4), np.float32))
    y, final = model(params, x, state, lengths=[4, 1])
    given = {"x": x, "lengths": np.asarray([4, 1], np.int32), **renamed(state, "initial")}
    close(run_onnxruntime(proto, given), y, final)
    assert xprnn.from_onnx(proto)[0] == model
    without = xprnn.to_onnx(model, params, lengths=False)
    assert "lengths" not in {i.name for i in without.graph.input}
    close(run_onnxruntime(without, {"x": x}), *model(params, x))


def test_bad_arguments(rng, tmp_path):
    model = xprnn.RNN(3, 4)
    params = trained(rng, model, np.zeros(1, np.float32))
    with pytest.raises(xprnn.InputError, match="missing bias_hh_l0"):
        xprnn.to_onnx(model, {k: a for k, a in params.items() if k != "bias_hh_l0"})
    with pytest.raises(xprnn.InputError, match="dtype must be float32 or float64, found 'float16'"):
        xprnn.to_onnx(model, params, dtype="float16")
    with pytest.raises(xprnn.InputError, match="model must be a layer or Sequential, found int"):
        xprnn.to_onnx(3, params)
    with pytest.raises(xprnn.InputError, match="cannot be written"):
        xprnn.to_onnx(model, params, tmp_path / "nowhere" / "model.onnx")
    for name, found in (("model.txt", r"\.txt"), ("model.safetensors", r"\.safetensors"), ("model", "no ending")):
        with pytest.raises(xprnn.InputError, match=f"{name}: expected a name ending in .onnx, found {found}"):
            xprnn.to_onnx(model, params, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    learned = xprnn.RNN(3, 4, learned_state=True)
    params = trained(rng, learned, np.zeros(1, np.float32))
    with pytest.raises(xprnn.InputError, match="learned_state"):
        xprnn.to_onnx(learned, params, optional=False)
