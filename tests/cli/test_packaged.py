"""The wheel, with no repository around it: configurations by @NAME, TorchX's components, the version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import dist_moe
from dist_moe.config.packaged import config_path, packaged_configs
from dist_moe.errors import UserError
from dist_moe.recipes import load_config
from dist_moe.sweeps.config import load_sweep
from tests.helpers.commands import REPOSITORY

SOURCES = ("dist_moe", "configs", "launch", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel that was built from a copy of the sources."""
    root = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
    subprocess.run([sys.executable, "-m", *build], cwd=root, check=True)
    (wheel,) = (root / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "installed")
    return root / "installed"


def run(installed: Path, directory: Path, *command: str) -> str:
    """Run a command that finds the wheel's content first, in a directory outside of any checkout; its output."""
    done = subprocess.run(
        command, cwd=directory, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_the_package_and_nothing_else(installed: Path) -> None:
    (information,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"dist_moe", information.name}
    for folder in ("configs", "launch"):
        ours, theirs = (
            {path.relative_to(root / folder) for path in (root / folder).rglob("*.*") if path.suffix != ".pyc"}
            for root in (REPOSITORY, installed / "dist_moe")
        )
        assert ours == theirs
        theirs = {
            path.relative_to(installed / "dist_moe" / folder) for path in (installed / "dist_moe" / folder).rglob("*.*")
        }
        assert {path for path in ours if "__pycache__" not in path.parts} == theirs
    assert f"\nVersion: {dist_moe.__version__}\n" in (information / "METADATA").read_text()


def test_its_command_takes_packaged_configurations_anywhere(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, sys.executable, "-m", "dist_moe", "config", "@movielens_comet_plus", "seed=7")
    assert yaml.safe_load(shown)["seed"] == 7
    assert yaml.safe_load(shown)["model"]["permutation"]


def test_torchx_runs_its_components_and_still_its_own(installed: Path, tmp_path: Path) -> None:
    dry = ["torchx", "run", "--dryrun", "-s", "local_cwd"]
    job = run(installed, tmp_path, *dry, "dist_moe.train", "--config", "@lm_small", "--ranks", "3", "seed=1")
    assert "train @lm_small seed=1" in " ".join(job.split())
    assert "echo" in run(installed, tmp_path, *dry, "utils.echo", "--msg", "hello")


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_configuration_is_valid(name: str) -> None:
    if name.startswith("sweeps/"):
        assert load_sweep(config_path(f"@{name}")).config.is_file()
    else:
        load_config(config_path(f"@{name}"))


def test_a_sweep_may_start_from_a_packaged_configuration(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        config_path("@sweeps/small_movielens_rating").read_text().replace("../movielens_small.yaml", '"@lm_small"')
    )
    assert load_sweep(file).config == config_path("@lm_small")


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"@movielens_smal:.* did you mean @movielens_small?"):
        config_path("@movielens_smal")


def test_a_file_is_itself() -> None:
    assert config_path("a/b.yaml") == Path("a/b.yaml")
    assert config_path("b.yaml", Path("a")) == Path("a/b.yaml")
    assert config_path("./@b") == Path("@b")
