"""Running the command line in this process, and what every refusal has to look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_moe.cli.main import main
from tests.helpers.runs import write_config

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without --run-dir goes to runs/ of the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path, tiny_data: dict[str, str]) -> Path:
    """The tiny run."""
    return write_config(tmp_path / "config", tiny_data)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Call it with arguments and with parts that the message must contain; it returns the message.

    Exit code 2, one message on stderr, no exception, and no process group on the way to it.
    """

    def open_group(*_: object, **__: object) -> None:
        raise AssertionError("a process group was opened")

    def check(arguments: list[object], *parts: str) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert (code, said.out) == (2, "")
        _progress, mark, message = said.err.partition("dist-moe: ")
        assert mark
        assert "Traceback" not in said.err
        for part in parts:
            assert part in message
        return message

    monkeypatch.setattr(dist, "init_process_group", open_group)
    return check
