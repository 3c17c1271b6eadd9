"""to_onnx of models that RNN, LSTM and GRU express: ONNX Runtime agrees, and from_onnx returns the same model."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_cases import is_batch_first, random_params, run_onnxruntime
from support.onnx_models import OPERATOR_MODELS

import xprnn

pytestmark = pytest.mark.needs("onnx")
# Time-major models without a reverse direction, which can run in chunks.
STREAMABLE = [
    "rnn",
    "elu",
    "clipped",
    "lstm",
    "lstm, coupled",
    "gru",
    "gru with other activations",
    "with linear",
    "several recurrent layers",
    "with activations",
]
each_model = pytest.mark.parametrize("model", OPERATOR_MODELS.values(), ids=OPERATOR_MODELS)


def random_input(rng, model, steps, rows):
    lead = (rows, steps) if is_batch_first(model) else (steps, rows)
    if "ids" in getattr(model, "layers", {}):
        return rng.integers(0, 7, lead)
    return rng.standard_normal((*lead, 3)).astype(np.float32)


def flatten_state(state):
    """The arrays of a nested state, by the suffixes of the names that to_onnx gives them: "h", "c_l0", "part.h"."""
    if isinstance(state, dict):
        return {f"{part}.{k}": a for part, s in state.items() for k, a in flatten_state(s).items()}
    states = state if isinstance(state, tuple) and not is_one_state(state) else (state,)
    out = {}
    for letter, s in zip("hc", states, strict=False):
        out |= {letter: s} if not isinstance(s, tuple) else {f"{letter}_l{k}": a for k, a in enumerate(s)}
    return out


def is_one_state(state):
    """True if a tuple is h of layers with several hidden sizes, not (h, c) of an LSTM."""
    return all(not isinstance(s, tuple) for s in state) and len({s.shape[-1] for s in state}) > 1


def state_values(state, prefix):
    """The arrays of a nested state by their names in the ONNX model; the prefix is "initial" or "final"."""
    out = {}
    for name, a in flatten_state(state).items():
        part, dot, suffix = name.rpartition(".")
        out[f"{part}{dot}{prefix}_{suffix}"] = a
    return out


def assert_outputs_close(found, y, state):
    expected = {"y": y, **state_values(state, "final")}
    assert expected.keys() == found.keys()
    for name, a in expected.items():
        assert_close(found[name], a)


def assert_close(found, expected):
    """The tolerance is 1e-6 of the largest absolute value, since some activations are unbounded, and at least 1e-6."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.needs("onnxruntime")
@each_model
def test_onnx_runtime_agrees(rng, model, tmp_path):
    """For several T and N; first with x alone, then with lengths and initial states."""
    params = random_params(rng, model)
    path = tmp_path / "model.onnx"
    xprnn.to_onnx(model, params, path)
    for steps, rows in ((6, 3), (1, 1), (9, 2)):
        x = random_input(rng, model, steps, rows)
        y, state = model(params, x)
        assert_outputs_close(run_onnxruntime(str(path), {"x": x}), y, state)
        lengths = rng.integers(1, steps + 1, rows)
        inputs = {"x": x, "lengths": lengths.astype(np.int32), **state_values(state, "initial")}
        y, state = model(params, x, state, lengths=lengths)
        assert_outputs_close(run_onnxruntime(str(path), inputs), y, state)


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("name", STREAMABLE)
def test_chunks_with_passed_states_equal_whole_sequence(rng, name):
    model = OPERATOR_MODELS[name]
    params = random_params(rng, model)
    x = random_input(rng, model, 7, 2)
    expected, _ = model(params, x)
    content, state, chunks = xprnn.to_onnx(model, params).SerializeToString(), {}, []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        outputs = run_onnxruntime(content, {"x": x[start:stop], **state})
        chunks.append(outputs.pop("y"))
        state = {name.replace("final", "initial"): a for name, a in outputs.items()}
    assert_close(np.concatenate(chunks), expected)


@each_model
@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without metadata"])
def test_from_onnx_returns_equal_model_and_bits(rng, model, metadata):
    """The metadata has the names of layers and the dropout rate; without it the function is the same."""
    params = random_params(rng, model)
    proto = xprnn.to_onnx(model, params)
    if not metadata:
        del proto.metadata_props[:]
    loaded_model, loaded = xprnn.from_onnx(proto)
    if metadata:
        assert repr(loaded_model) == repr(model) or loaded_model == model
        assert loaded.keys() == params.keys()
        assert all(np.array_equal(loaded[k], params[k]) for k in params)
    x = random_input(rng, model, 5, 3)
    lengths = [5, 0, 2]
    np.testing.assert_array_equal(loaded_model(loaded, x, lengths=lengths)[0], model(params, x, lengths=lengths)[0])
    y, _, tape = loaded_model.forward(loaded, x)
    expected_y, _, expected_tape = model.forward(params, x)
    grads = loaded_model.backward(tape, y).dparams
    expected = model.backward(expected_tape, expected_y).dparams
    for a, b in zip(sorted(grads.values(), key=square_sum), sorted(expected.values(), key=square_sum), strict=False):
        if metadata or grads.keys() == expected.keys():
            np.testing.assert_array_equal(a, b)


