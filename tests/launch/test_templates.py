"""The files for Kubernetes and SkyPilot: their parts agree, and their commands train as two machines would run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from dist_moe.cli.main import _parse
from tests.helpers.commands import REPOSITORY, finish, succeed
from tests.helpers.pool import free_port
from tests.helpers.runs import losses_of, write_config

EP2 = "parallel.expert_parallel_size=2"
SKY: dict[str, Any] = yaml.safe_load((REPOSITORY / "launch/skypilot.yaml").read_text(encoding="utf-8"))
SERVICE, JOB = yaml.safe_load_all((REPOSITORY / "launch/kubernetes.yaml").read_text(encoding="utf-8"))
(POD,) = JOB["spec"]["template"]["spec"]["containers"]
POD_ENVIRONMENT: dict[str, str] = {one["name"]: one["value"] for one in POD["env"]}


def by_sky(node: int) -> tuple[str, dict[str, str]]:
    """The commands of a machine, and what SkyPilot tells it."""
    told = {"NODE_RANK": str(node), "NODE_IPS": "127.0.0.1\n127.0.0.2", "NUM_NODES": "2", "NUM_GPUS_PER_NODE": "1"}
    return SKY["run"], {f"SKYPILOT_{name}": value for name, value in told.items()}


def by_kubernetes(node: int) -> tuple[str, dict[str, str]]:
    """The command of a pod, and what it is told, by an address that means something here."""
    here = {"MASTER_ADDR": "127.0.0.1", "RANKS": "1", "JOB_COMPLETION_INDEX": str(node), "GLOO_SOCKET_IFNAME": "lo"}
    return POD["args"][0], POD_ENVIRONMENT | here


@pytest.mark.parametrize("way", [by_sky, by_kubernetes])
def test_torchrun_and_the_command_line_understand_it(way: Any) -> None:
    command, environment = way(1)
    environment = {"CONFIG": "@lm_small", "RUN_DIR": "run", "OVERRIDES": EP2} | environment
    words = subprocess.run(
        ["bash", "-euc", command.replace("torchrun", "printf '%s\\n'").replace("exec ", "")],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    options = get_args_parser().parse_args(words)
    assert (options.nnodes, options.node_rank, options.master_addr) == ("2", 1, "127.0.0.1")
    assert (options.module, options.training_script) == (True, "dist_moe")
    training = _parse(options.training_script_args)
    assert (Path(training.config).stem, str(training.run_dir)) == ("lm_small", environment["RUN_DIR"])
    assert training.auto_resume
    assert training.overrides == environment["OVERRIDES"].split()


def test_the_parts_of_the_kubernetes_job_name_each_other() -> None:
    spec, template = JOB["spec"], JOB["spec"]["template"]["spec"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert template["subdomain"] == SERVICE["metadata"]["name"]
    assert f"{JOB['metadata']['name']}-0.{template['subdomain']}" == POD_ENVIRONMENT["MASTER_ADDR"]
    assert spec["completions"] == spec["parallelism"] == int(POD_ENVIRONMENT["NODES"])
    assert POD["resources"]["limits"]["nvidia.com/gpu"] == int(POD_ENVIRONMENT["RANKS"])
    assert {one["name"] for one in POD["volumeMounts"]} == {one["name"] for one in template["volumes"]}
    patience = int(POD_ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert patience < template["terminationGracePeriodSeconds"]


def test_what_sky_may_be_given_is_there() -> None:
    page = (REPOSITORY / "docs/launch/skypilot.md").read_text(encoding="utf-8")
    given = [word for line in page.splitlines() if line.startswith("sky ") for word in shlex.split(line)]
    names = {before.partition("=")[0] for option, before in pairwise(given) if option == "--env"}
    assert names <= SKY["envs"].keys()
    assert set(re.findall(r"\$(\w+)", SKY["run"])) == {*SKY["envs"], *by_sky(0)[1]}


@pytest.mark.slow
@pytest.mark.parametrize("way", [by_sky, by_kubernetes])
def test_two_machines_train_what_two_ranks_do(tmp_path: Path, tiny_data: dict[str, str], way: Any) -> None:
    config, port = write_config(tmp_path, tiny_data, train={"max_steps": 5}), str(free_port())
    succeed(2, "train", "--run-dir", tmp_path / "reference", config, EP2)
    processes = []
    for node in (0, 1):
        command, environment = way(node)
        environment |= {"CONFIG": str(config), "RUN_DIR": str(tmp_path / "run"), "OVERRIDES": EP2}
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        processes.append(
            subprocess.Popen(
                ["bash", "-euc", command.replace("29500", port)],
                env=os.environ | {"PATH": search, "OMP_NUM_THREADS": "1"} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        outcome = finish(process)
        assert outcome.code == 0, outcome.err
    assert losses_of(tmp_path / "run").tolist() == losses_of(tmp_path / "reference").tolist()
