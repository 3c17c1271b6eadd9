"""Adapters of the libraries that compute on plain arrays: xprnn, the article's code, Thinc."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.features.problem import (
    LEAK,
    D,
    FeatureProblem,
    H,
    N,
    T,
    UnsupportedFeatureError,
    judge_results,
    public_names_containing,
    random_problem,
    signature_error,
    to_numpy,
)
from benchmarks.features.questions import LibraryAdapter
from benchmarks.harness.agreement import relative_error

__all__ = ["Article", "Thinc", "Xprnn"]


class Xprnn(LibraryAdapter):
    """This repository's xprnn."""

    def __init__(self) -> None:
        super().__init__()
        import xprnn

        self.module, self.version = xprnn, xprnn.__version__

    def layer(self, cell: str) -> Any:
        """Create the layer of a cell."""
        x = self.module
        if cell == "leaky":
            return x.Recurrent(D, H, cell=x.Cell("leaky", 1, leaky_cell))
        return {"rnn": x.RNN, "lstm": x.LSTM, "gru": partial(x.GRU, reset_after=False)}[cell](D, H)

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Run Layer.forward and backward."""
        to_array, layer, pair = to_array or self.to_array, self.layer(p.cell), p.cell == "lstm"
        a = {k: to_array(v) for k, v in p.arrays.items()}
        zero = to_array(np.zeros_like(p.arrays["bias_ih"]))
        params = {f"{name}_l0": a[name] for name in ("weight_ih", "weight_hh", "bias_ih")} | {"bias_hh_l0": zero}
        h0, c0 = (to_array(p.arrays[k][None]) for k in ("h0", "c0"))
        mask = None if p.lengths or p.mask is None else to_array(p.mask)
        reset = None if p.reset is None else to_array(p.reset)
        state = (h0, c0) if pair else h0
        y, final, tape = layer.forward(params, a["x"], state, lengths=p.lengths, mask=mask, reset=reset)
        dh = to_array(p.dh[None])
        dstate = (dh, to_array(np.zeros_like(p.dh[None]))) if pair else dh
        dx, dstate, dparams = layer.backward(tape, to_array(p.dy), dstate)
        results = {"y": y, "h": (final[0] if pair else final)[0, ...], "dx": dx}
        results |= {f"d{name}": dparams[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih")}
        results["dh0"] = (dstate[0] if pair else dstate)[0, ...]
        return results | ({"dc0": dstate[1][0, ...]} if pair else {})

    def column_softmax(self, x: Any) -> Any:
        """Call the softmax with the article's name."""
        return self.module.softmax(x)

    def layer_sizes(self) -> str:
        """Create a layer with two hidden sizes and look at the width of y."""
        layer = self.module.RNN(D, self.layer_widths, num_layers=2)
        params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        y, _ = layer(params, np.ones((T, N, D)))
        return "yes" if y.shape[-1] == self.layer_widths[-1] else "no"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """Return the outputs and the states that the tape holds."""
        layer, a = self.layer("lstm"), p.arrays
        params = {f"{name}_l0": a[name] for name in ("weight_ih", "weight_hh", "bias_ih")}
        params["bias_hh_l0"] = 0 * a["bias_ih"]
        y, final, tape = layer.forward(params, a["x"])
        return [y, *final, *(s for states in tape.states() for s in states)]

    def gradient_checker(self) -> str:
        """Check a right and a wrong gradient with check_gradients."""
        check = self.module.check_gradients
        check(lambda x: (x * x, x), lambda x, dy: dy * 2 * x, [np.ones(3)])
        try:
            check(lambda x: (x * x, x), lambda x, dy: dy * x, [np.ones(3)])
        except AssertionError:
            return "yes (check_gradients)"
        return "no"

    def bounded_memory(self) -> str:
        """Compare the peak memory and the gradients with and without checkpoints."""
        layer, rng = self.module.LSTM(16, 16), np.random.default_rng(0)
        params = layer.init(rng, like=np.zeros(0))
        x = rng.standard_normal((4000, 4, 16))
        peaks, grads = [], []
        for checkpoint in (None, "sqrt"):
            tracemalloc.start()
            y, _, tape = layer.forward(params, x, checkpoint=checkpoint)
            grads.append(layer.backward(tape, np.ones_like(y)))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        error = max(relative_error(grads[1].dparams[k], v) for k, v in grads[0].dparams.items())
        return f"yes (checkpoint=: peak {peaks[1] / peaks[0]:.2f} of the full one, gradients differ by {error:.0e})"


