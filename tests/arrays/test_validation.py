"""Invalid arguments raise InputError with one line: the function, the argument, the expectation and the value found.

A case is (id, call, words): the message must contain the words in this order and start with the first of them.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend

import xprnn
from xprnn import RNN, InputError

T, N, D, H, V = 4, 2, 3, 5, 6
F32 = np.float32
rng = np.random.default_rng(0)
layer, lstm, two_layers = RNN(D, H), xprnn.LSTM(D, H), RNN(D, H, 2, dropout=0.5)
params, lstm_params, two_layers_params = (each.init(rng, np.zeros(1)) for each in (layer, lstm, two_layers))
x, state = np.ones((T, N, D)), np.zeros((1, N, H))
y, _, tape = layer.forward(params, x)
p = {
    "Wax": np.ones((H, D)),
    "Waa": np.ones((H, H)),
    "Wya": np.ones((V, H)),
    "ba": np.ones((H, 1)),
    "by": np.ones((V, 1)),
}
ax, a0, da = np.ones((D, N, T)), np.zeros((H, N)), np.ones((H, N, T))
caches = xprnn.rnn_forward(ax, a0, p)[2]
cell = xprnn.rnn_cell_forward(ax[:, :, 0], a0, p)[2]
linear, embedding = xprnn.Linear(D, V), xprnn.Embedding(V, D)
linear_params, embedding_params = linear.init(rng, np.zeros(1)), embedding.init(rng, np.zeros(1))
model = xprnn.Sequential(rnn=layer, head=xprnn.Linear(H, V))
model_params = model.init(rng, np.zeros(1))
optimizer = xprnn.adam(1e-3)
z = np.zeros((N, V))


def without(d, key):
    return {k: v for k, v in d.items() if k != key}


ARTICLE = [
    ("softmax of a list", lambda: xprnn.softmax([1.0, 2.0]), "softmax: x array list"),
    ("softmax of integers", lambda: xprnn.softmax(np.arange(3)), "softmax: x floating int64"),
    ("softmax along no axis", lambda: xprnn.softmax(z, axis=2), "softmax: axis -2..1 2"),
    ("softmax of a number", lambda: xprnn.softmax(np.asarray(1.0)), "softmax: axis ()"),
    ("cell xt rank", lambda: xprnn.rnn_cell_forward(ax, a0, p), "rnn_cell_forward: xt (n_x,m) (3, any) (3, 2, 4)"),
    ("cell xt size", lambda: xprnn.rnn_cell_forward(np.ones((7, N)), a0, p), "rnn_cell_forward: xt (3, any) (7, 2)"),
    ("cell a_prev", lambda: xprnn.rnn_cell_forward(ax[:, :, 0], a0.T, p), "rnn_cell_forward: a_prev (5, 2) (2, 5)"),
    ("x rank", lambda: xprnn.rnn_forward(a0, a0, p), "rnn_forward: x (n_x,m,T_x) (3, any, any) (5, 2)"),
    ("x of time-major shape", lambda: xprnn.rnn_forward(x, a0, p), "rnn_forward: x (3, any, any) (4, 2, 3)"),
    ("a0 of another batch", lambda: xprnn.rnn_forward(ax, np.ones((H, 9)), p), "rnn_forward: a0 (5, 2) (5, 9)"),
    ("a0 float32", lambda: xprnn.rnn_forward(ax, a0.astype(F32), p), "rnn_forward: a0 float32 x float64"),
    ("x integers", lambda: xprnn.rnn_forward(ax.astype(int), a0, p), "rnn_forward: x floating int64"),
    ("x a list", lambda: xprnn.rnn_forward(ax.tolist(), a0, p), "rnn_forward: x array list"),
    ("parameters a list", lambda: xprnn.rnn_forward(ax, a0, [1]), "rnn_forward: parameters dict list"),
    ("no by", lambda: xprnn.rnn_forward(ax, a0, without(p, "by")), "rnn_forward: parameters by Wax"),
    ("ba flat", lambda: xprnn.rnn_forward(ax, a0, p | {"ba": np.ones(H)}), "rnn_forward: ba (n_a,1) (5, 1) (5,)"),
    ("Waa", lambda: xprnn.rnn_forward(ax, a0, p | {"Waa": np.ones((H, D))}), "rnn_forward: Waa (5, 5) (5, 3)"),
    ("Wya", lambda: xprnn.rnn_forward(ax, a0, p | {"Wya": np.ones((V, D))}), "rnn_forward: Wya (6, 5) (6, 3)"),
    ("Wax a list", lambda: xprnn.rnn_forward(ax, a0, p | {"Wax": [[1.0]]}), "rnn_forward: Wax array list"),
    ("Wax flat", lambda: xprnn.rnn_forward(ax, a0, p | {"Wax": np.ones(H)}), "rnn_forward: Wax (n_a,n_x) (5,)"),
    (
        "by float32",
        lambda: xprnn.rnn_forward(ax, a0, p | {"by": p["by"].astype(F32)}),
        "rnn_forward: by float32 float64",
    ),
    ("da_next", lambda: xprnn.rnn_cell_backward(da, cell), "rnn_cell_backward: da_next (5, 2) (5, 2, 4)"),
    ("nothing given", lambda: xprnn.rnn_cell_backward(None, cell), "rnn_cell_backward: da_next dlogits"),
    (
        "cache",
        lambda: xprnn.rnn_cell_backward(a0, cell[:2]),
        "rnn_cell_backward: cache (a_next, a_prev, xt, parameters)",
    ),
    ("cache None", lambda: xprnn.rnn_cell_backward(a0, None), "rnn_cell_backward: cache"),
    ("cache of lists", lambda: xprnn.rnn_cell_backward(a0, ([1], [2], [3], p)), "rnn_cell_backward: a_next array list"),
    ("da None", lambda: xprnn.rnn_backward(None, caches), "rnn_backward: da dlogits"),
    ("da rank", lambda: xprnn.rnn_backward(a0, caches), "rnn_backward: da (n_a,m,T) (5, 2, any) (5, 2)"),
    ("da too long", lambda: xprnn.rnn_backward(np.ones((H, N, 9)), caches), "rnn_backward: da 9 time steps 4"),
    ("da float32", lambda: xprnn.rnn_backward(da.astype(F32), caches), "rnn_backward: float64 float32"),
    (
        "da and dlogits of two lengths",
        lambda: xprnn.rnn_backward(da, caches, dlogits=np.ones((V, N, 3))),
        "rnn_backward: da 4 time steps dlogits 3",
    ),
    (
        "dlogits",
        lambda: xprnn.rnn_backward(da, caches, dlogits=da),
        "rnn_backward: dlogits (n_y,m,T) (6, 2, any) (5, 2, 4)",
    ),
    ("caches None", lambda: xprnn.rnn_backward(da, None), "rnn_backward: caches"),
    ("caches empty", lambda: xprnn.rnn_backward(da, ([], ax)), "rnn_backward: caches at least one"),
    ("caches without x", lambda: xprnn.rnn_backward(da, (caches[0], None)), "rnn_backward: caches"),
]

LAYERS = [
    ("input_size 0", lambda: RNN(0, H), "RNN: input_size >= 1 0"),
    ("hidden_size text", lambda: RNN(D, "5"), "RNN: hidden_size"),
    ("hidden_size float", lambda: RNN(D, 5.0), "RNN: hidden_size 5.0"),
    ("hidden_size bool", lambda: RNN(D, True), "RNN: hidden_size integer True"),
    ("num_layers", lambda: RNN(D, H, 0), "RNN: num_layers >= 1 0"),
    ("sizes", lambda: RNN(D, (3, 4), 3), "RNN: hidden_size 2 num_layers 3"),
    ("dropout", lambda: RNN(D, H, dropout=1.0), "RNN: dropout [0, 1) 1.0"),
    ("dropout text", lambda: RNN(D, H, dropout="much"), "RNN: dropout [0, 1) 'much'"),
    ("nonlinearity", lambda: RNN(D, H, nonlinearity="swish").init(rng, z), "activation: tanh 'swish'"),
    ("proj_size", lambda: xprnn.LSTM(D, H, proj_size=5), "LSTM: proj_size 5 5"),
    ("rng a seed", lambda: layer.init(0, like=z), "RNN.init: rng numpy.random.Generator int"),
    ("rng legacy", lambda: layer.init(np.random.RandomState(0), like=z), "RNN.init: rng Generator RandomState"),
    ("like a list", lambda: layer.init(rng, like=[1.0]), "RNN.init: like array list"),
    ("like integers", lambda: layer.init(rng, like=np.arange(3)), "RNN.init: like floating int64"),
    ("scheme", lambda: layer.init(rng, z, scheme="he"), "init: scheme uniform 'he'"),
    ("forget_bias", lambda: layer.init(rng, z, forget_bias=1.0), "RNN.init: forget_bias LSTM"),
    ("params None", lambda: layer.forward(None, x), "RNN.forward: params dict NoneType"),
    ("missing key", lambda: layer.forward(without(params, "bias_hh_l0"), x), "RNN.forward: params missing bias_hh_l0"),
    ("extra key", lambda: layer(params | {"w": z}, x), "RNN: params unexpected w weight_ih_l0"),
    ("key of another layer", lambda: layer(lstm_params, x), "RNN: weight_ih_l0 (5, 3) (20, 3)"),
    ("param a list", lambda: layer(params | {"bias_hh_l0": [0.0] * H}, x), "RNN: bias_hh_l0 array list"),
    ("param dtype", lambda: layer(params | {"bias_hh_l0": np.zeros(H, F32)}, x), "RNN: bias_hh_l0 float32 x float64"),
    ("x a list", lambda: layer.forward(params, x.tolist()), "RNN.forward: x array list"),
    ("x rank", lambda: layer.forward(params, x[0]), "RNN.forward: x (T,N,D) 3 axes (2, 3)"),
    ("x features", lambda: layer.forward(params, y), "RNN.forward: x 5 features weight_ih_l0 3 (4, 2, 5)"),
    ("x dtype", lambda: layer.forward(params, x.astype(F32)), "RNN.forward: float64 x float32"),
    ("x boolean", lambda: layer.forward(params, x > 0), "RNN.forward: x floating integer bool"),
    ("classes boolean", lambda: layer(params, x[..., 0] > 0), "RNN: x integer bool class numbers convert"),
    ("x complex", lambda: layer.forward(params, x + 0j), "RNN.forward: x floating complex128"),
    ("integer x rank", lambda: layer.forward(params, x.astype(int)), "RNN.forward: integer x (T,N) (4, 2, 3)"),
    ("integer x too large", lambda: layer(params, np.full((T, N), 3)), "RNN: x integers 0..2 3"),
    ("integer x negative", lambda: layer(params, np.full((T, N), -1)), "RNN: x integers 0..2 -1"),
    ("state rank", lambda: layer(params, x, state[0]), "RNN: state (L*directions,N,H) (1, 2, 5) (2, 5)"),
    ("state batch", lambda: layer(params, x, np.zeros((1, 9, H))), "RNN: state (1, 2, 5) (1, 9, 5)"),
    ("state integers", lambda: layer(params, x, state.astype(int)), "RNN: state floating int64"),
    ("state dtype", lambda: layer(params, x, state.astype(F32)), "RNN: state float32 float64"),
    ("state a list", lambda: layer(params, x, state.tolist()), "RNN: state"),
    ("LSTM state alone", lambda: lstm(lstm_params, x, state), "LSTM: state pair (h, c) (1, 2, 5)"),
    ("LSTM state of three", lambda: lstm(lstm_params, x, (state,) * 3), "LSTM: state pair tuple of 3"),
    ("lengths too long", lambda: layer(params, x, lengths=[T + 1, 1]), "RNN: lengths 0..T=4 [5, 1]"),
    ("lengths negative", lambda: layer(params, x, lengths=[-1, 1]), "RNN: lengths 0..T=4 [-1, 1]"),
    ("lengths count", lambda: layer(params, x, lengths=[1]), "RNN: lengths (N,) (2,) (1,)"),
    ("lengths floats", lambda: layer(params, x, lengths=[1.0, 2.0]), "RNN: lengths integers float64"),
    ("mask shape", lambda: layer(params, x, mask=np.ones((N, T), bool)), "RNN: mask (T,N) (4, 2) (2, 4)"),
    ("mask floats", lambda: layer(params, x, mask=np.ones((T, N))), "RNN: mask boolean float64"),
    ("mask a list", lambda: layer(params, x, mask=[[True]]), "RNN: mask array list"),
    ("reset shape", lambda: layer(params, x, reset=np.ones(T, bool)), "RNN: reset (T,N) (4, 2) (4,)"),
    ("dy shape", lambda: layer.backward(tape, y[1:]), "RNN.backward: dy (4, 2, 5) (3, 2, 5)"),
    ("dy dtype", lambda: layer.backward(tape, y.astype(F32)), "RNN.backward: dy float32 float64"),
    ("dy a list", lambda: layer.backward(tape, y.tolist()), "RNN.backward: dy array list"),
    ("dstate shape", lambda: layer.backward(tape, y, y), "RNN.backward: state (1, 2, 5) (4, 2, 5)"),
    ("step of a sequence", lambda: layer.step(params, x), "RNN.step: x (N,D) (4, 2, 3)"),
    ("step of a bidirectional layer", lambda: RNN(D, H, bidirectional=True).step({}, x), "RNN.step: bidirectional"),
    ("dropout's rng", lambda: two_layers.forward(two_layers_params, x, rng=3), "RNN.forward: rng Generator int"),
]

STATELESS_LAYERS = [
    ("Linear size", lambda: xprnn.Linear(0, V), "Linear: in_features >= 1 0"),
    ("Embedding size", lambda: xprnn.Embedding(V, -1), "Embedding: embedding_dim >= 1 -1"),
    ("Linear x", lambda: linear(linear_params, y), "Linear x 3 (4, 2, 5)"),
    ("Linear x integers", lambda: linear(linear_params, x.astype(int)), "Linear x floating int64"),
    ("Linear params", lambda: linear({}, x), "Linear params missing bias, weight"),
    (
        "Linear dy",
        lambda: linear.backward(linear.forward(linear_params, x)[2], x),
        "Linear.backward: dy (4, 2, 6) (4, 2, 3)",
    ),
    ("Embedding of floats", lambda: embedding(embedding_params, x), "Embedding x integers 0..5 float64"),
    ("Embedding range", lambda: embedding(embedding_params, np.asarray([6])), "Embedding x 0..5 6"),
    (
        "Embedding dy",
        lambda: embedding.backward(embedding.forward(embedding_params, np.asarray([1]))[2], x),
        "Embedding.backward: dy (1, 3)",
    ),
    ("Sequential of nothing", xprnn.Sequential, "Sequential: at least one layer"),
    ("Sequential of a number", lambda: xprnn.Sequential(head=3), "Sequential: head layer int"),
    ("Sequential key", lambda: model(without(model_params, "head.bias"), x), "Sequential: params missing head.bias"),
    ("Sequential rng", lambda: model.init(0, z), "Sequential.init: rng Generator int"),
    ("Sequential state", lambda: model(model_params, x, state[0]), "RNN: state (1, 2, 5) (2, 5)"),
]

LOSSES = [
    ("logits a list", lambda: xprnn.cross_entropy([1.0], np.asarray([0])), "cross_entropy: logits array list"),
    ("logits integers", lambda: xprnn.cross_entropy(z.astype(int), np.asarray([0, 1])), "cross_entropy: logits int64"),
    ("targets shape", lambda: xprnn.cross_entropy(z, np.asarray([0])), "cross_entropy: targets (2,) (1,)"),
    ("targets range", lambda: xprnn.cross_entropy(z, np.asarray([0, 6])), "cross_entropy: targets 0..5 6"),
    ("targets bool", lambda: xprnn.cross_entropy(z, z[:, 0] > 0), "cross_entropy: targets integer float64 found bool"),
    ("one-hot bool", lambda: xprnn.cross_entropy(z, z > 0), "cross_entropy: targets integer float64 found bool"),
    ("targets a list", lambda: xprnn.cross_entropy(z, [0, 1]), "cross_entropy: targets array list"),
    ("one-hot shape", lambda: xprnn.cross_entropy(z, z.T), "cross_entropy: targets (2, 6) (6, 2)"),
    ("one-hot dtype", lambda: xprnn.cross_entropy(z, z.astype(F32)), "cross_entropy: targets float32 logits float64"),
    ("axis", lambda: xprnn.cross_entropy(z, z, axis=2), "cross_entropy: (2, 6) axis 2"),
    ("reduction", lambda: xprnn.cross_entropy(z, z, reduction="none"), "cross_entropy: reduction 'mean' 'none'"),
    ("mask", lambda: xprnn.cross_entropy(z, z, mask=np.ones(9, bool)), "cross_entropy: mask (2,) (9,)"),
    ("mask floats", lambda: xprnn.cross_entropy(z, z, mask=np.ones(2)), "cross_entropy: mask boolean float64 weights"),
    ("weights", lambda: xprnn.cross_entropy(z, z, weights=np.ones(9)), "cross_entropy: weights (2,) (9,)"),
    ("mse shape", lambda: xprnn.mse(z, z.T), "mse: target (2, 6) (6, 2)"),
    ("mse dtype", lambda: xprnn.mse(z, z.astype(F32)), "mse: target float32 prediction float64"),
    ("mse mask", lambda: xprnn.mse(z, z, mask=np.ones((9, 6), bool)), "mse: mask (2, 6) (9, 6)"),
]

OPTIMIZERS = [
    ("rate", lambda: xprnn.sgd(-1.0), "sgd: learning_rate >= 0 -1.0"),
    ("rate text", lambda: xprnn.adam("fast"), "adam: learning_rate 'fast'"),
    ("rate nan", lambda: xprnn.adam(float("nan")), "adam: learning_rate nan"),
    ("momentum", lambda: xprnn.sgd(0.1, momentum=1.0), "sgd: momentum [0, 1) 1.0"),
    ("nesterov", lambda: xprnn.sgd(0.1, nesterov=True), "sgd: nesterov momentum"),
    ("b1", lambda: xprnn.adamw(b1=-0.1), "adamw: b1 [0, 1) -0.1"),
    ("keys", lambda: optimizer.update({"a": z}, {"b": z}, optimizer.init({"a": z})), "adam.update: keys a, b"),
    (
        "shapes",
        lambda: optimizer.update({"a": z}, {"a": z.T}, optimizer.init({"a": z})),
        "adam.update: a (6, 2) (2, 6)",
    ),
    (
        "dtypes",
        lambda: optimizer.update({"a": z}, {"a": z.astype(F32)}, optimizer.init({"a": z})),
        "adam.update: float32 float64",
    ),
    ("state", lambda: optimizer.update({"a": z}, {"a": z}, {}), "adam.update: state init nothing"),
    (
        "state of other parameters",
        lambda: optimizer.update({"a": z}, {"a": z}, optimizer.init({"b": z})),
        "adam.update: state keys a, b",
    ),
    ("limit", lambda: xprnn.clip_by_value({"a": z}, 0), "clip_by_value: limit > 0 0"),
    ("max_norm", lambda: xprnn.clip_by_global_norm({"a": z}, -1), "clip_by_global_norm: max_norm > 0 -1"),
    ("norm of nothing", lambda: xprnn.clip_by_global_norm({}, 1.0), "clip_by_global_norm: at least one"),
    ("init of lists", lambda: optimizer.init({"a": [1.0]}), "adam.init: a array list"),
    ("init of integers", lambda: optimizer.init({"a": np.arange(3)}), "adam.init: a floating int64"),
    (
        "grads of lists",
        lambda: optimizer.update({"a": z}, {"a": [1.0]}, optimizer.init({"a": z})),
        "adam.update: a array list",
    ),
    ("values of lists", lambda: xprnn.clip_by_value({"a": [1.0]}, 1.0), "clip_by_value: a array list"),
    ("norm of lists", lambda: xprnn.clip_by_global_norm({"a": [1.0]}, 1.0), "clip_by_global_norm: a array list"),
]

CASES = [*ARTICLE, *LAYERS, *STATELESS_LAYERS, *LOSSES, *OPTIMIZERS]


def error_message(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("call", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_invalid_argument_raises_one_line_with_these_words(call, words):
    message = error_message(call)
    assert "\n" not in message
    position = 0
    for word in words.replace("(", " (").split(" "):
        found = message.find(word, position)
        assert found >= 0, f"{word!r} is missing or out of order in: {message}"
        position = found
    assert message.startswith(words.split()[0]), message


# (start of the message, call, array): calls that must reject `array` if it comes from another library than the others.
MIXED_LIBRARIES = [
    ("rnn_forward: a0", lambda b: xprnn.rnn_forward(ax, b, p), a0),
    ("rnn_forward: by", lambda b: xprnn.rnn_forward(ax, a0, p | {"by": b}), p["by"]),
    ("rnn_backward: ", lambda b: xprnn.rnn_backward(b, caches), da),
    ("RNN.forward: ", lambda b: layer.forward(params, b), x),
    ("RNN: state", lambda b: layer(params, x, b), state),
    ("RNN: bias_ih_l0", lambda b: layer(params | {"bias_ih_l0": b}, x), params["bias_ih_l0"]),
    ("RNN: mask", lambda b: layer(params, x, mask=b), np.ones((T, N), bool)),
    ("RNN.backward: dy", lambda b: layer.backward(tape, b), y),
    ("Linear", lambda b: linear(linear_params, b), x),
    ("Embedding", lambda b: embedding(embedding_params, b), np.asarray([1])),
    ("cross_entropy: targets", lambda b: xprnn.cross_entropy(z, b), np.asarray([0, 1])),
    ("cross_entropy: mask", lambda b: xprnn.cross_entropy(z, z, mask=b), np.ones(2, bool)),
    ("mse: target", lambda b: xprnn.mse(z, b), z),
    ("adam.update: ", lambda b: optimizer.update({"a": z}, {"a": b}, optimizer.init({"a": z})), z),
    ("clip_by_global_norm: b", lambda b: xprnn.clip_by_global_norm({"a": z, "b": b}, 1.0), z),
]


@pytest.mark.needs("array_api_strict")
@pytest.mark.parametrize(("start", "call", "array"), MIXED_LIBRARIES, ids=[case[0] for case in MIXED_LIBRARIES])
def test_array_of_another_library_is_rejected(start, call, array):
    import array_api_strict as strict

    message = error_message(lambda: call(strict.asarray(array)))
    assert "\n" not in message
    assert message.startswith(start)
    assert "a array_api_strict array" in message
    assert "a numpy array" in message


@pytest.mark.needs("array_api_strict")
def test_array_of_another_device_is_rejected():
    """A few calls suffice, because all calls compare devices by `resolve_namespace`."""
    cpu, device1 = Backend.STRICT, Backend.STRICT_DEVICE1
    with cpu.forbid_host_conversion():
        message = error_message(lambda: layer(cpu.asarray(params), cpu.asarray(x), device1.asarray(state)))
        assert message.startswith("RNN: state is on ")
        message = error_message(
            lambda: layer(cpu.asarray(params), cpu.asarray(x), mask=device1.asarray(np.ones((T, N), bool)))
        )
        assert message.startswith("RNN: mask is on ")
        message = error_message(lambda: xprnn.rnn_forward(cpu.asarray(ax), device1.asarray(a0), cpu.asarray(p)))
        assert message.startswith("rnn_forward: a0 is on ")
        message = error_message(lambda: xprnn.cross_entropy(cpu.asarray(z), device1.asarray([0, 1])))
        assert message.startswith("cross_entropy: targets is on ")
