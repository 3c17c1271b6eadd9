"""Twenty Adam steps from the same parameters and batches give the same losses as torch."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn.charlm.corpus import BatchedText, Vocabulary, batchify, default_text

pytestmark = pytest.mark.needs("torch")
STEPS, BATCH, WINDOW, HIDDEN, RATE = 20, 8, 32, 48, 2e-2
CLIP = {"RNN": 1.0, "LSTM": 0.5, "GRU": 1.0}  # between the smallest and the largest gradient norm of the twenty steps


@pytest.fixture(scope="module")
def text():
    characters = default_text()[:20_000]
    vocabulary = Vocabulary.from_text(characters)
    return len(vocabulary), BatchedText(*batchify(vocabulary.encode(characters), BATCH, WINDOW), WINDOW)


def xprnn_losses(model, params, text, clip):
    optimiser, state, losses, norms = xprnn.adam(RATE), None, [], []
    moments = optimiser.init(params)
    for step in range(STEPS):
        x, targets = text.batch(step)
        logits, state, tape = model.forward(params, x, state)
        loss, dlogits = xprnn.cross_entropy(logits, targets)
        gradients, norm = xprnn.clip_by_global_norm(model.backward(tape, dlogits)[2], clip)
        params, moments = optimiser.update(params, gradients, moments)
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms


def torch_losses(kind, num_layers, characters, params, text):
    import torch

    torch.manual_seed(0)
    rnn = getattr(torch.nn, kind)(characters, HIDDEN, num_layers=num_layers, dtype=torch.float64)
    net = torch.nn.ModuleDict({"rnn": rnn, "head": torch.nn.Linear(HIDDEN, characters, dtype=torch.float64)})
    net.load_state_dict({name: torch.tensor(array) for name, array in params.items()})
    optimiser, state, losses, norms = torch.optim.Adam(net.parameters(), lr=RATE), None, [], []
    for step in range(STEPS):
        x, targets = (torch.tensor(a) for a in text.batch(step))
        y, state = rnn(torch.nn.functional.one_hot(x, characters).double(), state)
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        loss = torch.nn.functional.cross_entropy(net["head"](y).flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP[kind])))
        optimiser.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_losses_of_twenty_adam_steps_equal_torch(text, rng, kind, num_layers):
    characters, windows = text
    rnn = getattr(xprnn, kind)(characters, HIDDEN, num_layers=num_layers)
    model = xprnn.Sequential(rnn=rnn, head=xprnn.Linear(HIDDEN, characters))
    params = model.init(rng, like=np.zeros(1))
    params["head.weight"] = params["head.weight"] * 4  # makes the first gradients large enough to be clipped
    losses, norms = xprnn_losses(model, params, windows, CLIP[kind])
    expected, expected_norms = torch_losses(kind, num_layers, characters, params, windows)
    assert max(expected_norms) > CLIP[kind] > min(expected_norms), "expected clipped and unclipped steps"
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    # Both libraries divide by norm + 1e-6; a difference there would change the losses but not the norms.
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-8)
    assert losses[-1] < losses[0] - 0.5