def leaky_cell(xp: Any) -> Any:
    """Return the step of the user-defined cell and its adjoint."""

    def step(x: Any, h: Any, state: Any, p: Any) -> Any:
        a = xp.tanh(x[0] + h[0])
        return ((1 - LEAK) * state[0] + LEAK * a,), (a,)

    def backward(dstate: Any, saved: Any, state: Any, p: Any) -> Any:
        da = dstate[0] * (LEAK * (1 - saved[0] * saved[0]))
        return (da,), (da,), (dstate[0] * (1 - LEAK),), ()

    return step, backward


class Article(LibraryAdapter):
    """The article's functions with their float64 zeros."""

    def __init__(self) -> None:
        super().__init__(default_cell="rnn")
        from benchmarks.harness import article_baseline

        self.module, self.version = article_baseline, ""
        names = (n for n in dir(article_baseline) if n.startswith(("rnn_f", "rnn_b", "soft")))
        self.unsupported_error = UnsupportedFeatureError(f"has {', '.join(names)}")

    def signature_error(self) -> UnsupportedFeatureError:
        """List the arguments of rnn_forward."""
        return signature_error(self.module.rnn_forward, exclude=("zeros_dtype",))

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Run rnn_forward and rnn_backward."""
        if p.cell in ("lstm", "gru"):
            raise self.unsupported_error
        if p.mask is not None or p.reset is not None or p.cell == "leaky":
            raise self.signature_error()
        to_array, a = to_array or self.to_array, p.arrays
        parameters = {"Wax": a["weight_ih"], "Waa": a["weight_hh"], "ba": a["bias_ih"][:, None]}
        parameters |= {"Wya": np.ones_like(a["weight_hh"][:1]), "by": np.ones_like(a["bias_ih"][:1, None])}
        parameters = {k: to_array(v) for k, v in parameters.items()}
        y, _, caches = self.module.rnn_forward(to_array(a["x"].T), to_array(a["h0"].T), parameters, np.float64)
        da = p.dy.T.copy()
        da[:, :, -1:] += p.dh.T[:, :, None]  # the final state is the last entry of y
        g = self.module.rnn_backward(to_array(da), caches, np.float64)
        results = {"y": y.T, "h": y.T[-1], "dx": g["dx"].T, "dh0": g["da0"].T}
        return results | {"dweight_ih": g["dWax"], "dweight_hh": g["dWaa"], "dbias_ih": g["dba"][:, 0]}

    def column_softmax(self, x: Any) -> Any:
        """Call the article's softmax, which subtracts the maximum of the whole array."""
        return self.module.softmax(x)

    def layer_sizes(self) -> str:
        """Report the arguments: there is one layer."""
        raise self.signature_error()

    def bounded_memory(self) -> str:
        """Report the arguments: none bounds the memory."""
        raise self.signature_error()

    def gradient_checker(self) -> str:
        """Report the functions: none checks gradients."""
        raise self.unsupported_error

    def wrong_state_shape(self) -> str:
        """Run the forward pass; only the backward pass would fail on the shapes."""
        p = random_problem("rnn", random_state=True)
        a = p.arrays
        bias = a["bias_ih"][:, None]
        weights = {"Wax": a["weight_ih"], "Waa": a["weight_hh"], "ba": bias, "Wya": a["weight_hh"], "by": bias}
        self.module.rnn_forward(a["x"].T, a["h0"][:1].T, weights)
        return "no (used for every row)"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """Report the functions: there is no LSTM."""
        raise self.unsupported_error


