"""Gate orders and layouts: the one table, against cells written out gate by gate, and around every loop."""

from __future__ import annotations

import numpy as np
import pytest

from xprnn.arrays.namespace import InputError, namespace
from xprnn.interop import conventions

GATES = {"elman": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
SYSTEMS = ("torch", "keras", "onnx")
D, H = 3, 2


def own_params(rng, cell, bias=True, peepholes=False):
    g = GATES[cell]
    own = {"weight_ih": rng.normal(size=(g * H, D)), "weight_hh": rng.normal(size=(g * H, H))}
    if bias:
        own |= {name: rng.normal(size=g * H) for name in ("bias_ih", "bias_hh")}
    if peepholes:
        own |= {f"weight_p{gate}": rng.normal(size=H) for gate in "ifo"}
    return own


# The published orders, written out once more: a slip in the table shows here.
PUBLISHED = {
    ("lstm", "onnx"): [0, 3, 1, 2],
    ("gru", "onnx"): [1, 0, 2],
    ("gru_reset_before", "onnx"): [1, 0, 2],
    ("lstm", "keras"): [0, 1, 2, 3],
    ("gru", "keras"): [1, 0, 2],
    ("gru_reset_before", "keras"): [1, 0, 2],
}


@pytest.mark.parametrize(("cell", "system"), PUBLISHED)
def test_the_published_gate_orders(cell, system):
    order = PUBLISHED[cell, system]
    assert conventions.gate_order(cell, "torch", system) == order
    assert [order[k] for k in conventions.gate_order(cell, system, "torch")] == list(range(len(order)))


def test_the_shapes_and_places_of_each_system(rng):
    own = own_params(rng, "lstm", peepholes=True)
    onnx = conventions.to_framework("onnx", "lstm", own)
    assert {k: v.shape for k, v in onnx.items()} == {"W": (8, D), "R": (8, H), "B": (16,), "P": (6,)}
    i, f, g, o = (slice(k * H, k * H + H) for k in range(4))
    np.testing.assert_array_equal(onnx["R"][2:4], own["weight_hh"][o])
    np.testing.assert_array_equal(onnx["B"][8 + 4 : 8 + 6], own["bias_hh"][f])
    np.testing.assert_array_equal(onnx["P"][2:4], own["weight_po"])
    del own["weight_pi"], own["weight_pf"], own["weight_po"]
    keras = conventions.to_framework("keras", "lstm", own)
    assert {k: v.shape for k, v in keras.items()} == {"kernel": (D, 8), "recurrent_kernel": (H, 8), "bias": (8,)}
    np.testing.assert_array_equal(keras["kernel"][:, 4:6], own["weight_ih"][g].T)
    np.testing.assert_array_equal(keras["bias"][:2], own["bias_ih"][i] + own["bias_hh"][i])
    own = own_params(rng, "gru")
    keras = conventions.to_framework("keras", "gru", own)
    assert keras["bias"].shape == (2, 6)
    np.testing.assert_array_equal(keras["bias"][1, :2], own["bias_hh"][2:4])
    assert conventions.to_framework("keras", "gru_reset_before", own)["bias"].shape == (6,)


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back(rng, cell, system, bias):
    own = own_params(rng, cell, bias, peepholes=cell == "lstm" and system != "keras")
    back = conventions.from_framework(system, cell, conventions.to_framework(system, cell, own))
    if bias and conventions.CONVENTIONS[system].bias_layouts[cell] == "summed":
        np.testing.assert_array_equal(back.pop("bias_ih"), own.pop("bias_ih") + own["bias_hh"])
        np.testing.assert_array_equal(back.pop("bias_hh"), np.zeros_like(own.pop("bias_hh")))
    assert back.keys() == own.keys()
    for name in own:
        np.testing.assert_array_equal(back[name], own[name], err_msg=name)


def test_what_a_system_has_no_place_for(rng):
    with pytest.raises(InputError, match="keras: lstm cannot have weight_pf, weight_pi, weight_po"):
        conventions.to_framework("keras", "lstm", own_params(rng, "lstm", peepholes=True))
    with pytest.raises(InputError, match="onnx: lstm cannot have weight_hr"):
        conventions.to_framework("onnx", "lstm", {**own_params(rng, "lstm"), "weight_hr": np.zeros((1, H))})
    with pytest.raises(InputError, match="onnx: gru has no kernel"):
        conventions.from_framework("onnx", "gru", {"kernel": np.zeros((D, 6))})
    with pytest.raises(InputError, match=r"axis 0 of shape \(7, 3\) is not 4 blocks"):
        conventions.from_framework("onnx", "lstm", {"W": np.zeros((7, 3)), "R": np.zeros((8, 2))})


def test_sequences_and_states(rng, xp, dtype):
    """Y[t, d, n, h] of ONNX is y[t, n, d*H + h]; state k of Keras is h, then c, of layer and direction k."""
    host = rng.normal(size=(5, 4, 2 * H))
    y = xp.asarray(host, dtype)
    ns = namespace(y)
    there = conventions.split_directions(ns, y, 2)
    want = host.reshape(5, 4, 2, H).swapaxes(1, 2)
    np.testing.assert_array_equal(xp.to_numpy(there), want.astype(dtype))
    np.testing.assert_array_equal(xp.to_numpy(conventions.merge_directions(ns, there)), host.astype(dtype))
    np.testing.assert_array_equal(
        xp.to_numpy(conventions.swap_leading_axes(ns, there)), want.swapaxes(0, 1).astype(dtype)
    )
    h, cell = rng.normal(size=(2, 6, 4, H)).astype(dtype)
    flat = conventions.flatten_states((xp.asarray(h, dtype), xp.asarray(cell, dtype)))
    for have, wanted in zip(flat, (h[0], cell[0], h[1], cell[1]), strict=False):
        np.testing.assert_array_equal(xp.to_numpy(have), wanted)
    for have, wanted in zip(conventions.unflatten_states(ns, flat, 2), (h, cell), strict=True):
        np.testing.assert_array_equal(xp.to_numpy(have), wanted)
    (one,) = [
        xp.to_numpy(a) for a in (conventions.unflatten_states(ns, conventions.flatten_states(xp.asarray(h, dtype)), 1),)
    ]
    np.testing.assert_array_equal(one, h)
