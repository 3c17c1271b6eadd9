"""The peers that compute on plain arrays: xprnn, the article's code, Thinc."""

from __future__ import annotations

import sys
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path
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
    relative_error,
    signature_error,
    to_numpy,
)
from benchmarks.features.questions import LibraryAdapter

__all__ = ["Article", "Thinc", "Xprnn"]


class Xprnn(LibraryAdapter):
    """This library: the tree beside this file."""

    def __init__(self) -> None:
        super().__init__()
        sys.path.insert(0, str(Path(__file__).parent.parent))
        import xprnn

        self.module, self.version = xprnn, xprnn.__version__

    def layer(self, cell: str) -> Any:
        """The layer of a cell."""
        x = self.module
        if cell == "leaky":
            return x.Recurrent(D, H, cell=x.Cell("leaky", 1, leaky_cell))
        return {"rnn": x.RNN, "lstm": x.LSTM, "gru": partial(x.GRU, reset_after=False)}[cell](D, H)

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Layer.forward and backward."""
        to_array, layer, pair = to_array or self.to_array, self.layer(p.cell), p.cell == "lstm"
        a = {k: to_array(v) for k, v in p.arrays.items()}
        zero = to_array(np.zeros_like(p.arrays["b"]))
        params = {"weight_ih_l0": a["W"], "weight_hh_l0": a["U"], "bias_ih_l0": a["b"], "bias_hh_l0": zero}
        h0, c0 = (to_array(p.arrays[k][None]) for k in ("h0", "c0"))
        keep = None if p.lengths or p.mask is None else to_array(p.mask)
        reset = None if p.reset is None else to_array(p.reset)
        state = (h0, c0) if pair else h0
        y, final, tape = layer.forward(params, a["x"], state, lengths=p.lengths, mask=keep, reset=reset)
        v = to_array(p.dh[None])
        dx, dstate, dp = layer.backward(tape, to_array(p.dy), (v, to_array(np.zeros_like(p.dh[None]))) if pair else v)
        found = {"y": y, "h": (final[0] if pair else final)[0, ...], "dx": dx, "dW": dp["weight_ih_l0"]}
        found |= {"dU": dp["weight_hh_l0"], "db": dp["bias_ih_l0"], "dh0": (dstate[0] if pair else dstate)[0, ...]}
        return found | ({"dc0": dstate[1][0, ...]} if pair else {})

    def column_softmax(self, x: Any) -> Any:
        """The article's name, repaired."""
        return self.module.softmax(x)

    def layer_sizes(self) -> str:
        """Two layers."""
        layer = self.module.RNN(D, self.widths, num_layers=2)
        params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        y, _ = layer(params, np.ones((T, N, D)))
        return "yes" if y.shape[-1] == self.widths[-1] else "no"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """The tape has them."""
        layer, a = self.layer("lstm"), p.arrays
        params = {"weight_ih_l0": a["W"], "weight_hh_l0": a["U"], "bias_ih_l0": a["b"], "bias_hh_l0": 0 * a["b"]}
        y, final, tape = layer.forward(params, a["x"])
        return [y, *final, *(s for states in tape.states() for s in states)]

    def gradient_checker(self) -> str:
        """Passes the right one, refuses the wrong one."""
        check = self.module.check_gradients
        check(lambda x: (x * x, x), lambda x, dy: dy * 2 * x, [np.ones(3)])
        try:
            check(lambda x: (x * x, x), lambda x, dy: dy * x, [np.ones(3)])
        except AssertionError:
            return "yes (check_gradients)"
        return "no"

    def bounded_memory(self) -> str:
        """What NumPy holds at most, with and without."""
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
        wrong = max(relative_error(grads[1].dparams[k], v) for k, v in grads[0].dparams.items())
        return f"yes (checkpoint=: peak {peaks[1] / peaks[0]:.2f} of the full one, gradients differ by {wrong:.0e})"


def leaky_cell(xp: Any) -> Any:
    """The step of the unit in the row `own`, and its adjoint."""

    def step(x: Any, h: Any, state: Any, p: Any) -> Any:
        a = xp.tanh(x[0] + h[0])
        return ((1 - LEAK) * state[0] + LEAK * a,), (a,)

    def back(dstate: Any, saved: Any, state: Any, p: Any) -> Any:
        da = dstate[0] * (LEAK * (1 - saved[0] * saved[0]))
        return (da,), (da,), (dstate[0] * (1 - LEAK),), ()

    return step, back


