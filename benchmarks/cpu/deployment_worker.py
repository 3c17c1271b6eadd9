"""One process of the deployment benchmark: imports a runtime, loads a model, times its outputs and steps.

Arguments: the runtime, its model file, the file of the inputs. Prints "first" at the first output, "tenth" at the tenth
and a JSON object with figures at the end. This file is a script and not a module of `benchmarks`: before the clock has
started, it imports nothing but the standard library.
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
StepFunction = Callable[[Any, Any], tuple[Any, Any]]  # (x, state) -> (y, state)
INPUTS, WARMUP_STEPS, STEPS, ROUNDS = 16, 300, 2000, 30
TIMINGS: dict[str, float] = {}


def record_import_time() -> None:
    """Record the seconds from the start of this file to the end of the runtime's import."""
    TIMINGS["import"] = time.perf_counter() - START_TIME


def load_xprnn(path: str) -> tuple[StepFunction, StepFunction]:
    """Load the model in xprnn. Return the functions of one step and of a whole sequence."""
    import xprnn

    record_import_time()
    model, params = xprnn.load(path)
    return (lambda x, state: model.step(params, x, state)), (lambda x, state: model(params, x, state))


def load_onnxruntime(path: str) -> tuple[StepFunction, StepFunction]:
    """Load the model in ONNX Runtime. Return the functions of one step and of a whole sequence."""
    import onnxruntime

    record_import_time()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    hidden = next(i.shape[2] for i in session.get_inputs() if i.name.endswith("initial_h"))
    zeros = np.zeros((1, 1, hidden), np.float32)

    def run_sequence(x: Any, state: Any) -> tuple[Any, Any]:
        h, c = (zeros, zeros) if state is None else state
        y, h, c = session.run(["y", "final_h", "final_c"], {"x": x, "initial_h": h, "initial_c": c})
        return y, (h, c)

    def step(x: Any, state: Any) -> tuple[Any, Any]:
        y, state = run_sequence(x[None], state)
        return y[0], state

    return step, run_sequence


def load_torch(path: str) -> tuple[StepFunction, StepFunction]:
    """Load the model in torch. Return the functions of one step and of a whole sequence."""
    import torch

    record_import_time()
    torch.set_num_threads(1)
    weights = torch.load(path, weights_only=True)
    rows, inputs = weights["rnn.weight_ih_l0"].shape
    rnn, head = torch.nn.LSTM(inputs, rows // 4), torch.nn.Linear(rows // 4, len(weights["head.bias"]))
    torch.nn.ModuleDict({"rnn": rnn, "head": head}).load_state_dict(weights)

    def run_sequence(x: Any, state: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            y, state = rnn(torch.from_numpy(x), state)
            return head(y).numpy(), state

    def step(x: Any, state: Any) -> tuple[Any, Any]:
        y, state = run_sequence(x[None], state)
        return y[0], state

    return step, run_sequence


def quantile(times: list[int], q: float) -> float:
    """Return a quantile of times in nanoseconds, in microseconds."""
    return sorted(times)[min(len(times) - 1, int(q * len(times)))] / 1e3


def measure_steps(step: StepFunction, run_sequence: StepFunction, x: Any) -> dict[str, Any]:
    """Time a step of a stream and a step within a whole sequence, in microseconds; also return both outputs."""
    state, step_times, sequence_times = None, [], []
    for t in range(WARMUP_STEPS + STEPS):
        start = time.perf_counter_ns()
        _, state = step(x[t % len(x)], state)
        step_times.append(time.perf_counter_ns() - start)
    for _ in range(3 + ROUNDS):
        start = time.perf_counter_ns()
        y, _ = run_sequence(x, None)
        sequence_times.append((time.perf_counter_ns() - start) // len(x))
    streamed, state = [], None
    for x_t in x:
        y_t, state = step(x_t, state)
        streamed.append(y_t)
    timed = step_times[WARMUP_STEPS:]
    figures = {"step": quantile(timed, 0.5), "step99": quantile(timed, 0.99)}
    figures["sequence"] = quantile(sequence_times[3:], 0.5)
    return figures | {"y": np.asarray(y).ravel().tolist(), "streamed": np.asarray(streamed).ravel().tolist()}


def peak_memory_mb() -> float | None:
    """Return the largest memory of this process in MB; None if the system does not tell."""
    # getrusage would not do: on Linux its peak starts with that of the parent process.
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def main() -> None:
    """Measure the runtime that the command line names."""
    runtime, path, inputs = sys.argv[1:]
    if runtime == "numpy":
        print(f"first\n{json.dumps({'import': NUMPY_TIME - START_TIME, 'memory': peak_memory_mb()})}", flush=True)
        return
    load = {"xprnn": load_xprnn, "onnxruntime": load_onnxruntime, "torch": load_torch}[runtime]
    x = np.frombuffer(Path(inputs).read_bytes(), np.float32).reshape(-1, 1, INPUTS).copy()
    step, run_sequence = load(path)
    _, state = step(x[0], None)
    print("first", flush=True)
    for x_t in x[1:10]:  # numba compiles at the second step
        _, state = step(x_t, state)
    print("tenth", flush=True)
    print(json.dumps(TIMINGS | measure_steps(step, run_sequence, x) | {"memory": peak_memory_mb()}), flush=True)


if __name__ == "__main__":
    main()
