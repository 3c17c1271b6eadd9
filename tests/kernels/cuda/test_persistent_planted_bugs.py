"""Bugs planted in the persistent kernels: the host machine, or the comparison, catches each of them."""

from __future__ import annotations

import pytest
from support.cuda import persistent_emulator as host
from support.cuda.persistent_cases import config_for, excessive_errors, kernel_results, random_inputs

pytestmark = pytest.mark.needs("cupy")

SEVERAL, ONE = ("tanh", 256, 2), ("tanh", 64, 2)  # blocks of the cluster
FORWARD_WAIT, BACKWARD_WAIT = "if (i > 0) exchange.wait(i - 1);", "    exchange.wait(i);\n"
OPEN = "exchange.open(item.thread);\n  xp_cluster_sync();"

# name: (configuration, what stands in the source, what takes its place)
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
    "one buffer for all": (SEVERAL, "buffer + (e & 1) * FLOATS", "buffer"),
    "one block: one buffer for all": (ONE, "buffer + (e & 1) * FLOATS", "buffer"),
    "one barrier for all": (SEVERAL, "bar + (e & 1)", "bar"),
    "the barrier's parity stays": (SEVERAL, "e >> 1 & 1", "0"),
    "the barrier's parity turns at every step": (SEVERAL, "e >> 1 & 1", "e & 1"),
    "one block: no block barrier": (ONE, "else xp_block_sync();", "else;"),
    "no barrier after opening": (SEVERAL, OPEN, "exchange.open(item.thread);"),
    "one block: no barrier after loading": (ONE, OPEN, "exchange.open(item.thread);"),
    "a block barrier where a cluster's is needed": (SEVERAL, OPEN, "exchange.open(item.thread);\n  xp_block_sync();"),
    "a barrier is not initialised": (SEVERAL, ", xp_barrier_init(bar + 1)", ""),
    "too few bytes expected": (SEVERAL, "4 * FLOATS", "4 * FLOATS - 16"),
    "too many bytes expected": (SEVERAL, "4 * FLOATS", "4 * FLOATS + 16"),
    "every warp expects": (SEVERAL, "thread == 0) xp_barrier_expect", "thread % 32 == 0) xp_barrier_expect"),
    "nobody expects": (SEVERAL, "thread == 0) xp_barrier_expect", "thread < 0) xp_barrier_expect"),
    "expected once too often": (SEVERAL, "if (i + 1 < T) exchange.expect", "exchange.expect"),
    "a peer without units leaves": (SEVERAL, OPEN, "if (xp_rank() * UPB >= H) return;\n  " + OPEN),
    "a peer leaves before the end": (
        SEVERAL,
        FORWARD_WAIT,
        "if (xp_rank() == 1 && i + 1 == T) return;\n" + FORWARD_WAIT,
    ),
    "lanes without a unit leave": (SEVERAL, OPEN, "if (item.unit >= H) return;\n  " + OPEN),
    "one peer gets nothing": (SEVERAL, "j % CL);", "j % CL / 2 * 2);"),
    "the last group of units is not sent": (SEVERAL, "j >= Q / 4 * CL", "j >= Q / 4 * CL - CL"),
}
ARITHMETIC = {
    "backward ignores who is active": (SEVERAL, "if (!now.is_active)", "if (false)"),
    "forward ignores who is active": (SEVERAL, "if (is_active) state = next;", "state = next;"),
    "a row past the batch is stored": (SEVERAL, "valid = row < M && unit < H;", "valid = unit < H;"),
    "the reverse direction stores a slot off": (SEVERAL, "after = (t + !reverse)", "after = (t + 1)"),
    "a unit's weights stand in another row": (SEVERAL, "* H + unit) * H + k]", "* H + k) * H + unit]"),
    "halves change places": (SEVERAL, "sent = upper ? v[j] : v[j + half]", "sent = upper ? v[j + half] : v[j]"),
    "tanh: no slope": (SEVERAL, "d.h * (1.f - after.h * after.h)", "d.h"),
    "gru: the state's direct path": (("gru", 128, 2), "d.h = d.h * z;", "d.h = 0.f;"),
    "gru: the reset gate's product": (("gru", 128, 2), "dp[2] = dan * r;", "dp[2] = dan;"),
    "gru: the inner bias": (("gru", 128, 2), "hn = p[2] + bn", "hn = p[2]"),
    "lstm: the cell's direct path": (("lstm", 128, 2), "d = {0.f, dc * f};", "d = {0.f, dc};"),
    "lstm: the output's way to the cell": (("lstm", 128, 2), "d.c + d.h * (o * (1.f - tc * tc))", "d.c"),
    "lstm: the cell after is the cell before": (("lstm", 128, 2), "ahead.after.c = ahead.before.c;", ";"),
}  # fmt: skip


def caught(rng, config, mutate):
    """How the first schedule that shows it does: a message, or the arrays that differ."""
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
    for seed in range(host.SCHEDULE_COUNT):
        try:
            far = excessive_errors(kernel_results(p, config, seed=seed, mutate=mutate, extra=("-w",)), want)
        except host.EmulatorError as error:
            return str(error)
        if far:
            return str(far)
    return None


@pytest.mark.parametrize("bug", {**SYNCHRONISATION, **ARITHMETIC})
def test_planted_bugs_are_caught(rng, bug):
    where, old, new = {**SYNCHRONISATION, **ARITHMETIC}[bug]
    assert old in host.kernel_source(), "the line to spoil is gone from the source"
    assert caught(rng, config_for(*where), lambda text: text.replace(old, new)) is not None


def test_the_kernels_themselves_pass(rng):
    for where in (SEVERAL, ONE, ("gru", 128, 2), ("lstm", 128, 2)):
        assert caught(rng, config_for(*where), lambda text: text) is None
