"""Experts that are used together, as directories for transformers (``dist-moe forest export``).

One model is one directory. An ensemble is a directory of its own:

    DIR/experts/NAME/                   each expert, which transformers loads
    DIR/ensemble.json                   prior, history, top_k, names
    DIR/ensemble.py, DIR/posterior.py   the loader, copies of this package's; need torch and transformers only
    DIR/tokenizer.json                  the experts' common tokenizer
"""

from __future__ import annotations

from pathlib import Path

import torch

from dist_moe.config.files import json_text
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.errors import UserError
from dist_moe.models.hugging_face.files import TOKENIZER, TOKENIZER_CONFIG
from dist_moe.recipes.branch_train_merge import posterior
from dist_moe.recipes.branch_train_merge.merge import Exported, MergeSettings
from dist_moe.recipes.branch_train_merge.tend import check_domain, open_run, scorer_of
from dist_moe.recipes.hugging_face.export import HuggingFaceExport, export_weights_of
from dist_moe.tasks.language import LanguageModelTask

LOADER = Path(__file__).with_name("ensemble_loader.py")
"""The source of the loader. It needs transformers, so it is read, not imported."""


def export_forest(
    run_dir: Path,
    directory: Path,
    merge: MergeSettings,
    *,
    domain: str | None = None,
    dtype: torch.dtype = torch.float32,
    allow_changed_data: bool = False,
) -> list[HuggingFaceExport]:
    """Write a way of using a run's experts together; return the models that rank 0 has written. Collective.

    ``domain``: of the data, whose cached prior counts if ``merge`` uses one. ``dtype``: of the parameters. Models are
    written tensor by tensor. Raises UserError, also for a ``directory`` that is not empty.
    """
    plan = open_run(run_dir, allow_changed_data=allow_changed_data)
    check_domain(plan, domain)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} is there and is no empty directory; name another one")
    with process_groups(plan.start.environment, plan.start.config.parallel) as groups:
        exported = merge.exported(plan, scorer_of(plan, groups, domain), domain)
    if not plan.start.environment.is_rank_zero:
        return []
    return write_exported(exported, plan.union, directory, dtype)


def write_exported(
    exported: Exported, task: LanguageModelTask, directory: Path, dtype: torch.dtype
) -> list[HuggingFaceExport]:
    """Write one model, or the experts of an ensemble and its loader. Raises UserError if they cannot be written."""
    if exported.prior_J is None:
        (weights,) = exported.models.values()
        return [export_weights_of(weights, task, exported.config, directory, dtype)]
    places = {name: directory / "experts" / name for name in exported.models}
    written = [
        export_weights_of(exported.models[name], task, exported.config, place, dtype) for name, place in places.items()
    ]
    about = {
        "format": "dist_moe ensemble 1",
        "experts": list(places),
        "prior": exported.prior_J.tolist(),
        "history": exported.history,
        "top_k": exported.top_k,
    }
    loader = LOADER.read_text(encoding="utf-8").replace(posterior.__name__, "posterior")
    files = {"ensemble.py": loader, "posterior.py": Path(posterior.__file__).read_text(encoding="utf-8")}
    one = next(iter(places.values()))
    files |= {name: (one / name).read_text(encoding="utf-8") for name in (TOKENIZER, TOKENIZER_CONFIG)}
    files["ensemble.json"] = json_text(about)  # last: its presence makes it an ensemble
    try:
        for name, content in files.items():
            (directory / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from error
    return written
