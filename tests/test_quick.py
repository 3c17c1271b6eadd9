"""Quick steps: the same numbers and the same errors as the checked step, whatever happens to the arrays in between."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
from backends import Backend
from engine_cases import CASES, MAIN, problem, state_like

import xprnn
from xprnn import quick, stack
from xprnn.kernels import compiling, generic_only, step

XP = Backend.NUMPY
WAYS = pytest.mark.parametrize("fast", [pytest.param(True, marks=pytest.mark.needs("numba")), False])
SHAPES = ((1, 1), (2, 1), (1, 3), (2, 20), (3, 0))  # layers, rows
LAYERS = {"rnn": xprnn.RNN, "lstm": xprnn.LSTM, "gru": xprnn.GRU}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def given(rng, layer, n, dtype="float64"):
    """params, x and the state for one step, in a dtype."""
    p = problem(rng, layer, 1, N=n)
    state = tuple(s.astype(dtype) for s in p.state) if isinstance(p.state, tuple) else p.state.astype(dtype)
    return {k: v.astype(dtype) for k, v in p.params.items()}, p.x[0].astype(dtype), state


def leaves(result):
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def agree(layer, params, x, state):
    """The quick step takes these and says what the checked one says; returns its result."""
    before = [a.copy() for a in (x, *params.values(), *leaves((x, state)))]
    found, checked = layer._step(params, x, state), stack.step(layer, params, x, state)
    assert found is not None
    XP.assert_close(found, checked, condition=32)
    for a, b in zip((x, *params.values(), *leaves((x, state))), before, strict=True):
        np.testing.assert_array_equal(a, b)
    fresh = leaves(found)
    for k, a in enumerate(fresh):
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in (*fresh[:k], x, *params.values(), *leaves((x, state))))
    return found


@WAYS
@pytest.mark.parametrize("name", CASES)
def test_every_cell_is_the_checked_step(rng, name, dtype, fast):
    with compiling(fast):
        for layers, n in SHAPES:
            layer = CASES[name].make(5, 19, layers)  # 19: neither a whole vector nor less than one
            agree(layer, *given(rng, layer, n, dtype))


@WAYS
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"learned_state": True}], ids=["plain", "no bias", "learned"])
def test_every_option_is_the_checked_step(rng, name, options, fast):
    with compiling(fast):
        for layers, n in SHAPES:
            layer = CASES[name].make(5, 19, layers, **options)
            params, x, state = given(rng, layer, n)
            agree(layer, params, x, state)
            if n:
                agree(layer, params, rng.integers(0, 5, n), state)
                agree(layer, params, rng.integers(0, 5, n).astype(np.uint8), state)


@pytest.mark.needs("numba")
@each_layer
def test_a_few_rows_take_the_compiled_way(rng, make, monkeypatch):
    monkeypatch.setattr(quick, "numpy_step", None)  # who calls it falls through to the checked step
    layer = make(5, 19, 2)
    for n, taken in ((1, True), (step.FEW, True), (step.FEW + 1, False)):
        params, x, state = given(rng, layer, n)
        ids = rng.integers(0, 5, n).astype(np.int32)
        assert (layer._step(params, x, state) is not None) == taken
        assert (layer._step(params, ids, state) is not None) == taken
        with compiling(False):
            assert layer._step(params, x, state) is None
    large = make(2000, 400)
    assert large._step(*given(rng, large, 1)) is not None
    assert large._step(*given(rng, large, 2)) is None


@WAYS
@each_layer
@pytest.mark.parametrize("sizes", [(1, 1), (1, 16), (3, 2), (16, 16), (33, 8), (40, 64)])
def test_every_size_is_the_checked_step(rng, make, sizes, dtype, fast):
    layer = make(*sizes)
    with compiling(fast):
        agree(layer, *given(rng, layer, 1, dtype))


@pytest.mark.needs("numba")
@each_layer
def test_a_row_does_not_see_the_others(rng, make):
    layer = make(5, 19, 2)
    params, x, state = given(rng, layer, 4)
    together = leaves(layer.step(params, x, state))
    for k in range(4):
        rows = slice(k, k + 1)
        part = tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[:, rows]
        alone = leaves(layer.step(params, x[rows], part))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b[..., rows, :])


@WAYS
@each_layer
def test_what_happens_to_a_parameter_is_seen(rng, make, fast):
    """Replaced, written into, of another dtype: nothing of an earlier step is left."""
    layer, twin = make(3, 8), make(3, 8)
    assert layer == twin
    params, x, state = given(rng, layer, 1)
    with compiling(fast):
        first = agree(layer, params, x, state)
        params["weight_hh_l0"] *= 0.5
        second = agree(layer, params, x, state)
        params["weight_ih_l0"] = rng.normal(size=params["weight_ih_l0"].shape)
        third = agree(layer, params, x, state)
        other = {k: rng.normal(size=v.shape) for k, v in params.items()}
        agree(twin, other, x, state)
        agree(layer, params, x, state)
        for a, b in ((first, second), (second, third)):
            assert np.max(np.abs(a[0] - b[0])) > 1e-3
        single = {k: v.astype("float32") for k, v in params.items()}
        agree(layer, single, *given(rng, layer, 1, "float32")[1:])
        agree(layer, params, x, state)


@WAYS
@each_layer
def test_arrays_of_any_strides_and_read_only_ones(rng, make, fast):
    layer = make(3, 8, 2)
    params, x, state = given(rng, layer, 2)
    parts = state if isinstance(state, tuple) else (state,)
    wide = [np.repeat(s, 2, axis=2)[:, :, ::2] for s in parts]
    turned = [np.asfortranarray(s) for s in parts]
    one = isinstance(state, tuple)
    with compiling(fast):
        for other in (wide, turned):
            agree(layer, params, x, tuple(other) if one else other[0])
        agree(layer, params, np.repeat(x, 2, axis=1)[:, ::2], state)
        agree(layer, params, np.asfortranarray(x)[::-1], state)
        agree(layer, {k: np.asfortranarray(v) for k, v in params.items()}, x, state)
        agree(layer, {k: np.repeat(v, 2, axis=0)[::2] for k, v in params.items()}, x, state)
        ids = rng.integers(0, 3, 4)[::2]
        for a in (x, ids, *params.values(), *parts):
            a.flags.writeable = False
        agree(layer, params, x, state)
        agree(layer, params, ids, state)


def wrong_arguments(params, x, state):
    """name -> arguments that do not fit a layer of input size 3 and hidden size 8, two rows."""
    parts = state if isinstance(state, tuple) else (state,)

    def each(f):
        return tuple(f(s) for s in parts) if isinstance(state, tuple) else f(state)

    less = {k: v for k, v in params.items() if k != "bias_hh_l0"}
    u = params["weight_hh_l0"]
    return {
        "a parameter less": (less, x, state),
        "another name": (less | {"bias": params["bias_hh_l0"]}, x, state),
        "one more": (params | {"bias": params["bias_hh_l0"]}, x, state),
        "no dict": (list(params.values()), x, state),
        "a smaller weight": (params | {"weight_hh_l0": u[:, :7]}, x, state),
        "a longer bias": (params | {"bias_ih_l0": np.append(params["bias_ih_l0"], 0.0)}, x, state),
        "a weight of another dtype": (params | {"weight_hh_l0": u.astype("float32")}, x, state),
        "a weight that is a list": (params | {"weight_hh_l0": u.tolist()}, x, state),
        "a weight that is None": (params | {"weight_hh_l0": None}, x, state),
        "an integer weight": (params | {"weight_hh_l0": u.astype(int)}, x, state),
        "more features": (params, np.ones((2, 4)), state),
        "x without rows": (params, x[0], state),
        "x of three axes": (params, x[None], state),
        "x of no axis": (params, np.array(1.0), state),
        "x of another dtype": (params, x.astype("float32"), state),
        "complex x": (params, x + 0j, state),
        "boolean x": (params, np.array([True, False]), state),
        "x is None": (params, None, state),
        "x is a list": (params, x.tolist(), state),
        "a class too many": (params, np.array([0, 3]), state),
        "a negative class": (params, np.array([-1, 0]), state),
        "a class beyond int64": (params, np.array([2**64 - 1, 0], np.uint64), state),
        "classes in a matrix": (params, np.array([[0, 1]]), state),
        "a state of one row": (params, x, each(lambda s: s[:, :1])),
        "a state of more rows": (params, x, each(lambda s: np.repeat(s, 2, axis=1))),
        "a state of another dtype": (params, x, each(lambda s: s.astype("float32"))),
        "a state without layers": (params, x, each(lambda s: s[0])),
        "a state of two layers": (params, x, each(lambda s: np.repeat(s, 2, axis=0))),
        "a smaller state": (params, x, each(lambda s: s[:, :, :7])),
        "one state too many": (params, x, (*parts, parts[0])),
        "states in an array": (params, x, np.stack((parts[0], parts[0]))),
    }


@WAYS
@each_layer
def test_what_does_not_fit_gets_the_checks_own_words(rng, make, fast):
    layer = make(3, 8)
    fitting = given(rng, layer, 2)
    with compiling(fast):
        agree(layer, *fitting)  # so that a quick step is at hand
        for name, arguments in wrong_arguments(*fitting).items():
            with pytest.raises(xprnn.InputError) as checked:
                stack.step(layer, *arguments)
            with pytest.raises(xprnn.InputError) as found:
                layer.step(*arguments)
            assert str(found.value) == str(checked.value), name
        agree(layer, *fitting)


@WAYS
def test_a_learned_state_is_checked_though_no_step_needs_it(rng, fast):
    layer = xprnn.GRU(3, 8, 2, learned_state=True)
    params, x, state = given(rng, layer, 1)
    start = params["initial_h"]
    with compiling(fast):
        agree(layer, params, x, state)
        for other in (start[:1], start.astype("float32"), start.tolist(), None):
            with pytest.raises(xprnn.InputError, match="initial_h"):
                layer.step(params | {"initial_h": other}, x, state)


def copying_cell():
    """A cell with two states that are one value, and one that passes through."""

    def step(x, h, state, p):
        y = x[0] + h[0]
        return (y, y, state[2]), ()

    def back(dstate, saved, state, p):
        da = dstate[0] + dstate[1]
        return (da,), (da,), (None, None, dstate[2]), ()

    return xprnn.Cell("copying", 1, lambda xp: (step, back), states=("h", "same", "kept"))


@WAYS
@pytest.mark.parametrize("n", [1, 3])
def test_states_that_share_a_value_share_no_memory(rng, n, fast):
    layer = xprnn.Recurrent(3, 5, cell=copying_cell())
    with compiling(fast):
        agree(layer, *given(rng, layer, n))


@each_layer
def test_what_only_the_checked_step_takes(rng, make):
    """A list of states, a subclass of an array, a state that is left out, other floats."""
    layer = make(3, 8)
    params, x, state = given(rng, layer, 2)
    want = layer.step(params, x, state)
    for arguments in [(params, x.view(np.memmap), state), *([(params, x, list(state))] * isinstance(state, tuple))]:
        XP.assert_close(layer.step(*arguments), want, condition=32)
    XP.assert_close(layer.step(params, x), stack.step(layer, params, x, None), condition=32)
    half = given(rng, layer, 2, "float16")
    assert layer.step(*half)[0].dtype == np.float16
    with generic_only():
        assert layer._step(params, x, state) is None


@WAYS
def test_nothing_is_kept_alive(rng, fast):
    layer = xprnn.LSTM(3, 8, 2)
    params, x, state = given(rng, layer, 1)
    with compiling(fast):
        agree(layer, params, x, state)
    watched = [weakref.ref(a) for a in (*params.values(), x, *state)]
    del params, x, state
    gc.collect()
    assert not any(w() is not None for w in watched)


@WAYS
def test_threads_share_a_layer(rng, fast):
    """Each with parameters and a stream of its own, at the same time."""
    layer = xprnn.GRU(3, 16)
    tasks = [given(rng, layer, 1) for _ in range(4)]

    def run(params, x, state):
        with compiling(fast):
            for _ in range(300):
                y, state = layer.step(params, x, state)
        return y

    want = [run(*task) for task in tasks]
    got = [None] * 4

    def work(k):
        got[k] = run(*tasks[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(got, want)


def models():
    """Models whose parts all have quick steps, and the kind of their input."""
    return {
        "text": (xprnn.Sequential(embed=xprnn.Embedding(7, 4), rnn=xprnn.GRU(4, 6), head=xprnn.Linear(6, 7)), int),
        "classes": (xprnn.Sequential(rnn=xprnn.LSTM(7, 6, 2), head=xprnn.Linear(6, 7, bias=False)), int),
        "two": (xprnn.Sequential(one=xprnn.LSTM(7, 6), two=xprnn.RNN(6, 5)), float),
        "none": (xprnn.Sequential(embed=xprnn.Embedding(7, 4), head=xprnn.Linear(4, 2)), int),
        "nested": (xprnn.Sequential(rnn=xprnn.RNN(7, 6), out=xprnn.Sequential(head=xprnn.Linear(6, 2))), float),
    }


def by_parts(model, params, x, states):
    """A model's step by its parts' checked ones."""
    after = {}
    for name, part in model.parts.items():
        own = {k.partition(".")[2]: v for k, v in params.items() if k.startswith(name + ".")}
        if isinstance(part, xprnn.Recurrent):
            x, after[name] = stack.step(part, own, x, states[name])
        elif isinstance(part, xprnn.Sequential):
            x = by_parts(part, own, x, {})[0]
        else:
            x, _ = part(own, x)
    return x, after


@WAYS
@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("n", [1, 3])
def test_a_model_steps_as_its_parts_do(rng, name, n, fast):
    model, kind = models()[name]
    params = model.init(rng, like=np.zeros(0))
    x = rng.integers(0, 7, n) if kind is int else rng.normal(size=(n, 7))
    states = {k: state_like(rng, p, n) for k, p in model.parts.items() if isinstance(p, xprnn.Recurrent)}
    nested = {k for k, p in model.parts.items() if isinstance(p, xprnn.Sequential)}
    state = None if not states else states if len(states) + len(nested) > 1 else next(iter(states.values()))
    state = state if not nested else states | dict.fromkeys(nested)
    with compiling(fast):
        y, after = model.step(params, x, state)
        found = model._step(params, x, state)
        want, wanted = by_parts(model, params, x, states)
    assert found is not None
    XP.assert_close(y, want, condition=32)
    XP.assert_close(found[0], want, condition=32)
    after = after if len(states) + len(nested) > 1 else dict.fromkeys(states, after)
    XP.assert_close({k: after[k] for k in states}, wanted, condition=32)


@WAYS
def test_a_model_given_what_does_not_fit_says_so(rng, fast):
    model = models()["text"][0]
    params, ids = model.init(rng, like=np.zeros(0)), np.array([1])
    with compiling(fast):
        _, state = model.step(params, ids)
        assert model._step(params, ids, state) is not None
        for match, arguments in {
            "x must hold integers in 0..6, found 7": (params, np.array([7]), state),
            "x must hold integers in 0..6, found -1": (params, np.array([-1]), state),
            "Embedding.forward: x must be integers": (params, np.array([1.0]), state),
            "missing head.bias": ({k: v for k, v in params.items() if k != "head.bias"}, ids, state),
            "unexpected more": (params | {"more": params["head.bias"]}, ids, state),
            r"weight \(V,H\)|weight must have shape": (params | {"head.weight": np.ones((7, 5))}, ids, state),
            "state h": (params, ids, np.zeros((1, 2, 6))),
        }.items():
            with pytest.raises(xprnn.InputError, match=match):
                model.step(*arguments)
    several = models()["two"][0]
    params = several.init(rng, like=np.zeros(0))
    _, state = several.step(params, np.ones((1, 7)))
    for wrong in (state | {"three": state["two"]}, {"one": state["one"]}, (state["one"], state["two"])):
        with pytest.raises(xprnn.InputError, match="state must be a dict with the keys one, two"):
            several.step(params, np.ones((1, 7)), wrong)


def test_a_layer_that_has_stepped_can_be_copied_and_pickled(rng):
    for part in (xprnn.LSTM(3, 4), xprnn.Linear(3, 2), *(model for model, _ in models().values())):
        params = part.init(rng, like=np.zeros(0))
        x = np.array([1]) if "embed" in getattr(part, "parts", {}) else np.ones((1, 7 if hasattr(part, "parts") else 3))
        want = part.step(params, x)
        for twin in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert twin == part
            assert hash(twin) == hash(part)
            XP.assert_close(twin.step(params, x)[0], want[0])