def square_sum(a):
    return float(np.sum(a.astype(np.float64) ** 2))


def random_model(r):
    """A recurrent layer of any configuration, with or without a Linear; and its input size."""
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
def test_random_model_round_trip(seed):
    """ONNX Runtime agrees; from_onnx returns the model with metadata, and the same y without."""
    r = np.random.default_rng(seed)
    model, width = random_model(r)
    params = random_params(r, model)
    steps, rows = (int(k) for k in r.integers(1, 5, 2))
    lead = (rows, steps) if is_batch_first(model) else (steps, rows)
    x, lengths = r.standard_normal((*lead, width)).astype(np.float32), r.integers(1, steps + 1, rows)
    y, _ = model(params, x, lengths=lengths)
    proto = xprnn.to_onnx(model, params)
    assert_close(run_onnxruntime(proto, {"x": x, "lengths": lengths.astype(np.int32)})["y"], y)
    assert xprnn.from_onnx(proto)[0] == model
    del proto.metadata_props[:]
    loaded_model, loaded = xprnn.from_onnx(proto)
    np.testing.assert_array_equal(loaded_model(loaded, x, lengths=lengths)[0], y)


def test_wrong_metadata_is_ignored(rng):
    model = xprnn.GRU(3, 4)
    params = random_params(rng, model)
    proto = xprnn.to_onnx(model, params)
    for metadata in ('{"type": "LSTM", "input_size": 3, "hidden_size": 4}', "[[[", '{"type": 3}', "9" * 5000):
        proto.metadata_props[0].value = metadata
        loaded_model, loaded = xprnn.from_onnx(proto)
        assert loaded_model == model
        np.testing.assert_array_equal(loaded["weight_hh_l0"], params["weight_hh_l0"])


def test_parameters_of_any_array_library(xp):
    model = xprnn.LSTM(3, 4)
    rng = np.random.default_rng(1)
    params = random_params(rng, model)
    with xp.allow_host_conversion():
        proto = xprnn.to_onnx(model, xp.asarray(params))
    loaded_model, loaded = xprnn.from_onnx(proto, like=xp.asarray(np.zeros(1, np.float32)))
    assert loaded_model == model
    xp.assert_close(loaded, params, condition=0)


def test_float64_parameters_round_trip(rng):
    model = xprnn.GRU(3, 4, 2)
    params = random_params(rng, model, np.float64)
    loaded_model, loaded = xprnn.from_onnx(xprnn.to_onnx(model, params, dtype="float64"))
    assert loaded_model == model
    assert all(a.dtype == np.float64 and np.array_equal(a, params[k]) for k, a in loaded.items())


@pytest.mark.needs("onnxruntime")
def test_options_optional_and_lengths(rng):
    model = xprnn.LSTM(3, 4)
    params = random_params(rng, model)
    proto = xprnn.to_onnx(model, params, optional=False)
    assert [i.name for i in proto.graph.input] == ["x", "lengths", "initial_h", "initial_c"]
    assert not {i.name for i in proto.graph.input} & {t.name for t in proto.graph.initializer}
    x, state = random_input(rng, model, 4, 2), (np.ones((1, 2, 4), np.float32), np.zeros((1, 2, 4), np.float32))
    y, final = model(params, x, state, lengths=[4, 1])
    inputs = {"x": x, "lengths": np.asarray([4, 1], np.int32), **state_values(state, "initial")}
    assert_outputs_close(run_onnxruntime(proto, inputs), y, final)
    assert xprnn.from_onnx(proto)[0] == model
    without = xprnn.to_onnx(model, params, lengths=False)
    assert "lengths" not in {i.name for i in without.graph.input}
    assert_outputs_close(run_onnxruntime(without, {"x": x}), *model(params, x))


def test_invalid_arguments_raise(rng, tmp_path):
    model = xprnn.RNN(3, 4)
    params = random_params(rng, model)
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
    params = random_params(rng, learned)
    with pytest.raises(xprnn.InputError, match="learned_state"):
        xprnn.to_onnx(learned, params, optional=False)