class Thinc(LibraryAdapter):
    """Thinc's LSTM, the model and its callback, not its wrapper of torch's LSTM."""

    def __init__(self) -> None:
        super().__init__(precision="float32")
        import thinc
        from thinc import api

        self.api, self.version = api, thinc.__version__
        self.ops: Any = api.NumpyOps()

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Run LSTM(nO, nI) on the list of sequences, padded by Thinc."""
        if p.cell != "lstm":
            names = (n for n in dir(self.api) if n.endswith(("LSTM", "GRU", "RNN")))
            raise UnsupportedFeatureError(f"has {', '.join(names)}")
        to_array = to_array or self.to_array
        if (p.mask is not None and p.lengths is None) or p.reset is not None:
            raise UnsupportedFeatureError(f"a Padded has {', '.join(self.api.Padded.__dataclass_fields__)}")
        a, order = p.arrays, [1, 0, 3, 2]  # Thinc's gates are f,i,o,g
        block = [a[k].reshape(4, H, -1)[order] for k in ("weight_ih", "bias_ih", "weight_hh")]
        model = self.api.LSTM(H, D)
        model.ops = self.ops
        model.initialize()
        model.set_param("LSTM", np.concatenate([v.ravel() for v in block] + [0 * a["bias_ih"]]).astype("f"))
        model.set_param("HC0", np.stack([a["h0"][:1], a["c0"][:1]])[:, None].astype("f"))
        lengths = p.lengths or [len(a["x"])] * N
        padded = self.ops.list2padded([to_array(a["x"][:n, k]) for k, n in enumerate(lengths)])
        Y, back = model(padded, is_train=True)
        dy = p.dy.copy()
        for k, n in enumerate(lengths):  # the final state is the last output of the row
            dy[n - 1, k] += p.dh[k]
        dX = back(self.ops.list2padded([to_array(dy[:n, k]) for k, n in enumerate(lengths)]))
        y, dx = (self.pad_sequences(self.ops.padded2list(v), len(a["x"])) for v in (Y, dX))
        grad, cut = model.get_grad("LSTM"), np.cumsum([v.size for v in block])
        parts = [v.reshape(4, H, -1)[order].reshape(4 * H, -1) for v in np.split(grad[: cut[-1]], cut[:-1])]
        h = np.stack([y[n - 1, k] for k, n in enumerate(lengths)])
        results = {"y": y, "h": h, "dx": dx}
        results |= {"dweight_ih": parts[0], "dweight_hh": parts[2], "dbias_ih": parts[1][:, 0]}
        return results | ({"dh0": model.get_grad("HC0")} if model.has_grad("HC0") else {})

    def pad_sequences(self, rows: list[Any], steps: int) -> Any:
        """Pad sequences of several lengths to one (T,N,H) array."""
        out = np.zeros((steps, len(rows), rows[0].shape[1]), rows[0].dtype)
        for k, row in enumerate(rows):
            out[: len(row), k] = row
        return out

    def lstm(self) -> str:
        """Compare Thinc's Cython ops and its generic ops."""
        from thinc.backends.ops import Ops

        texts = []
        for ops in (self.api.NumpyOps(), Ops()):
            self.ops = ops
            name = type(ops).__name__
            if name == "Ops" and self.api.CupyOps.backprop_lstm is Ops.backprop_lstm:
                name = "Ops, inherited by CupyOps,"
            texts.append(f"{name} {self.answer_with_errors('lstm')}")
        self.ops = self.api.NumpyOps()
        return "; ".join(texts)

    def initial_state(self) -> str:
        """Give all rows the same state: the model has one for all rows."""
        p = random_problem("lstm", dtype="float32", random_state=True)
        same = {k: np.repeat(p.arrays[k][:1], N, axis=0) for k in ("h0", "c0")}
        p = replace(p, arrays=p.arrays | same)
        right, text = judge_results(self.run(p), p, states=True)
        return "yes" if right else f"no ({text})"

    def wrong_state_shape(self) -> str:
        """Report the shape of the parameter that holds the state."""
        model = self.api.LSTM(H, D).initialize()
        raise UnsupportedFeatureError(f"one state for all rows: HC0 {model.get_param('HC0').shape}")

    def column_softmax(self, x: Any) -> Any:
        """Call the softmax of Thinc's ops."""
        return self.ops.softmax(x, axis=0)

    def layer_sizes(self) -> str:
        """Report the arguments: all layers have one width."""
        raise signature_error(self.api.LSTM)

    def bounded_memory(self) -> str:
        """Report the arguments: none bounds the memory."""
        raise signature_error(self.api.LSTM)

    def gradient_checker(self) -> str:
        """Search the public names for a gradient checker."""
        names = public_names_containing(self.api, "grad", "check")
        raise UnsupportedFeatureError(f"names with 'grad' and 'check': {', '.join(names) or 'none'}")

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """Return the outputs, which are all that the model returns."""
        return [to_numpy(self.run(p)["y"])]
