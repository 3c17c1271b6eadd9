"""One contender of runtime.py in a process of its own: import, load, a first output, then steps by the clock.

Arguments: the contender, its model file, the file of the inputs. Prints a line at the first output, one at the
tenth, one with figures at the end. Nothing but the contender and NumPy is imported before the clock has started.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_TIME = time.perf_counter()

import numpy as np  # noqa: E402

NUMPY_TIME = time.perf_counter()
StepFunction = Callable[[Any, Any], tuple[Any, Any]]
WARMUP_STEPS, STEPS, ROUNDS = 300, 2000, 30


def load_xprnn(path: str) -> tuple[StepFunction, StepFunction]:
    """(one step, a whole sequence) of x and state."""
    import xprnn

    record_import_time()
    model, params = xprnn.load(path)
    return (lambda x, state: model.step(params, x, state)), (lambda x, state: model(params, x, state))


def load_onnxruntime(path: str) -> tuple[StepFunction, StepFunction]:
    """The same."""
    import onnxruntime

    record_import_time()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    hidden = next(i.shape[2] for i in session.get_inputs() if i.name.endswith("initial_h"))
    start = np.zeros((1, 1, hidden), np.float32)

    def whole(x: Any, state: Any) -> tuple[Any, Any]:
        h, c = (start, start) if state is None else state
        y, h, c = session.run(["y", "final_h", "final_c"], {"x": x, "initial_h": h, "initial_c": c})
        return y, (h, c)

    def step(x: Any, state: Any) -> tuple[Any, Any]:
        y, state = whole(x[None], state)
        return y[0], state

    return step, whole


def load_torch(path: str) -> tuple[StepFunction, StepFunction]:
    """The same."""
    import torch

    record_import_time()
    torch.set_num_threads(1)
    weights = torch.load(path, weights_only=True)
    rows, inputs = weights["rnn.weight_ih_l0"].shape
    rnn, head = torch.nn.LSTM(inputs, rows // 4), torch.nn.Linear(rows // 4, len(weights["head.bias"]))
    torch.nn.ModuleDict({"rnn": rnn, "head": head}).load_state_dict(weights)

    def whole(x: Any, state: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            y, state = rnn(torch.from_numpy(x), state)
            return head(y).numpy(), state

    def step(x: Any, state: Any) -> tuple[Any, Any]:
        y, state = whole(x[None], state)
        return y[0], state

    return step, whole


TIMINGS: dict[str, float] = {}


def record_import_time() -> None:
    """The contender is there."""
    TIMINGS["import"] = time.perf_counter() - START_TIME


def quantile(times: list[int], q: float) -> float:
    """Of nanoseconds, in microseconds."""
    return sorted(times)[min(len(times) - 1, int(q * len(times)))] / 1e3


def measure_steps(step: StepFunction, whole: StepFunction, x: Any) -> dict[str, Any]:
    """Microseconds of a step in a stream, median and 99th percentile, and of one within a whole sequence."""
    state, times, sums = None, [], []
    for t in range(WARMUP_STEPS + STEPS):
        begin = time.perf_counter_ns()
        _, state = step(x[t % len(x)], state)
        times.append(time.perf_counter_ns() - begin)
    for _ in range(3 + ROUNDS):
        begin = time.perf_counter_ns()
        y, _ = whole(x, None)
        sums.append((time.perf_counter_ns() - begin) // len(x))
    streamed, state = [], None
    for x_t in x:
        y_t, state = step(x_t, state)
        streamed.append(y_t)
    steps = times[WARMUP_STEPS:]
    figures = {"step": quantile(steps, 0.5), "step99": quantile(steps, 0.99), "sequence": quantile(sums[3:], 0.5)}
    return figures | {"y": np.asarray(y).ravel().tolist(), "streamed": np.asarray(streamed).ravel().tolist()}


def peak_memory_mb() -> float | None:
    """The most memory this process has held; None where the system does not say."""
    # Not getrusage's: on Linux that of a new process begins with its parent's.
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def main() -> None:
    """Run the contender that the command line names."""
    contender, path, inputs = sys.argv[1:]
    if contender == "numpy":
        print(f"first\n{json.dumps({'import': NUMPY_TIME - START_TIME, 'memory': peak_memory_mb()})}", flush=True)
        return
    maker = {"xprnn": load_xprnn, "onnxruntime": load_onnxruntime, "torch": load_torch}[contender]
    x = np.frombuffer(Path(inputs).read_bytes(), np.float32).reshape(-1, 1, 16).copy()
    step, whole = maker(path)
    _, state = step(x[0], None)
    print("first", flush=True)
    for x_t in x[1:10]:  # what is compiled is compiled here, not in the first step
        _, state = step(x_t, state)
    print("tenth", flush=True)
    print(json.dumps(TIMINGS | measure_steps(step, whole, x) | {"memory": peak_memory_mb()}), flush=True)


if __name__ == "__main__":
    main()
