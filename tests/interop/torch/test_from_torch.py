"""`from_torch`: outputs, final states and all gradients equal those of torch for every configuration of its layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layer_cases import random_cotangents, random_state
from support.torch_autograd import grads, leaf, pairing
from support.torch_networks import build_layer, build_network, property_settings, recurrent_layers

import xprnn
from xprnn.arrays.namespace import InputError

pytestmark = pytest.mark.needs("torch")
FLOAT64 = np.zeros(0)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def assert_states_close(actual, expected):
    for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (actual, expected)), strict=True):
        assert_close(a, b.detach().numpy() if hasattr(b, "detach") else b)


def assert_same_as_torch(rng, module, model, params, layer, x):
    """Compare outputs, final states and all gradients, with random initial states and random cotangents."""
    import torch

    state = random_state(rng, layer, x.shape[0 if layer.batch_first else 1])
    y, final, tape = model.forward(params, x, state)
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    gradients = model.backward(tape, dy, dfinal)
    torch_x, torch_state = (torch.tensor(x) if x.dtype.kind == "i" else leaf(x)), leaf(state)
    torch_y, torch_final = module(torch_x, torch_state)
    pairing((torch_y, torch_final), (dy, dfinal)).backward()
    assert_close(y, torch_y.detach().numpy())
    assert_states_close(final, torch_final)
    assert_states_close(gradients.dstate, grads(torch_state))
    if x.dtype.kind == "f":
        assert_close(gradients.dx, torch_x.grad.numpy())
    expected = {name: p.grad.numpy() for name, p in module.named_parameters()}
    assert gradients.dparams.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients.dparams[name], gradient)


def random_input(rng, arguments, embedding=0, T=4, N=3):
    """Random input of a layer with these constructor arguments, or ids below `embedding` if it is not 0."""
    leading_shape = (N, T) if arguments["batch_first"] else (T, N)
    return (
        rng.integers(0, embedding, leading_shape)
        if embedding
        else rng.normal(size=(*leading_shape, arguments["input_size"]))
    )


@property_settings
@given(recurrent_layers())
def test_recurrent_layer_equals_torch(rng, case):
    name, arguments = case
    module = build_layer(name, arguments).train(False)
    layer, params = xprnn.from_torch(module)
    assert type(layer).__name__ == name
    assert layer.dropout == arguments["dropout"]
    assert_same_as_torch(rng, module, layer, params, layer, random_input(rng, arguments))


@property_settings
@given(recurrent_layers(), st.sampled_from([0, 7]), st.sampled_from([0, 5]), st.booleans())
def test_module_state_dict_and_arrays_give_the_same_model(rng, case, embedding, outputs, bias):
    name, arguments = case
    module = build_network(build_layer(name, arguments), embedding, outputs, bias)
    model, params = xprnn.from_torch(module, like=FLOAT64)
    assert list(params) == list(module.state_dict())
    rnn = model.layers["rnn"]
    assert_same_as_torch(rng, module, model, params, rnn, random_input(rng, arguments, embedding))
    hints = {"batch_first": rnn.batch_first} | ({"nonlinearity": rnn.nonlinearity} if name == "RNN" else {})
    for source in (module.state_dict(), {k: v.numpy() for k, v in module.state_dict().items()}):
        from_source, read_params = xprnn.from_torch(source, like=FLOAT64, **hints)
        no_dropout = {"rnn": xprnn.layers.sequential.from_config(rnn.config() | {"dropout": 0.0})}
        assert from_source == xprnn.Sequential(**(model.layers | no_dropout))
        assert all(np.array_equal(read_params[k], params[k]) for k in params)
        assert read_params.keys() == params.keys()


def test_params_convert_to_and_from_every_library(xp, rng, dtype):
    module = build_network(build_layer("GRU", {"input_size": 3, "hidden_size": 2, "batch_first": False}), 5, 4)
    like = xp.asarray(np.zeros(1), dtype)
    model, params = xprnn.from_torch(module, like=like)
    for name, value in module.state_dict().items():
        xp.assert_like(params[name], like)
        np.testing.assert_array_equal(xp.to_numpy(params[name]), value.numpy().astype(dtype))
    state_dict, _ = xprnn.to_torch(model, params)
    for name, value in state_dict.items():
        assert str(value.dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(value.numpy(), xp.to_numpy(params[name]))


@pytest.mark.parametrize(("name", "cell"), [("RNN", "RNNCell"), ("LSTM", "LSTMCell"), ("GRU", "GRUCell")])
def test_torch_cells_become_recurrent_layers(rng, name, cell):
    import torch

    module = getattr(torch.nn, cell)(3, 4, dtype=torch.float64)
    for source in (module, module.state_dict()):
        layer, params = xprnn.from_torch(source)
        assert layer == getattr(xprnn, name)(3, 4)
        x, state = rng.normal(size=(2, 3)), random_state(rng, layer, 2)
        y, final = layer.step(params, x, state)
        is_pair = isinstance(state, tuple)
        expected = module(
            torch.tensor(x), tuple(torch.tensor(s[0]) for s in state) if is_pair else torch.tensor(state[0])
        )
        assert_close(y, (expected[0] if is_pair else expected).detach().numpy())
        assert_states_close(tuple(f[0] for f in final) if is_pair else final[0], expected)
    (model, params) = xprnn.from_torch(torch.nn.ModuleDict({"cell": module}))
    assert sorted(params)[-2:] == ["cell.weight_hh_l0", "cell.weight_ih_l0"]
    assert model.layers["cell"] == layer


def test_activations_and_softmax_convert_both_directions(rng):
    import torch

    nn = torch.nn
    torch.manual_seed(3)
    activations = [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.Softsign(), nn.Softplus(), nn.LeakyReLU(0.2), nn.ELU(0.7)]
    activations += [
        nn.SELU(),
        nn.ReLU6(),
        nn.Hardtanh(),
        nn.LogSigmoid(),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Mish(),
    ]
    activations += [nn.Hardswish(), nn.Tanhshrink(), nn.CELU(0.7), nn.Softshrink(0.3), nn.Hardshrink(0.2)]
    chain = [nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), f) for f in activations]
    module = nn.Sequential(*chain, nn.Dropout(0.3), nn.Identity(), nn.LogSoftmax(dim=-1)).eval()
    model, params = xprnn.from_torch(module)
    x = torch.tensor(rng.normal(size=(5, 3, 4)))
    assert_close(model(params, x.numpy())[0], module(x).detach().numpy())
    state_dict, constructor = xprnn.to_torch(model, params)
    rebuilt = nn.Sequential(*(getattr(nn, name)(**arguments) for name, arguments in constructor.values()))
    rebuilt.load_state_dict(dict(zip(rebuilt.state_dict(), state_dict.values(), strict=True)))
    assert_close(rebuilt(x).detach().numpy(), module(x).detach().numpy())
    assert model.layers[str(len(activations) + 2)] == xprnn.Softmax(log=True)
    for unsupported, reason in (
        (nn.Softmax(dim=1), "dim=1 is not supported"),
        (nn.Softplus(2.0), "expected beta=1, threshold=20, found beta=2.0, threshold=20.0"),
        (nn.Hardtanh(-2, 2), "expected min_val=-1, max_val=1, found min_val=-2, max_val=2"),
        (nn.PReLU(), "has no equivalent in xprnn"),
    ):
        with pytest.raises(InputError, match=f"1 .*: {reason}"):
            xprnn.from_torch(nn.Sequential(nn.Linear(4, 4), unsupported))


def test_bfloat16_becomes_float32_and_float16_stays(rng):
    import torch

    module = torch.nn.LSTM(3, 4, dtype=torch.bfloat16)
    _, params = xprnn.from_torch(module)
    assert params["weight_ih_l0"].dtype == np.float32
    np.testing.assert_array_equal(params["weight_ih_l0"], module.weight_ih_l0.detach().float().numpy())
    _, params = xprnn.from_torch(torch.nn.LSTM(3, 4, dtype=torch.float16))
    assert params["weight_ih_l0"].dtype == np.float16


def test_params_are_copies():
    import torch

    module = build_layer("GRU", {"input_size": 3, "hidden_size": 2})
    _, params = xprnn.from_torch(module)
    before = params["bias_ih_l0"].copy()
    module.bias_ih_l0.data.zero_()
    np.testing.assert_array_equal(params["bias_ih_l0"], before)
    state_dict, _ = xprnn.to_torch(xprnn.GRU(3, 2), params)
    state_dict["bias_ih_l0"].zero_()
    np.testing.assert_array_equal(params["bias_ih_l0"], before)
    tensors = {name: torch.tensor(array) for name, array in params.items()}
    xprnn.to_torch(xprnn.GRU(3, 2), tensors).state_dict["bias_ih_l0"].zero_()
    np.testing.assert_array_equal(tensors["bias_ih_l0"].numpy(), before)


def test_order_from_definition_from_widths_or_from_caller():
    import torch

    class Backwards(torch.nn.Module):
        def __init__(self, H):
            super().__init__()
            self.out, self.rnn, self.emb = torch.nn.Linear(H, 9), torch.nn.GRU(3, H), torch.nn.Embedding(9, 3)

    assert list(xprnn.from_torch(Backwards(4))[0].layers) == ["emb", "rnn", "out"]
    assert list(xprnn.from_torch(Backwards(4).state_dict())[0].layers) == ["emb", "rnn", "out"]
    equal_widths = {f"{name}.weight_{k}h_l0": np.zeros((12, 4)) for name in "ba" for k in "ih"}
    assert list(xprnn.from_torch(equal_widths)[0].layers) == ["b", "a"]
    assert list(xprnn.from_torch(equal_widths, order=["a", "b"])[0].layers) == ["a", "b"]
    with pytest.raises(InputError, match="order must name b, a, found a"):
        xprnn.from_torch(equal_widths, order=["a"])
    with pytest.raises(
        InputError, match=r"no order of the layers fits their widths: rnn \(GRU 3 -> 4\), out \(Linear 5"
    ):
        xprnn.from_torch(torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "out": torch.nn.Linear(5, 9)}))
    with pytest.raises(InputError, match=r"more than one .* fits: table \(Embedding integers -> 4 or Linear 4 -> 4\)"):
        xprnn.from_torch({"table.weight": np.zeros((4, 4)), **equal_widths})
    model, _ = xprnn.from_torch({"embedding.weight": np.zeros((4, 4)), **equal_widths})
    assert model.layers["embedding"] == xprnn.Embedding(4, 4)


def test_all_unsupported_parts_are_listed_in_one_error():
    import torch

    nn = torch.nn

    class Unsupported(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rnn, self.norm = nn.Conv1d(3, 3, 2), nn.GRU(3, 4), nn.LayerNorm(4)
            self.emb = nn.Embedding(9, 3, max_norm=1.0)
            self.start = nn.Parameter(torch.zeros(4))

    with pytest.raises(InputError) as error:
        xprnn.from_torch(Unsupported())
    for reason in (
        "conv (Conv1d): has no",
        "norm (LayerNorm): has no",
        "emb (Embedding): max_norm",
        "start belongs to no supported layer",
    ):
        assert reason in str(error.value)
    with pytest.raises(
        InputError, match=r"a.running_mean \(3,\) float32 belongs to no supported layer; n \(\) int64 belongs"
    ):
        xprnn.from_torch({"a.running_mean": np.zeros(3, "f4"), "n": np.array(3), "w.weight": np.zeros((2, 3))})
    shared = nn.GRU(4, 4)
    with pytest.raises(InputError, match=r"b\.weight_ih_l0 belongs to no supported layer"):
        xprnn.from_torch(nn.ModuleDict({"a": shared, "b": shared}))


LSTM_SHAPES = {"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 4), "bias_ih_l0": (16,), "bias_hh_l0": (16,)}
INVALID_STATE_DICTS = {
    "missing": ({"weight_ih_l0": (16, 3)}, "weight_hh_l0 is missing"),
    "missing bias": ({**LSTM_SHAPES, "bias_hh_l0": None}, "bias_hh_l0 is missing"),
    "layer left out": ({**LSTM_SHAPES, "weight_ih_l2": (16, 4)}, "weight_ih_l1 is missing; .*weight_hh_l2 is missing"),
    "layer far away": ({**LSTM_SHAPES, "weight_ih_l99999": (16, 4)}, "there is a layer 99999 but only 5 arrays"),
    "shape": ({**LSTM_SHAPES, "bias_ih_l0": (12,)}, r"bias_ih_l0 must have shape \(16,\), found \(12,\)"),
    "gates": ({**LSTM_SHAPES, "weight_hh_l0": (8, 4)}, r"weight_hh_l0 \(8, 4\) fits no RNN"),
    "no hidden": ({**LSTM_SHAPES, "weight_hh_l0": (16, 0)}, r"weight_hh_l0 \(16, 0\) fits no RNN"),
    "axes": ({**LSTM_SHAPES, "weight_hh_l0": (16,)}, r"weight_hh_l0 must have two axes, found shape \(16,\)"),
    "reverse": ({**LSTM_SHAPES, "weight_ih_l0_reverse": (16, 3)}, "weight_hh_l0_reverse is missing"),
    "cell and layer": (
        {**LSTM_SHAPES, "bias_hh": (16,)},
        "found bias_hh \\(of a cell\\) and weight_ih_l0 \\(of a layer\\)",
    ),
    "bias alone": ({"out.bias": (4,)}, "out: expected a weight with two axes, found bias"),
    "conv": ({"out.weight": (4, 3, 2)}, "out: expected a weight with two axes, found weight"),
    "nothing": ({}, "found no array"),
    "text": ({"epoch": "3"}, r"expected a state_dict \(name -> array\), found 'epoch' \(str\)"),
    "number": ({3: (2, 2)}, r"found 3 \(ndarray\)"),
}


@pytest.mark.parametrize("case", INVALID_STATE_DICTS)
def test_invalid_state_dicts_raise(case):
    shapes, message = INVALID_STATE_DICTS[case]
    source = {k: v if isinstance(v, str) else np.zeros(v) for k, v in shapes.items() if v is not None}
    with pytest.raises(InputError, match=message) as error:
        xprnn.from_torch(source)
    assert "\n" not in str(error.value)


def test_mixed_dtypes_need_like():
    source = {"weight_ih_l0": np.zeros((12, 3), "f4"), "weight_hh_l0": np.zeros((12, 4), "f8")}
    with pytest.raises(InputError, match="its arrays are float32 and float64: pass like"):
        xprnn.from_torch(source)
    assert xprnn.from_torch(source, like=FLOAT64)[1]["weight_ih_l0"].dtype == np.float64


def test_invalid_arguments_raise():
    module = build_layer("GRU", {"input_size": 3, "hidden_size": 2})
    with pytest.raises(InputError, match="nonlinearity and batch_first are read from the module"):
        xprnn.from_torch(module, batch_first=True)
    with pytest.raises(InputError, match=r"expected a path, a state_dict \(a dict\) or an nn.Module, found int"):
        xprnn.from_torch(3)
    with pytest.raises(InputError, match="like must be an array"):
        xprnn.from_torch(module, like="float64")
    source = {"weight_ih_l0": np.zeros((12, 3)), "weight_hh_l0": np.zeros((12, 4))}
    with pytest.raises(InputError, match="nonlinearity must be 'tanh' or 'relu', found 'sigmoid'"):
        xprnn.from_torch(source, nonlinearity="sigmoid")
    with pytest.raises(InputError, match="batch_first must be True or False, found 3"):
        xprnn.from_torch(source, batch_first=3)
