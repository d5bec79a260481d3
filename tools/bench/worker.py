"""One rank of one job: measures, and writes what it found."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_moe.config.files import json_line
from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from tools.bench import exchange, layer, memory, ragged
from tools.bench.jobs import Job
from tools.bench.layer import Place

Study = Callable[[Job, Place], dict[str, Any]]
STUDIES: dict[str, Study] = {
    "layer": layer.study,
    "memory": memory.study,
    "ragged": ragged.study,
    "exchange": exchange.study,
}
PATIENCE_S = 900


def main(job_file: str) -> None:
    """Run the job; whatever goes wrong is written beside it and ends the process at once, others may wait."""
    files = Path(job_file)
    job = Job.read(files)
    environment = LaunchEnvironment.read()
    alone = environment.world_size == 1 and job.clock == "wall"
    torch.set_num_threads((os.cpu_count() or 1) if alone else 1)
    if job.disable_malloc_trim:
        disable_malloc_trim()

    def say(what: str) -> None:
        if environment.is_rank_zero:
            unfinished = files.with_suffix(".now.tmp")
            unfinished.write_text(what, encoding="utf-8")
            unfinished.replace(files.with_suffix(".now"))

    config = ParallelConfig(expert_parallel_size=environment.world_size, timeout_s=PATIENCE_S)
    try:
        with process_groups(environment, config) as groups:
            measured = STUDIES[job.study](job, Place(groups.world, say))
            if environment.is_rank_zero:
                measured["threads"] = torch.get_num_threads()
                files.with_suffix(".measured").write_text(json_line(measured), encoding="utf-8")
    except BaseException as error:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        files.with_suffix(f".failed-{environment.rank}").write_text(reason, encoding="utf-8")
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
