"""Adapter of Chainer, which differentiates automatically and takes lists of sequences."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from benchmarks.features.problem import D, FeatureProblem, H, N, signature_error
from benchmarks.features.questions import LibraryAdapter

__all__ = ["Chainer"]


class Chainer(LibraryAdapter):
    """Chainer: NStepRNNTanh and NStepLSTM on lists of sequences; StatelessGRU, step by step."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import chainer

        self.module, self.version = chainer, f"{chainer.__version__} (NumPy {np.__version__})"

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Run the link and its backward pass."""
        if p.cell == "gru":
            return self.run_gru(p)
        chainer, a, pair = self.module, p.arrays, p.cell == "lstm"
        link_class = chainer.links.NStepLSTM if pair else chainer.links.NStepRNNTanh
        if (p.mask is not None and p.lengths is None) or p.reset is not None or p.cell == "leaky":
            raise signature_error(link_class.__init__ if p.cell == "leaky" else link_class.forward)
        with chainer.using_config("dtype", p.dtype):
            link = link_class(1, D, H, 0)
        gates = 4 if pair else 1
        for k in range(gates):
            rows = slice(k * H, (k + 1) * H)
            for name, value in ((f"w{k}", a["weight_ih"]), (f"w{k + gates}", a["weight_hh"]), (f"b{k}", a["bias_ih"])):
                getattr(link[0], name).array = (to_array or self.to_array)(value[rows].copy())
            getattr(link[0], f"b{k + gates}").array = np.zeros(H, p.dtype)
        return self.run_sequences(p, link, gates, to_array or self.to_array)

    def run_sequences(self, p: FeatureProblem, link: Any, gates: int, array: Any) -> dict[str, Any]:
        """Run the link on the list of sequences and pad what it returns."""
        a, steps, functions = p.arrays, len(p.dy), self.module.functions
        lengths = p.lengths or [steps] * N
        xs = [self.module.Variable(array(a["x"][:n, k].copy())) for k, n in enumerate(lengths)]
        states = [self.module.Variable(array(a[k][None])) for k in ("h0", "c0")[: 1 + (gates == 4)]]
        h, *_, ys = link(*states, xs)
        loss = functions.sum(h[0] * p.dh)
        for k, y in enumerate(ys):
            loss += functions.sum(y * p.dy[: lengths[k], k])
        loss.backward()

        def stack(name: str, first: int) -> Any:
            return np.concatenate([getattr(link[0], f"{name}{k + first}").grad for k in range(gates)])

        pad = [((0, steps - n), (0, 0)) for n in lengths]
        y = functions.stack([functions.pad(v, w, "constant") for v, w in zip(ys, pad, strict=True)], 1)
        dx = np.stack([np.pad(v.grad, w, "constant") for v, w in zip(xs, pad, strict=True)], 1)
        results = {"y": y, "h": h[0], "dx": dx}
        results |= {"dweight_ih": stack("w", 0), "dweight_hh": stack("w", gates), "dbias_ih": stack("b", 0)}
        return results | {f"d{k}0": v.grad[0] for k, v in zip("hc", states, strict=False)}

    def run_gru(self, p: FeatureProblem) -> dict[str, Any]:
        """Run StatelessGRU step by step. Its update gate is 1 - z, the gate of negated weights."""
        chainer, a = self.module, p.arrays
        with chainer.using_config("dtype", p.dtype):
            link = chainer.links.StatelessGRU(D, H)
        names, signs = ("_r", "_z", ""), (1, -1, 1)
        for k, (name, sign) in enumerate(zip(names, signs, strict=True)):
            rows, W, U = slice(k * H, (k + 1) * H), link[f"W{name}"], link[f"U{name}"]
            W.W.array, U.W.array, W.b.array = (sign * a[key][rows] for key in ("weight_ih", "weight_hh", "bias_ih"))
        x, h = chainer.Variable(a["x"]), chainer.Variable(a["h0"])
        ys, state = [], h
        for t in range(len(p.dy)):
            state = link(state, x[t])
            ys.append(state)
        y = chainer.functions.stack(ys)
        loss = chainer.functions.sum(y * p.dy) + chainer.functions.sum(state * p.dh)
        loss.backward()
        pairs = [(sign, link[f"W{n}"], link[f"U{n}"]) for n, sign in zip(names, signs, strict=True)]
        results = {"y": y, "h": state, "dx": x.grad, "dweight_ih": np.concatenate([s * w.W.grad for s, w, _ in pairs])}
        results |= {"dweight_hh": np.concatenate([s * u.W.grad for s, _, u in pairs]), "dh0": h.grad}
        return results | {"dbias_ih": np.concatenate([s * w.b.grad for s, w, _ in pairs])}

    def gru(self) -> str:
        """Compare StatelessGRU: there is no sequence layer of the GRU."""
        return f"{super().gru()} (StatelessGRU in a loop by the user)"

    def column_softmax(self, x: Any) -> Any:
        """Call functions.softmax."""
        return self.module.functions.softmax(x, axis=0)

    def layer_sizes(self) -> str:
        """Call the constructor with two hidden sizes."""
        self.module.links.NStepRNNTanh(2, D, self.layer_widths, 0.0)
        return "yes"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """Return hy, cy and ys."""
        h, c, ys = self.module.links.NStepLSTM(1, D, H, 0)(None, None, list(p.arrays["x"].astype("f").swapaxes(0, 1)))
        return [h, c, self.module.functions.stack(ys, 1)]

    def gradient_checker(self) -> str:
        """Check a right and a wrong gradient with check_backward."""
        from chainer.gradient_check import check_backward

        class Square(self.module.FunctionNode):  # type: ignore[misc, name-defined]
            factor = 2

            def forward(self, inputs: Any) -> Any:
                self.retain_inputs((0,))
                return (inputs[0] ** 2,)

            def backward(self, indexes: Any, dy: Any) -> Any:
                return (dy[0] * self.get_retained_inputs()[0] * self.factor,)

        check_backward(lambda x: Square().apply((x,))[0], np.ones(3), np.ones(3))
        Square.factor = 1
        try:
            check_backward(lambda x: Square().apply((x,))[0], np.ones(3), np.ones(3))
        except AssertionError:
            return "yes (gradient_check)"
        return "no"

    def bounded_memory(self) -> str:
        """Report the arguments: functions.forget needs a user's loop over the chunks."""
        raise signature_error(self.module.links.NStepLSTM.forward)
