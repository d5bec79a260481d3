"""Every command of docs/launch is understood by the launcher that it starts, and by dist-moe."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from dist_moe.cli.main import _parse
from dist_moe.engine.deepspeed.config import import_deepspeed

REPOSITORY = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """The commands of all pages that begin with ``program``."""
    texts = [page.read_text() for page in sorted((REPOSITORY / "docs" / "launch").glob("*.md"))]
    lines = [line for text in texts for block in BLOCK.findall(text) for line in block.replace("\\\n", "").splitlines()]
    found = [line for line in lines if line.startswith(f"{program} ")]
    assert found
    return found


def check_training(words: list[str]) -> argparse.Namespace:
    options = _parse(words)
    assert options.config is not None
    assert all("=" in override for override in options.overrides)
    return options


@pytest.mark.parametrize("command", commands("torchrun"))
def test_torchrun(command: str) -> None:
    options = get_args_parser().parse_args(shlex.split(command)[1:])
    assert (options.module, options.training_script) == (True, "dist_moe")
    check_training(options.training_script_args)


@pytest.mark.parametrize("command", commands("deepspeed"))
def test_deepspeed(command: str) -> None:
    import_deepspeed()
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    options = parse_args(shlex.split(command)[1:])
    assert (options.module, options.user_script) == (True, "dist_moe")
    check_training(options.user_args)
    if "--hostfile" in command:
        assert dict(fetch_hostfile(str(REPOSITORY / options.hostfile))) == {"node-a": 8, "node-b": 8}


@pytest.mark.parametrize("command", commands("dist-moe"))
def test_emulation(command: str) -> None:
    assert check_training(shlex.split(command)[1:]).emulate == 4


@pytest.mark.parametrize("command", commands("torchx"))
def test_torchx(command: str) -> None:
    """As far as TorchX goes without the package of the scheduler: the component with these arguments."""
    from torchx.components.dist import ddp  # noqa: F401  # a clear failure where TorchX is not installed
    from torchx.specs.builders import materialize_appdef

    from launch import components

    words = shlex.split(command)
    place = next(number for number, word in enumerate(words) if word.startswith("launch/components.py:"))
    component = getattr(components, words[place].rpartition(":")[2])
    (role,) = materialize_appdef(component, words[place + 1 :]).roles
    _launcher, _module, training = role.args[1].partition("-m dist_moe ")
    check_training(shlex.split(training))
    assert role.num_replicas == 4


def test_sbatch() -> None:
    (command,) = commands("sbatch")
    script, *arguments = [word for word in shlex.split(command)[1:] if not word.startswith("--")]
    assert subprocess.run(["bash", "-n", REPOSITORY / script], check=False).returncode == 0
    assert len(arguments) == 3


def test_rehearsal() -> None:
    (command,) = commands("python")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{command} --help"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert "several machines" in done.stdout
