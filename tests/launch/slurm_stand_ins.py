"""Programs of Slurm that work on this machine: srun starts the tasks of all nodes here, scontrol notes a requeue."""

from __future__ import annotations

import sys
from pathlib import Path

SRUN = f"""#!{sys.executable} -SE
import itertools, os, signal, subprocess, sys


def start(command, variables):
    while command[0].startswith("--"):
        name, _, value = command.pop(0).partition("=")
        if name == "--export":
            variables |= dict(pair.split("=", 1) for pair in value.split(",") if pair != "ALL")
    tasks.append(subprocess.Popen(command, env=os.environ | variables))


tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
groups = [list(words) for colon, words in itertools.groupby(sys.argv[1:], ":".__eq__) if not colon]
if len(groups) > 1:  # a heterogeneous job: one task each
    for group in groups:
        start(group, {{}})
else:
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    for task in range(int(os.environ["SLURM_NTASKS"])):
        who = {{"PROCID": task, "LOCALID": task % per_node, "NODEID": task // per_node}}
        start(list(groups[0]), {{f"SLURM_{{name}}": str(number) for name, number in who.items()}})
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/bin/sh
case "$1" in
show) for host in $HOSTS; do echo "$host"; done ;;
requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def write_slurm(directory: Path, **others: str) -> Path:
    """Write srun, scontrol and other programs, by name, into ``directory``, and return it.

    scontrol's hosts are $HOSTS, and it appends the jobs to put back to the file $REQUEUED.
    """
    directory.mkdir(parents=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **others}.items():
        program = directory / name
        program.write_text(text)
        program.chmod(0o755)
    return directory
