"""Bugs planted in the persistent kernels are detected by the emulator or by the comparison with the reference scan."""

from __future__ import annotations

import pytest
from support.cuda import persistent_emulator
from support.cuda.persistent_cases import config_for, excessive_errors, kernel_results, random_inputs

pytestmark = pytest.mark.needs("cupy")

SEVERAL, ONE = ("tanh", 256, 2), ("tanh", 64, 2)  # clusters of several blocks, of one block
FORWARD_WAIT, BACKWARD_WAIT = "if (i > 0) exchange.wait(i - 1);", "    exchange.wait(i);\n"
OPEN = "exchange.open(item.thread);\n  xp_cluster_sync();"

# name: (configuration, text in the source, its replacement)
SYNCHRONISATION = {
    "forward does not wait": (SEVERAL, FORWARD_WAIT, ""),
    "backward does not wait": (SEVERAL, BACKWARD_WAIT, ""),
    "one warp does not wait": (SEVERAL, FORWARD_WAIT, "if (i > 0 && item.thread >= 32) exchange.wait(i - 1);"),
    "forward reads the buffer that is being filled": (
        SEVERAL,
        "product(p, u, exchange.at(i + 1)",
        "product(p, u, exchange.at(i)",
    ),
    "backward reads the buffer of the step before": (
        SEVERAL,
        "product(out, u, exchange.at(i)",
        "product(out, u, exchange.at(i + 1)",
    ),
    "a single buffer": (SEVERAL, "buffer + (e & 1) * FLOATS", "buffer"),
    "one block: a single buffer": (ONE, "buffer + (e & 1) * FLOATS", "buffer"),
    "a single barrier": (SEVERAL, "bar + (e & 1)", "bar"),
    "the barrier's parity never flips": (SEVERAL, "e >> 1 & 1", "0"),
    "the barrier's parity flips at every step": (SEVERAL, "e >> 1 & 1", "e & 1"),
    "one block: no block barrier": (ONE, "else xp_block_sync();", "else;"),
    "no barrier after initialization": (SEVERAL, OPEN, "exchange.open(item.thread);"),
    "one block: no barrier after loading": (ONE, OPEN, "exchange.open(item.thread);"),
    "a block barrier instead of a cluster barrier": (SEVERAL, OPEN, "exchange.open(item.thread);\n  xp_block_sync();"),
    "a barrier is not initialised": (SEVERAL, ", xp_barrier_init(bar + 1)", ""),
    "too few bytes expected": (SEVERAL, "4 * FLOATS", "4 * FLOATS - 16"),
    "too many bytes expected": (SEVERAL, "4 * FLOATS", "4 * FLOATS + 16"),
    "every warp announces bytes": (SEVERAL, "thread == 0) xp_barrier_expect", "thread % 32 == 0) xp_barrier_expect"),
    "no thread announces bytes": (SEVERAL, "thread == 0) xp_barrier_expect", "thread < 0) xp_barrier_expect"),
    "announced once too often": (SEVERAL, "if (i + 1 < T) exchange.expect", "exchange.expect"),
    "a block without units exits": (SEVERAL, OPEN, "if (xp_rank() * UPB >= H) return;\n  " + OPEN),
    "a block exits before the last step": (
        SEVERAL,
        FORWARD_WAIT,
        "if (xp_rank() == 1 && i + 1 == T) return;\n" + FORWARD_WAIT,
    ),
    "lanes without a unit exit": (SEVERAL, OPEN, "if (item.unit >= H) return;\n  " + OPEN),
    "one block receives nothing": (SEVERAL, "j % CL);", "j % CL / 2 * 2);"),
    "the last group of units is not sent": (SEVERAL, "j >= Q / 4 * CL", "j >= Q / 4 * CL - CL"),
}
ARITHMETIC = {
    "backward ignores the mask": (SEVERAL, "if (!now.is_active)", "if (false)"),
    "forward ignores the mask": (SEVERAL, "if (is_active) state = next;", "state = next;"),
    "a row past the batch is stored": (SEVERAL, "valid = row < M && unit < H;", "valid = unit < H;"),
    "the reverse direction stores at an index off by one": (SEVERAL, "after = (t + !reverse)", "after = (t + 1)"),
    "the weight is transposed": (SEVERAL, "* H + unit) * H + k]", "* H + k) * H + unit]"),
    "lane sum: swapped halves": (SEVERAL, "sent = upper ? v[j] : v[j + half]", "sent = upper ? v[j + half] : v[j]"),
    "tanh: no derivative": (SEVERAL, "d.h * (1.f - after.h * after.h)", "d.h"),
    "gru: the state's direct path": (("gru", 128, 2), "d.h = d.h * z;", "d.h = 0.f;"),
    "gru: the reset gate's product": (("gru", 128, 2), "dp[2] = dan * r;", "dp[2] = dan;"),
    "gru: the bias inside the reset gate's product": (("gru", 128, 2), "hn = p[2] + bn", "hn = p[2]"),
    "lstm: the cell's direct path": (("lstm", 128, 2), "d = {0.f, dc * f};", "d = {0.f, dc};"),
    "lstm: the path from output to cell state": (("lstm", 128, 2), "d.c + d.h * (o * (1.f - tc * tc))", "d.c"),
    "lstm: the cell state after the step is not updated": (("lstm", 128, 2), "ahead.after.c = ahead.before.c;", ";"),
}  # fmt: skip


def detected(rng, config, mutate):
    """Return the first detection over all schedules: the emulator's error, or the arrays that differ; else None."""
    p = random_inputs(
        rng,
        config.cell_name,
        config.padded_hidden_size * 5 // 8,
        2 * config.rows_per_cluster + 1,
        6,
        ragged=True,
        reverse=True,
    )
    want = kernel_results(p)
    for seed in range(persistent_emulator.SCHEDULE_COUNT):
        try:
            errors = excessive_errors(
                kernel_results(p, config, seed=seed, mutate=mutate, compile_options=("-w",)), want
            )
        except persistent_emulator.EmulatorError as error:
            return str(error)
        if errors:
            return str(errors)
    return None


@pytest.mark.parametrize("bug", {**SYNCHRONISATION, **ARITHMETIC})
def test_planted_bugs_are_detected(rng, bug):
    where, old, new = {**SYNCHRONISATION, **ARITHMETIC}[bug]
    assert old in persistent_emulator.kernel_source(), "the kernel source no longer contains this text"
    assert detected(rng, config_for(*where), lambda text: text.replace(old, new)) is not None


def test_unchanged_kernels_pass(rng):
    for where in (SEVERAL, ONE, ("gru", 128, 2), ("lstm", 128, 2)):
        assert detected(rng, config_for(*where), lambda text: text) is None
