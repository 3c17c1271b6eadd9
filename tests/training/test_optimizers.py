"""Optimisers against torch.optim and their published formulas; gradient clipping; learning-rate schedules."""

from __future__ import annotations

import numpy as np
import pytest
from support.fast_paths import with_and_without_jit

import xprnn
from xprnn import clip_by_global_norm, clip_by_value
from xprnn.kernels.config import allow_jit
from xprnn.training.optimizers import cosine, warmup

STEPS = 20
RULES = {
    "sgd": (xprnn.sgd(0.1), "SGD", {"lr": 0.1}),
    "momentum": (xprnn.sgd(0.1, 0.9), "SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (
        xprnn.sgd(0.1, 0.9, nesterov=True),
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    "adagrad": (xprnn.adagrad(0.05), "Adagrad", {"lr": 0.05}),
    "rmsprop": (xprnn.rmsprop(0.02, 0.9), "RMSprop", {"lr": 0.02, "alpha": 0.9}),
    "adam": (xprnn.adam(0.03, 0.8, 0.99), "Adam", {"lr": 0.03, "betas": (0.8, 0.99)}),
    "adam, large eps": (xprnn.adam(0.03, eps=0.1), "Adam", {"lr": 0.03, "eps": 0.1}),
    "adamw": (xprnn.adamw(0.03, weight_decay=0.1), "AdamW", {"lr": 0.03, "weight_decay": 0.1}),
}
DEFAULTS = {
    "adagrad": (xprnn.adagrad(), "Adagrad"),
    "rmsprop": (xprnn.rmsprop(), "RMSprop"),
    "adam": (xprnn.adam(), "Adam"),
    "adamw": (xprnn.adamw(), "AdamW"),
}


def random_problem(rng, dtype="float64"):
    """Random parameters and STEPS noise terms; the gradient of a step is 0.5 p plus its noise."""
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    noise = [{k: rng.normal(size=p.shape) for k, p in params.items()} for _ in range(STEPS)]
    return {k: p.astype(dtype) for k, p in params.items()}, [{k: a.astype(dtype) for k, a in e.items()} for e in noise]


def xprnn_path(xp, rule, params, noise):
    """Parameters after each step, and the final state."""
    params, path = xp.asarray(params), []
    state = rule.init(params)
    for e in map(xp.asarray, noise):
        params, state = rule.update(params, {k: 0.5 * p + e[k] for k, p in params.items()}, state)
        path.append(params)
    assert state["step"] == STEPS
    return path, state


def torch_path(name, options, params, noise):
    """Parameters after each step of torch.optim."""
    import torch

    leaves = {k: torch.tensor(p, requires_grad=True) for k, p in params.items()}
    optimiser, path = getattr(torch.optim, name)(leaves.values(), **options), []
    for e in noise:
        for k, leaf in leaves.items():
            leaf.grad = 0.5 * leaf.detach() + torch.tensor(e[k])
        optimiser.step()
        path.append({k: leaf.detach().numpy().copy() for k, leaf in leaves.items()})
    return path


@pytest.mark.needs("torch")
@pytest.mark.parametrize("case", RULES)
def test_twenty_steps_equal_torch(xp, dtype, rng, case):
    rule, name, options = RULES[case]
    params, noise = random_problem(rng, dtype)
    path, _ = xprnn_path(xp, rule, params, noise)
    for step, (got, expected) in enumerate(zip(path, torch_path(name, options, params, noise), strict=True), 1):
        xp.assert_close(got, expected, condition=16 * step)
    xp.assert_like(path[-1], xp.asarray(params["w"]))


@pytest.mark.needs("torch")
@pytest.mark.parametrize("case", DEFAULTS)
def test_default_options_equal_torch(rng, case):
    from support.backends import Backend

    rule, name = DEFAULTS[case]
    params, noise = random_problem(rng)
    path, _ = xprnn_path(Backend.NUMPY, rule, params, noise)
    Backend.NUMPY.assert_close(path[-1], torch_path(name, {}, params, noise)[-1], condition=300)


def published_update(case, p, gradients):
    """One parameter after all steps of the published update rule, in Python floats."""
    m = v = s = u = 0.0
    for t, noise in enumerate(gradients, 1):
        g = 0.5 * p + noise
        match case:
            case "sgd":
                p = p - 0.1 * g
            case "momentum" | "nesterov":
                u = 0.9 * u + g
                p = p - 0.1 * (g + 0.9 * u if case == "nesterov" else u)
            case "adagrad":
                s = s + g**2
                p = p - 0.05 * g / (s**0.5 + 1e-10)
            case "rmsprop":
                s = 0.9 * s + 0.1 * g**2
                p = p - 0.02 * g / (s**0.5 + 1e-8)
            case _:
                b1, b2, eps = {"adam": (0.8, 0.99, 1e-8), "adam, large eps": (0.9, 0.999, 0.1)}.get(
                    case, (0.9, 0.999, 1e-8)
                )
                p = p * (1 - 0.03 * 0.1) if case == "adamw" else p
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                p = p - 0.03 * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)
    return p


@pytest.mark.parametrize("case", RULES)
def test_twenty_steps_equal_the_published_formulas(xp, dtype, rng, case):
    params, noise = random_problem(rng, dtype)
    path, state = xprnn_path(xp, RULES[case][0], params, noise)
    for key, p in params.items():
        expected = [published_update(case, float(p[i]), [float(e[key][i]) for e in noise]) for i in np.ndindex(p.shape)]
        xp.assert_close(path[-1][key], np.reshape(expected, p.shape), condition=300)
    xp.assert_like({k: s for k, s in state.items() if k != "step"}, xp.asarray(params["w"]))


