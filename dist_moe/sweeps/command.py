"""``dist-moe sweep``: begin a sweep or go on with it, then report."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from dist_moe.config.plain_yaml import yaml_text
from dist_moe.errors import UserError
from dist_moe.screen import say
from dist_moe.sweeps.directory import SweepDirectory
from dist_moe.sweeps.plan import SweepPlan, plan_sweep
from dist_moe.sweeps.report import write_report
from dist_moe.sweeps.runner import DEFAULT_RUNNER, load_runner
from dist_moe.sweeps.study import Studies
from dist_moe.sweeps.workers import work_together


def run_sweep(
    path: Path,
    workers: int = 1,
    sweep_dir: Path | None = None,
    retry_failed: bool = False,
    runner: str = DEFAULT_RUNNER,
    *,
    allow_changed_data: bool = False,
) -> int:
    """Do what is left of the sweep file's trials with ``workers`` processes, and write its report.

    ``sweep_dir``: where (default: runs/sweeps/NAME). Returns the exit code: 128 + signal if one ended it
    early. Raises UserError for a wrong file, a changed one, for trials that only fail, and for other data than the
    trials before had, unless ``allow_changed_data``.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: at least one is needed")
    plan = plan_sweep(path)
    load_runner(runner)
    directory = SweepDirectory(sweep_dir or Path("runs") / "sweeps" / path.stem)
    directory.create()
    data = plan.data if runner == DEFAULT_RUNNER else {}  # one of the user's own takes data from wherever it likes
    digests = {section: settings.open(progress=True).digests() for section, settings in data.items()}
    with ExitStack() as stack:
        with directory.taking():
            alone = stack.enter_context(directory.working())
            studies = Studies(directory, plan)
            studies.check_data(digests, allowed=allow_changed_data)
            _begin(studies, plan, directory, alone, retry_failed)
        signal_number = work_together(plan, directory, studies, runner, workers)
        if signal_number:
            say(f"stopped; 'dist-moe sweep {path}' goes on")
            return 128 + signal_number
    elsewhere = studies.running()
    if elsewhere:
        say(f"{elsewhere} trial(s) are being trained by another 'dist-moe sweep'; the report is without them")
    _report(plan, directory, studies)
    return 0


def report_sweep(path: Path, sweep_dir: Path | None = None) -> int:
    """Write the report anew from what the studies hold. Raises UserError if there are none."""
    plan = plan_sweep(path)
    directory = SweepDirectory(sweep_dir or Path("runs") / "sweeps" / path.stem)
    directory.check_exists()
    _report(plan, directory, Studies(directory, plan))
    return 0


def _report(plan: SweepPlan, directory: SweepDirectory, studies: Studies) -> None:
    print(write_report(plan, directory, studies))
    say(f"table, curves and all trials are in {directory.report}")


def _begin(studies: Studies, plan: SweepPlan, directory: SweepDirectory, alone: bool, retry_failed: bool) -> None:
    """``alone``: nobody else lives, so that trials called running are those of the dead."""
    if not directory.base.exists():
        directory.base.write_text(yaml_text(plan.base), encoding="utf-8")
    if alone:
        studies.release(None, died=False)
    studies.begin(retry_failed)
