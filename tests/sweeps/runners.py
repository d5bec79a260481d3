"""Runners that train nothing: metrics are simple functions of the configuration. Workers import them by name."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.sweeps import Report, TrialResult

STEPS = 3


def loss_of(config: SupervisedConfig) -> float:
    """Least at lr = 1e-3 and dropout = 0.2."""
    lr = config.deepspeed["optimizer"]["params"]["lr"]
    return (math.log10(lr) + 3) ** 2 + (config.model.experts.dropout - 0.2) ** 2 + 0.1


def result_of(config: SupervisedConfig) -> TrialResult:
    loss = loss_of(config)
    return TrialResult({"loss": loss, "auc": 1 - loss}, {"loss": 2 * loss, "auc": 0.9 - loss}, STEPS)


def analytic(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Reports a loss that falls to its last value in three validations, and obeys."""
    return [_validate(i, config, report) for i, config in enumerate(configs)]


def _validate(i: int, config: SupervisedConfig, report: Report) -> TrialResult | None:
    for step in range(1, STEPS + 1):
        if report(i, step, loss_of(config) * STEPS / step):
            return None
    return result_of(config)


def seeded(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """As analytic; what a seed changes is the same for all draws, but for a little."""
    results = []
    for config in configs:
        loss = loss_of(config) + config.seed + 0.01 * config.seed * config.model.experts.dropout
        results.append(TrialResult({"loss": loss}, {"loss": 2 * loss, "auc": 0.9 - loss / 10}, STEPS))
    return list[TrialResult | None](results)


def burning(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Losses of `analytic`, after a tenth of a processor second for each configuration of COMET."""
    end = time.process_time() + 0.1 * sum(config.model.gate.name == "comet" for config in configs)
    while time.process_time() < end:
        pass
    return analytic(configs, report)


def diverging(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Trials with dropout above 0.3 come to nothing."""
    nothing = TrialResult({"loss": math.nan}, {"loss": math.nan}, STEPS)
    return [nothing if config.model.experts.dropout > 0.3 else result_of(config) for config in configs]


def failing(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Every training raises."""
    raise RuntimeError("the disk is full")


def failing_together(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Two do not fit, and no single one with dropout above 0.3 does either."""
    if len(configs) > 1 or configs[0].model.experts.dropout > 0.3:
        raise MemoryError("too large")
    return analytic(configs, report)


def breaking_its_promise(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Gives up without having been told to."""
    return [None for _ in configs]


def slow(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Waits for the file that DIST_MOE_TEST_GATE names; says that it waits by a file beside it."""
    gate = Path(os.environ["DIST_MOE_TEST_GATE"])
    gate.with_name(f"waiting-{os.getpid()}").touch()
    while not gate.exists():
        time.sleep(0.01)
    return analytic(configs, report)


def dying_once(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """The first process that trains is killed, as if memory had run out."""
    died = Path(os.environ["DIST_MOE_TEST_GATE"])
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return analytic(configs, report)


def always_dying(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Every process that trains is killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    return []