@pytest.mark.parametrize("case", RULES)
def test_update_changes_no_argument(case, rng):
    """Parameters, gradients and state are compared bit for bit before and after an update."""
    rule = RULES[case][0]
    params, noise = random_problem(rng)
    _, state = rule.update(params, noise[0], rule.init(params))
    before = {k: p.copy() for k, p in params.items()}, {k: e.copy() for k, e in noise[1].items()}
    moments = {m: {k: a.copy() for k, a in state[m].items()} for m in rule.moments}
    first = rule.update(params, noise[1], state)
    second = rule.update(params, noise[1], state)
    for k in params:
        np.testing.assert_array_equal(params[k], before[0][k])
        np.testing.assert_array_equal(noise[1][k], before[1][k])
        np.testing.assert_array_equal(first[0][k], second[0][k])
        for m in rule.moments:
            np.testing.assert_array_equal(state[m][k], moments[m][k])
    assert state["step"] == 1


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_by_global_norm_equals_numpy(xp, dtype, rng, max_norm):
    host = {k: g.astype("float64") for k, g in random_problem(rng, dtype)[0].items()}
    grads = xp.asarray(host, dtype)
    clipped, norm = clip_by_global_norm(grads, max_norm)
    expected_norm = np.sqrt(sum(np.sum(g**2) for g in host.values()))
    xp.assert_close(norm, np.asarray(expected_norm), condition=16)
    xp.assert_close(clipped, {k: g * min(1, max_norm / (expected_norm + 1e-6)) for k, g in host.items()}, condition=16)
    xp.assert_like((clipped, norm), grads["w"])


@pytest.mark.needs("torch")
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_by_global_norm_equals_torch(xp, rng, max_norm):
    import torch

    grads = random_problem(rng, xp.float_dtypes[0])[0]
    leaves = [torch.zeros(g.shape, dtype=torch.tensor(g).dtype, requires_grad=True) for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = torch.tensor(g)
    total = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    clipped, norm = clip_by_global_norm(xp.asarray(grads), max_norm)
    xp.assert_close(norm, total.numpy(), condition=16)
    xp.assert_close(clipped, {k: leaf.grad.numpy() for k, leaf in zip(grads, leaves, strict=True)}, condition=16)


def test_clipping_zero_gradients_does_not_divide_by_zero(xp, dtype):
    clipped, norm = clip_by_global_norm({"w": xp.asarray(np.zeros(3), dtype)}, 1.0)
    xp.assert_close((clipped["w"], norm), (np.zeros(3), np.asarray(0.0)), condition=0)


def test_clip_by_value_bounds_every_entry(xp, dtype):
    grad = xp.asarray(np.asarray([-3.0, -0.5, 0.0, 0.5, 7.0]), dtype)
    clipped = clip_by_value({"w": grad}, 0.5)["w"]
    xp.assert_close(clipped, np.asarray([-0.5, -0.5, 0.0, 0.5, 0.5]), condition=0)
    xp.assert_like(clipped, grad)


def test_cosine_and_warmup_values():
    rate = cosine(0.4, 100, final=0.1)
    assert [rate(0), rate(100), rate(1000)] == pytest.approx([0.4, 0.1, 0.1])
    assert rate(50) == pytest.approx(0.25)
    assert rate(25) == pytest.approx(0.1 + 0.15 * (1 + np.sqrt(0.5)))
    rising = warmup(rate, 10)
    assert [rising(k) for k in (0, 4, 9)] == pytest.approx([0.1 * rate(0), 0.5 * rate(4), rate(9)])
    assert warmup(0.3, 0)(0) == 0.3


def test_schedule_is_called_with_steps_from_zero(xp):
    steps = []

    def rate(step):
        steps.append(step)
        return 0.5**step

    rule, p = xprnn.sgd(rate), {"w": xp.asarray([8.0])}
    state = rule.init(p)
    for _ in range(3):
        p, state = rule.update(p, {"w": xp.asarray([1.0])}, state)
    assert steps == [0, 1, 2]
    xp.assert_close(p["w"], np.asarray([8.0 - 1.0 - 0.5 - 0.25]), condition=1)


@with_and_without_jit
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad"])
def test_blockwise_update_equals_one_block_for_every_memory_layout(name, jit, monkeypatch):
    """Parameter and gradient may have different memory orders."""
    rng = np.random.default_rng(0)
    opt = getattr(xprnn, name)(0.1)
    p, g = (rng.standard_normal((30, 7)) for _ in range(2))
    layouts = [np.ascontiguousarray, np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]]

    def three_steps(param_layout, grad_layout):
        params, state = {"w": param_layout(p)}, opt.init({"w": param_layout(p)})
        with allow_jit(jit):
            for _ in range(3):
                params, state = opt.update(params, {"w": grad_layout(g)}, state)
        return params["w"], *(state[m]["w"] for m in opt.moments)

    expected = three_steps(layouts[0], layouts[0])
    monkeypatch.setattr("xprnn.training.optimizers._BLOCK_SIZE", 16)
    for param_layout in layouts:
        for grad_layout in layouts:
            for a, b in zip(three_steps(param_layout, grad_layout), expected, strict=True):
                np.testing.assert_array_equal(a, b)
