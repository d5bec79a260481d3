"""What TorchX would give to Slurm and Kubernetes, made without either: nodes, ranks, environment, command line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.components import train
from tests.helpers.commands import REPOSITORY, Outcome, finish, start
from tests.launch.slurm_stand_ins import write_slurm

FILE = "launch/components.py"
NODES, RANKS = 3, 4
SIZES = ["--ranks", RANKS, "--gpus", 4, "--cpus", 16, "--memory_mb", 2048, "--run_dir", "/shared/run"]
RUN_DIR = ["--run-dir", "/shared/run"]
OVERRIDES = ["parallel.expert_parallel_size=4", "seed=3"]


def dry_run(component: str, scheduler: str, settings: str, *arguments: object) -> Outcome:
    command = ["torchx", "run", "--dryrun", "-s", scheduler, "--workspace=", "-cfg", settings, f"{FILE}:{component}"]
    return finish(start(*command, *arguments))


def request(component: str, scheduler: str, settings: str, *arguments: object) -> str:
    outcome = dry_run(component, scheduler, settings, "--config", "c.yaml", *SIZES, *arguments, *OVERRIDES)
    assert outcome.code == 0, outcome.err
    return outcome.out.partition("=== SCHEDULER REQUEST ===\n")[2]


TORCHRUN = f"""#!{sys.executable} -SE
import json, os, sys
print(json.dumps({{"words": sys.argv[1:], "variables": dict(os.environ)}}), flush=True)
sys.exit(int(os.environ["CODE"]))
"""


@dataclass(frozen=True)
class Ran:
    """What the nodes of a Slurm job ran: ``torchrun``'s arguments and environment. ``requeued``: jobs put back."""

    code: int
    words: list[list[str]]
    variables: list[dict[str, str]]
    requeued: list[str]


def run_script(text: str, directory: Path, code: int = 0, restarts: int = 0) -> Ran:
    """Run what TorchX would give to sbatch, by programs that stand in for Slurm's and for torchrun."""
    script, requeued = directory / "script", directory / "requeued"
    script.write_text(text[text.index("#!/bin/bash") :])
    programs = write_slurm(directory / "bin", torchrun=TORCHRUN)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST_HET_GROUP_0": "first-node", "SLURM_RESTART_COUNT": str(restarts)}
    variables = job | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "REQUEUED": str(requeued)}
    done = subprocess.run(
        ["bash", script], env=os.environ | variables | {"CODE": str(code)}, capture_output=True, text=True, check=False
    )
    nodes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    put_back = requeued.read_text().split() if requeued.exists() else []
    return Ran(done.returncode, [node["words"] for node in nodes], [node["variables"] for node in nodes], put_back)


