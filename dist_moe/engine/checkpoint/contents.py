"""Checks that what a checkpoint holds, its digests aside, can be the state of a model: kinds, ranges, finite numbers.

They need no model and no process group. Whether it is the state of *this* model is seen when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dist_moe.engine.checkpoint.format import BUFFER, TRAINER_FILE, Key, Manifest, TrainerState, read_trainer_state
from dist_moe.engine.checkpoint.reader import CheckpointReader, Entry
from dist_moe.errors import UserError

_NEVER_NEGATIVE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf", "sum"}
"""States of torch's and DeepSpeed's optimizers that are sums or maxima of squares or magnitudes."""
_UNCOUNTED = "momentum_buffer"
"""The state of those optimizers (SGD, Muon) that count no steps; all others do, from 0."""
_NAMES_SHOWN = 5
_OF_LAYER = re.compile(r"(^|\.)(slot_map|gates)\.")
"""Names of buffers of a layer's gates and slot maps, whose numbers are finite."""


def check_contents(directory: Path, manifest: Manifest, *, values: bool) -> None:
    """Raise UserError naming file or tensor, and value, of what no training can have written, or go on from.

    ``values``: read the tensors too, one at a time; else their names, dtypes and shapes alone.
    """
    trainer = read_trainer_state(directory)
    if trainer.step != manifest.step:
        file = directory / TRAINER_FILE
        raise UserError(f"checkpoint file {file}: step={trainer.step}, but the checkpoint is of step {manifest.step}")
    reader = CheckpointReader(directory)
    wrong = [*_wrong_states(reader, trainer), *_wrong_placements(reader, trainer)]
    if not wrong and values:
        wrong = list(_wrong_values(reader))
    if wrong:
        more = f" and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
        raise UserError(
            f"checkpoint {directory} cannot be used, though it is as it was written: "
            f"{'; '.join(wrong[:_NAMES_SHOWN])}{more}; use an older one, or train anew"
        )


def _wrong_states(reader: CheckpointReader, trainer: TrainerState) -> Iterator[str]:
    parameters = [entry for entry in reader.entries.values() if entry.states != (BUFFER,)]
    moments = max((entry.states for entry in parameters), key=len, default=())
    for entry in parameters:
        if entry.states not in (moments, moments[:1]):
            yield f"{entry.name} has the states {list(entry.states)}, others have {list(moments)}"
    if trainer.scalars and len(moments) < 2:
        yield f"{TRAINER_FILE} has scalars={trainer.scalars}, and there is no optimizer state"
    counts_steps = not set(moments) <= {*moments[:1], _UNCOUNTED}
    if counts_steps and trainer.scalars.get("step", -1.0) < 0:
        counting = f"an optimizer with {list(moments[1:])} counts its steps"
        yield f"{TRAINER_FILE} has scalars={trainer.scalars}, and {counting}"
    if parameters and not moments:
        yield "it has no masters"


def _wrong_placements(reader: CheckpointReader, trainer: TrainerState) -> Iterator[str]:
    for name, saved in trainer.placements.items():
        experts = _experts_of(reader, name)
        if experts != len(saved.expert_of_position):
            yield (
                f"placements.{name} in {TRAINER_FILE} places {len(saved.expert_of_position)} experts, "
                f"that layer has {experts}"
            )


def _experts_of(reader: CheckpointReader, layer: str) -> int:
    """Return the number of experts of a layer, 0 if the checkpoint has none of that name."""
    prefix = f"{layer}.experts." if layer else "experts."
    return next((e.experts for e in reader.entries.values() if e.experts and e.name.startswith(prefix)), 0)


def _wrong_values(reader: CheckpointReader) -> Iterator[str]:
    for entry in reader.entries.values():
        for state in entry.states:
            wrong = (_wrong_value(reader, entry, key, reader.read(key)) for key in entry.keys(state))
            yield from (text for text in wrong if text)


def _wrong_value(reader: CheckpointReader, entry: Entry, key: Key, tensor: Tensor) -> str:
    """Return what is wrong with the values of one tensor, empty if nothing is."""
    if not tensor.numel():
        return ""
    if key.state == BUFFER:
        return _wrong_buffer(reader, entry, tensor)
    if not bool(tensor.isfinite().all()):
        return f"{key} holds {int(tensor.isfinite().logical_not().sum())} number(s) that are not finite"
    if key.state in _NEVER_NEGATIVE and float(least := tensor.min()) < 0:
        return f"{key} holds {float(least):g}, and is never negative"
    return ""


def _wrong_buffer(reader: CheckpointReader, entry: Entry, tensor: Tensor) -> str:
    """Tables of a layer name experts or slots that there are, and counts of steps are no less than 0."""
    if tensor.is_floating_point():
        of_layer = _OF_LAYER.search(entry.name)  # elsewhere an infinity may be meant, as in a mask
        wrong = tensor.isfinite().logical_not() if of_layer else tensor.isnan()
        what = "number(s) that are not finite" if of_layer else "NaN(s)"
        return f"{entry.name} holds {int(wrong.sum())} {what}" if bool(wrong.any()) else ""
    least, most = int(tensor.min()), int(tensor.max())
    layer, _, table = entry.name.rpartition(".slot_map.")
    limit = _experts_of(reader, layer) if table == "table" else 0
    if limit and not 0 <= least <= most < limit:
        return f"{entry.name} names expert {least if least < 0 else most}; allowed: 0..{limit - 1}"
    if entry.name.endswith(".step") and tensor.dtype == torch.int64 and least < 0:
        return f"{entry.name} is {least}, and counts steps"
    return ""
