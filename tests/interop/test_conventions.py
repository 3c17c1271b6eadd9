"""Gate orders and layouts of torch, Keras and ONNX: published orders, shapes, and exact round trips."""

from __future__ import annotations

import numpy as np
import pytest

from xprnn.arrays.namespace import InputError, namespace
from xprnn.interop import conventions

GATE_COUNTS = {"elman": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
FRAMEWORKS = ("torch", "keras", "onnx")
D, H = 3, 2


def torch_params(rng, cell, bias=True, peepholes=False):
    gates = GATE_COUNTS[cell]
    params = {"weight_ih": rng.normal(size=(gates * H, D)), "weight_hh": rng.normal(size=(gates * H, H))}
    if bias:
        params |= {name: rng.normal(size=gates * H) for name in ("bias_ih", "bias_hh")}
    if peepholes:
        params |= {f"weight_p{gate}": rng.normal(size=H) for gate in "ifo"}
    return params


# Copied from the documentation of ONNX and Keras, independently of the table in xprnn.
PUBLISHED = {
    ("lstm", "onnx"): [0, 3, 1, 2],
    ("gru", "onnx"): [1, 0, 2],
    ("gru_reset_before", "onnx"): [1, 0, 2],
    ("lstm", "keras"): [0, 1, 2, 3],
    ("gru", "keras"): [1, 0, 2],
    ("gru_reset_before", "keras"): [1, 0, 2],
}


@pytest.mark.parametrize(("cell", "framework"), PUBLISHED)
def test_gate_orders_equal_published_orders(cell, framework):
    order = PUBLISHED[cell, framework]
    assert conventions.gate_order(cell, "torch", framework) == order
    assert [order[k] for k in conventions.gate_order(cell, framework, "torch")] == list(range(len(order)))


def test_shapes_and_gate_positions_in_onnx_and_keras(rng):
    params = torch_params(rng, "lstm", peepholes=True)
    onnx = conventions.to_framework("onnx", "lstm", params)
    assert {k: v.shape for k, v in onnx.items()} == {"W": (8, D), "R": (8, H), "B": (16,), "P": (6,)}
    i, f, g, o = (slice(k * H, k * H + H) for k in range(4))
    np.testing.assert_array_equal(onnx["R"][2:4], params["weight_hh"][o])
    np.testing.assert_array_equal(onnx["B"][8 + 4 : 8 + 6], params["bias_hh"][f])
    np.testing.assert_array_equal(onnx["P"][2:4], params["weight_po"])
    del params["weight_pi"], params["weight_pf"], params["weight_po"]
    keras = conventions.to_framework("keras", "lstm", params)
    assert {k: v.shape for k, v in keras.items()} == {"kernel": (D, 8), "recurrent_kernel": (H, 8), "bias": (8,)}
    np.testing.assert_array_equal(keras["kernel"][:, 4:6], params["weight_ih"][g].T)
    np.testing.assert_array_equal(keras["bias"][:2], params["bias_ih"][i] + params["bias_hh"][i])
    params = torch_params(rng, "gru")
    keras = conventions.to_framework("keras", "gru", params)
    assert keras["bias"].shape == (2, 6)
    np.testing.assert_array_equal(keras["bias"][1, :2], params["bias_hh"][2:4])
    assert conventions.to_framework("keras", "gru_reset_before", params)["bias"].shape == (6,)


@pytest.mark.parametrize("cell", GATE_COUNTS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("bias", [False, True])
def test_round_trip_through_each_framework_is_exact(rng, cell, framework, bias):
    params = torch_params(rng, cell, bias, peepholes=cell == "lstm" and framework != "keras")
    restored = conventions.from_framework(framework, cell, conventions.to_framework(framework, cell, params))
    if bias and conventions.CONVENTIONS[framework].bias_layouts[cell] == "summed":
        np.testing.assert_array_equal(restored.pop("bias_ih"), params.pop("bias_ih") + params["bias_hh"])
        np.testing.assert_array_equal(restored.pop("bias_hh"), np.zeros_like(params.pop("bias_hh")))
    assert restored.keys() == params.keys()
    for name in params:
        np.testing.assert_array_equal(restored[name], params[name], err_msg=name)


def test_unknown_arrays_and_unequal_blocks_raise(rng):
    with pytest.raises(InputError, match="keras: lstm cannot have weight_pf, weight_pi, weight_po"):
        conventions.to_framework("keras", "lstm", torch_params(rng, "lstm", peepholes=True))
    with pytest.raises(InputError, match="onnx: lstm cannot have weight_hr"):
        conventions.to_framework("onnx", "lstm", {**torch_params(rng, "lstm"), "weight_hr": np.zeros((1, H))})
    with pytest.raises(InputError, match="onnx: gru has no kernel"):
        conventions.from_framework("onnx", "gru", {"kernel": np.zeros((D, 6))})
    with pytest.raises(InputError, match=r"axis 0 of shape \(7, 3\) is not 4 blocks"):
        conventions.from_framework("onnx", "lstm", {"W": np.zeros((7, 3)), "R": np.zeros((8, 2))})


def test_layouts_of_sequences_and_states_in_onnx_and_keras(rng, xp, dtype):
    """ONNX's Y[t, d, n, h] is y[t, n, d*H + h]. Keras's list of states is h, c for each layer and direction."""
    host_y = rng.normal(size=(5, 4, 2 * H))
    y = xp.asarray(host_y, dtype)
    ns = namespace(y)
    onnx_y = conventions.split_directions(ns, y, 2)
    expected_y = host_y.reshape(5, 4, 2, H).swapaxes(1, 2)
    np.testing.assert_array_equal(xp.to_numpy(onnx_y), expected_y.astype(dtype))
    np.testing.assert_array_equal(xp.to_numpy(conventions.merge_directions(ns, onnx_y)), host_y.astype(dtype))
    np.testing.assert_array_equal(
        xp.to_numpy(conventions.swap_leading_axes(ns, onnx_y)), expected_y.swapaxes(0, 1).astype(dtype)
    )
    h, c = rng.normal(size=(2, 6, 4, H)).astype(dtype)
    keras_states = conventions.flatten_states((xp.asarray(h, dtype), xp.asarray(c, dtype)))
    for array, expected in zip(keras_states, (h[0], c[0], h[1], c[1]), strict=False):
        np.testing.assert_array_equal(xp.to_numpy(array), expected)
    for array, expected in zip(conventions.unflatten_states(ns, keras_states, 2), (h, c), strict=True):
        np.testing.assert_array_equal(xp.to_numpy(array), expected)
    (restored,) = [
        xp.to_numpy(a) for a in (conventions.unflatten_states(ns, conventions.flatten_states(xp.asarray(h, dtype)), 1),)
    ]
    np.testing.assert_array_equal(restored, h)