def test_a_slurm_job(tmp_path: Path) -> None:
    options = ["--nodes", NODES, "--threads", 2, "--interface", "ib0", "--port", 29600]
    text = request("train", "slurm", "partition=gpu,time=60,comment=mine", *options)
    assert text.startswith("sbatch --parsable --comment=mine")
    groups = re.findall(r"^#SBATCH --.*$", text, re.MULTILINE)
    assert len(groups) == NODES  # a heterogeneous job, one group for each node
    for group in groups:
        options = ["partition=gpu", "time=60", "requeue", "ntasks-per-node=1", "cpus-per-task=16", "mem=2048"]
        assert [option for option in [*options, "gpus-per-task=4"] if f"--{option}" not in group] == []

    ran = run_script(text, tmp_path)
    assert (ran.code, len(ran.words), ran.requeued) == (0, NODES, [])
    for words, variables in zip(ran.words, ran.variables, strict=True):
        assert words[words.index("-m") :] == ["-m", "dist_moe", "train", *RUN_DIR, "c.yaml", *OVERRIDES]
        assert following(words, "--nnodes", "--nproc_per_node") == [str(NODES), str(RANKS)]
        assert following(words, "--rdzv_backend", "--rdzv_endpoint") == ["c10d", "first-node:29600"]
        assert "77" in following(words, "--rdzv_id")[0]
        assert (variables["OMP_NUM_THREADS"], variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == ("2", "100")
        assert variables["GLOO_SOCKET_IFNAME"] == variables["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("restarts", "requeued"), [(0, ["77"]), (1, ["77"]), (2, [])])
def test_a_slurm_job_that_fails_is_tried_again(tmp_path: Path, restarts: int, requeued: list[str]) -> None:
    text = request("train", "slurm", "partition=gpu", "--nodes", 2, "--max_retries", 2, "--auto_resume", "True")
    ran = run_script(text, tmp_path, code=1, restarts=restarts)
    assert (ran.code, ran.requeued) == (1, requeued)
    assert all("--auto-resume" in words for words in ran.words)


@pytest.mark.parametrize(("max_retries", "goes_on"), [(0, False), (3, True)])
def test_a_job_with_retries_resumes_by_itself(max_retries: int, goes_on: bool) -> None:
    (role,) = train("seed=1", config="a.yaml", run_dir="runs/a", max_retries=max_retries).roles
    assert role.max_retries == max_retries
    assert ("--auto-resume" in " ".join(role.args)) == goes_on
    resumed = " ".join(train("seed=1", resume="runs/a", max_retries=max_retries).roles[0].args)
    assert "train --resume runs/a seed=1" in " ".join(resumed.split())
    assert "--auto-resume" not in resumed


def test_an_elastic_job(tmp_path: Path) -> None:
    sizes = ["--min_nodes", 2, "--max_nodes", NODES, "--max_restarts", 7]
    ran = run_script(request("elastic", "slurm", "partition=gpu", *sizes), tmp_path, code=1)
    assert ran.requeued == ["77"]
    for words, variables in zip(ran.words, ran.variables, strict=True):
        assert following(words, "--nnodes") == [f"2:{NODES}"]
        assert variables["PET_MAX_RESTARTS"] == "7"
        assert "--auto-resume" in words


def following(words: list[str], *options: str) -> list[str]:
    return [words[words.index(option) + 1] for option in options]


@pytest.mark.parametrize(("least", "most"), [(3, 2), (0, 2)])
def test_an_elastic_job_of_no_size(least: int, most: int) -> None:
    sizes = ["--min_nodes", least, "--max_nodes", most]
    outcome = dry_run("elastic", "slurm", "partition=gpu", "--config", "c.yaml", *sizes)
    assert outcome.code != 0
    assert f"--min_nodes {least} is not in 1..{most}" in outcome.err


def kubernetes_job(component: str, *arguments: object) -> dict[str, Any]:
    if importlib.util.find_spec("kubernetes") is None:
        pytest.skip("the kubernetes package is not installed: pip install kubernetes")
    where = ["--image", "registry/dist_moe:1", "--mounts", "type=volume,src=claim,dst=/shared"]
    text = request(component, "kubernetes", "queue=default,namespace=research", *where, *arguments)
    job: dict[str, Any] = yaml.safe_load(text)
    return job


def test_a_kubernetes_job() -> None:
    job = kubernetes_job("train", "--nodes", NODES, "--max_retries", 2, "--interface", "eth0")
    assert job["spec"]["queue"] == "default"
    assert job["spec"]["maxRetry"] == 2
    assert [task["minAvailable"] for task in job["spec"]["tasks"]] == [1] * NODES
    for number, task in enumerate(job["spec"]["tasks"]):
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "registry/dist_moe:1"
        assert container["resources"]["limits"] == {"cpu": "16000m", "memory": "2048M", "nvidia.com/gpu": "4"}
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables["GLOO_SOCKET_IFNAME"] == "eth0"
        assert variables["OMP_NUM_THREADS"] == "1"
        assert "/shared" in [mount["mountPath"] for mount in container["volumeMounts"]]
        words = shlex.split(container["command"][2])
        host = "TORCHX_RANK0_HOST" if number == 0 else "VC_DISTMOE_0_HOSTS"
        assert following(words, "--rdzv_endpoint") == [f"${{{host}:=localhost}}:29500"]
        assert following(words, "--nnodes", "--nproc_per_node") == [str(NODES), str(RANKS)]
        assert words[words.index("-m") :] == ["-m", "dist_moe", "train", *RUN_DIR, "c.yaml", *OVERRIDES]


def test_an_elastic_kubernetes_job() -> None:
    job = kubernetes_job("elastic", "--min_nodes", 1, "--max_nodes", NODES)
    assert [task["minAvailable"] for task in job["spec"]["tasks"]] == [1] + [0] * (NODES - 1)
    (container,) = job["spec"]["tasks"][0]["template"]["spec"]["containers"]
    assert f"--nnodes 1:{NODES}" in container["command"][2]


def test_defaults_of_a_project(tmp_path: Path) -> None:
    """launch/torchxconfig.example, as .torchxconfig of a working directory."""
    (tmp_path / ".torchxconfig").write_text((REPOSITORY / "launch" / "torchxconfig.example").read_text())
    command = ["torchx", "run", "--dryrun", f"{REPOSITORY / FILE}:train", "--config", "c.yaml"]
    outcome = finish(start(*command, cwd=tmp_path))
    assert outcome.code == 0, outcome.err
    assert "--partition=gpu" in outcome.out
    assert "--time=24:00:00" in outcome.out