class Article(LibraryAdapter):
    """The article's five functions with its float64 zeros."""

    def __init__(self) -> None:
        super().__init__(ragged="rnn")
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from benchmarks.harness import article_baseline

        self.module, self.version = article_baseline, ""
        self.unsupported_error = UnsupportedFeatureError(
            f"has {', '.join(n for n in dir(article_baseline) if n.startswith(('rnn_f', 'rnn_b', 'soft')))}"
        )

    def signature_error(self) -> UnsupportedFeatureError:
        """The arguments of its layer."""
        return signature_error(self.module.rnn_forward, exclude=("zeros",))

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """rnn_forward and rnn_backward."""
        if p.cell in ("lstm", "gru"):
            raise self.unsupported_error
        if p.mask is not None or p.reset is not None or p.cell == "leaky":
            raise self.signature_error()
        to_array, a = to_array or self.to_array, p.arrays
        parameters = {"Wax": a["W"], "Waa": a["U"], "ba": a["b"][:, None], "Wya": np.ones_like(a["U"][:1])}
        parameters = {k: to_array(v) for k, v in (parameters | {"by": np.ones_like(a["b"][:1, None])}).items()}
        y, _, caches = self.module.rnn_forward(to_array(a["x"].T), to_array(a["h0"].T), parameters, np.float64)
        da = p.dy.T.copy()
        da[:, :, -1:] += p.dh.T[:, :, None]  # the final state is the last of the states
        g = self.module.rnn_backward(to_array(da), caches, np.float64)
        found = {"y": y.T, "h": y.T[-1], "dx": g["dx"].T, "dh0": g["da0"].T}
        return found | {"dW": g["dWax"], "dU": g["dWaa"], "db": g["dba"][:, 0]}

    def column_softmax(self, x: Any) -> Any:
        """Shifted by the maximum of the whole array."""
        return self.module.softmax(x)

    def layer_sizes(self) -> str:
        """There is one layer."""
        raise self.signature_error()

    def bounded_memory(self) -> str:
        """As sizes."""
        raise self.signature_error()

    def gradient_checker(self) -> str:
        """Among its functions."""
        raise self.unsupported_error

    def wrong_state_shape(self) -> str:
        """Its forward; its backward then stops on the shapes."""
        p = random_problem("rnn", random_state=True)
        a = p.arrays
        weights = {"Wax": a["W"], "Waa": a["U"], "ba": a["b"][:, None], "Wya": a["U"], "by": a["b"][:, None]}
        self.module.rnn_forward(a["x"].T, a["h0"][:1].T, weights)
        return "no (used for every row)"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """No LSTM."""
        raise self.unsupported_error


class Thinc(LibraryAdapter):
    """Thinc's own LSTM, the model and its callback, not its wrapper of torch's."""

    def __init__(self) -> None:
        super().__init__(precision="float32")
        import thinc
        from thinc import api

        self.api, self.version = api, thinc.__version__
        self.ops: Any = api.NumpyOps()

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """LSTM(nO, nI) on the list of sequences, padded by Thinc."""
        if p.cell != "lstm":
            raise UnsupportedFeatureError(
                f"has {', '.join(n for n in dir(self.api) if n.endswith(('LSTM', 'GRU', 'RNN')))}"
            )
        to_array = to_array or self.to_array
        if (p.mask is not None and p.lengths is None) or p.reset is not None:
            raise UnsupportedFeatureError(f"a Padded has {', '.join(self.api.Padded.__dataclass_fields__)}")
        a, order = p.arrays, [1, 0, 3, 2]  # its gates are f,i,o,g
        block = [a[k].reshape(4, H, -1)[order] for k in ("W", "b", "U")]
        model = self.api.LSTM(H, D)
        model.ops = self.ops
        model.initialize()
        model.set_param("LSTM", np.concatenate([v.ravel() for v in block] + [0 * a["b"]]).astype("f"))
        model.set_param("HC0", np.stack([a["h0"][:1], a["c0"][:1]])[:, None].astype("f"))
        lengths = p.lengths or [len(a["x"])] * N
        padded = self.ops.list2padded([to_array(a["x"][:n, k]) for k, n in enumerate(lengths)])
        Y, back = model(padded, is_train=True)
        u = p.dy.copy()
        for k, n in enumerate(lengths):  # the final state is the last of the outputs
            u[n - 1, k] += p.dh[k]
        dX = back(self.ops.list2padded([to_array(u[:n, k]) for k, n in enumerate(lengths)]))
        y, dx = (self.pad_sequences(self.ops.padded2list(v), len(a["x"])) for v in (Y, dX))
        grad, cut = model.get_grad("LSTM"), np.cumsum([v.size for v in block])
        parts = [v.reshape(4, H, -1)[order].reshape(4 * H, -1) for v in np.split(grad[: cut[-1]], cut[:-1])]
        h = np.stack([y[n - 1, k] for k, n in enumerate(lengths)])
        found = {"y": y, "h": h, "dx": dx, "dW": parts[0], "dU": parts[2], "db": parts[1][:, 0]}
        return found | ({"dh0": model.get_grad("HC0")} if model.has_grad("HC0") else {})

    def pad_sequences(self, rows: list[Any], steps: int) -> Any:
        """Sequences of several lengths as one (T,N,.) array."""
        out = np.zeros((steps, len(rows), rows[0].shape[1]), rows[0].dtype)
        for k, row in enumerate(rows):
            out[: len(row), k] = row
        return out

    def lstm(self) -> str:
        """Its Cython ops, and the generic ones."""
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
        """The model keeps one for all rows, so all rows get the same."""
        p = random_problem("lstm", dtype="float32", random_state=True)
        same = {k: np.repeat(p.arrays[k][:1], N, axis=0) for k in ("h0", "c0")}
        p = replace(p, arrays=p.arrays | same)
        right, text = judge_results(self.run(p), p, states=True)
        return "yes" if right else f"no ({text})"

    def wrong_state_shape(self) -> str:
        """The shape of the parameter that holds the states says it."""
        model = self.api.LSTM(H, D).initialize()
        raise UnsupportedFeatureError(f"one state for all rows: HC0 {model.get_param('HC0').shape}")

    def column_softmax(self, x: Any) -> Any:
        """Of its ops."""
        return self.ops.softmax(x, axis=0)

    def layer_sizes(self) -> str:
        """Its depth has one width."""
        raise signature_error(self.api.LSTM)

    def bounded_memory(self) -> str:
        """As sizes."""
        raise signature_error(self.api.LSTM)

    def gradient_checker(self) -> str:
        """Among its public names."""
        found = public_names_containing(self.api, "grad", "check")
        raise UnsupportedFeatureError(f"names with 'grad' and 'check': {', '.join(found) or 'none'}")

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """The model returns its outputs."""
        return [to_numpy(self.run(p)["y"])]
