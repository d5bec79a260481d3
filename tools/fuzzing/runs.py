"""Odd run directories: checkpoints whose content is malformed behind right digests, and records that are not whole."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.runs import write_config
from tools.fuzzing.case import Area, Case, Must, command
from tools.fuzzing.mutate import copied, odd_bytes, odd_file, odd_json

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, EVERY = 4, 2
MANIFEST = "manifest.json"


class RunArea(Area):
    """The base of the areas of run directories: a run of four steps with two checkpoints."""

    @property
    def made(self) -> Path:
        """The directory of the run, which all areas share."""
        return self.base.parent / "a run"

    def prepare(self) -> None:
        """Train the run in a process of its own, and keep what `evaluate` says of it."""
        if self.made.is_dir():
            return
        root = write_tiny_movielens(self.made / "raw", users=40, items=20)
        data = {"root": str(root), "cache": str(self.made / "cache")}
        train = {"max_steps": STEPS, "checkpoint_every": EVERY, "batch_size": 16}
        config = write_config(self.made, data, train=train)
        program = f"""
import sys
from dist_moe.cli.main import main
main(["train", {str(config)!r}, "--run-dir", {str(self.made / "run")!r}])
sys.stdout = open({str(self.made / "evaluated")!r}, "w")
sys.exit(main(["evaluate", {str(self.made / "run")!r}]))
"""
        subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, check=True)

    def opened(self, user: Path) -> Path:
        """Return a copy of the run, which is the user's."""
        run = user / "run"
        run.mkdir()
        copied(self.made / "run", run)
        return run

    def resume(self, user: Path, ours: Path) -> Any:
        """Go on with a copy of the user's run for one step; return its directory."""
        copied(user / "run", ours / "run")
        command("train", "--resume", ours / "run", f"train.max_steps={STEPS + 1}")
        return ours / "run"


class CheckpointsArea(RunArea):
    """Checkpoints with bytes, values or tensors changed, most of them with digests that say so."""

    name = "checkpoints"

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Change the newest checkpoint."""
        run = self.opened(user)
        newest = run / "checkpoints" / f"step-{STEPS:08d}"
        kind = drawn.choices(["none", "kind", "bytes", "json", "tensors"], [1, 2, 3, 6, 8])[0]
        must: Must = "accept" if kind == "none" else None
        path = drawn.choice(sorted(newest.iterdir()))
        what, seals = kind, kind in ("json", "tensors")
        if kind == "kind":
            what, must = odd_file(path, drawn), "refuse"
        elif kind == "bytes":
            before = path.read_bytes()
            what = odd_bytes(path, drawn)
            must = "accept" if path.read_bytes() == before else "refuse"
        elif kind == "json":
            path = newest / drawn.choice(["trainer.json", MANIFEST])
            content, what = odd_json(json.loads(path.read_text(encoding="utf-8")), drawn)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        elif kind == "tensors":
            what, must = _change(drawn.choice(sorted(newest.glob("*.safetensors"))), drawn)
        if seals:
            _seal(newest)
        entry = drawn.choices(["inspect", "evaluate", "resume"], [4, 4, 2])[0]
        if entry == "resume" and must == "refuse":
            entry = "inspect"  # a run goes on from the checkpoint before, and says so
        if entry == "inspect" and seals:
            must = None  # numbers are looked at by whoever uses them
        runs: dict[str, Callable[[], Any]] = {
            "inspect": lambda: command("inspect", run),
            "evaluate": lambda: command("evaluate", run),
            "resume": lambda: self.resume(user, ours),
        }

        def check(found: Any) -> str | None:
            if entry == "evaluate" and kind == "json":
                return self._other_metrics(str(found).replace(str(run), str(self.made / "run")))
            return None

        return Case(f"{entry}: {path.name}: {what}", runs[entry], check, must)

    def _other_metrics(self, text: str) -> str | None:
        wanted = (self.made / "evaluated").read_text(encoding="utf-8")
        return None if text == wanted else f"other metrics, and the weights are the same: {text[:300]}"


def _seal(directory: Path) -> None:
    """Write the digests of what there is into the manifest, as far as that is one."""
    path = directory / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    if isinstance(content.get("files"), dict):
        for name in content["files"]:
            if isinstance(name, str) and (directory / name[:200]).is_file() and "/" not in name:
                content["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    content.pop("sha256", None)
    text = json.dumps(content, indent=2) + "\n"
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _change(path: Path, drawn: random.Random) -> tuple[str, Must]:
    """Change a tensor of a checkpoint's file; return what and whether it must be refused."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = drawn.choice(sorted(tensors))
    tensor = tensors[name]
    spoilt = tensor.clone()
    if tensor.is_floating_point():
        spoilt.view(-1)[:1] = drawn.choice([torch.nan, torch.inf])
    ways: dict[str, tuple[Callable[[], dict[str, Tensor]], Must]] = {
        "missing": (lambda: {n: t for n, t in tensors.items() if n != name}, "refuse"),
        "another name": (lambda: {f"x{n}" if n == name else n: t for n, t in tensors.items()}, "refuse"),
        "another state": (
            lambda: {n.replace("|", "|x") if n == name else n: t for n, t in tensors.items()},
            "refuse",
        ),
        "a name without a state": (lambda: tensors | {"x": tensor.clone()}, "refuse"),
        "an expert too many": (lambda: tensors | {"x|master|99": tensor.clone()}, "refuse"),
        "an expert that is no number": (lambda: tensors | {"x|master|y": tensor.clone()}, "refuse"),
        "flat": (lambda: tensors | {name: tensor.flatten().clone()}, "refuse" if tensor.dim() != 1 else None),
        "one row more": (lambda: tensors | {name: torch.cat([tensor.view(-1), tensor.view(-1)])}, "refuse"),
        "fp16": (lambda: tensors | {name: tensor.half()}, "refuse" if tensor.is_floating_point() else None),
        "whole numbers": (lambda: tensors | {name: tensor.long()}, "refuse" if tensor.is_floating_point() else None),
        "not finite": (lambda: tensors | {name: spoilt}, "refuse" if name.split("|")[1] == "master" else None),
        "negative": (lambda: tensors | {name: -tensor.abs() - 1}, "refuse" if "exp_avg_sq" in name else None),
    }
    what = drawn.choice(list(ways))
    make, must = ways[what]
    save_file(make(), path, metadata)
    return f"{name}: {what}", must


class RecordsArea(RunArea):
    """Records and other files of a run that are not whole, before the run goes on."""

    name = "records"

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Change a file beside the checkpoints."""
        run = self.opened(user)
        names = ["metrics.jsonl", "metrics.jsonl", "metrics.jsonl", "environment.json", "summary.json", "config.yaml"]
        path = run / drawn.choice(names)
        kind = drawn.choices(["none", "kind", "bytes", "line", "directory"], [1, 3, 4, 8, 1])[0]
        what: str = kind
        if kind == "kind":
            what = odd_file(path, drawn)
        elif kind == "bytes":
            what = odd_bytes(path, drawn)
        elif kind == "line":
            what = _line(run / "metrics.jsonl", drawn)
        elif kind == "directory":
            name = drawn.choice(["heartbeats", "best", "stages"])
            subprocess.run(["rm", "-rf", str(run / name)], check=True)
            (run / name).write_text("a file", encoding="utf-8")
            what = f"{name} is a file"
        good = _good_records(run / "metrics.jsonl")

        def check(found: Any) -> str | None:
            after = _good_records(Path(found) / "metrics.jsonl")
            lost = [record for record in good if record not in after]
            if lost and kind != "kind":
                return f"records are lost: {lost[:2]}"
            steps = [record["step"] for record in after if "validation" not in record]
            return None if STEPS + 1 in steps else f"the new step is not recorded: {steps}"

        return Case(what, lambda: self.resume(user, ours), check, "accept" if kind == "none" else None)


def _line(path: Path, drawn: random.Random) -> str:
    lines = path.read_bytes().split(b"\n")
    at = drawn.randrange(len(lines))
    odd = [b"", b"1", b"[]", b"null", b"{}", b'"x"', b"{", b"\xff", b"\0" * 50, b"[" * 5000, b"9" * 5000]
    odd += [b'{"step": %s}' % value for value in (b'"x"', b"NaN", b"-1", b"1e400", b'3, "step": 4', b"true", b"[]")]
    new = drawn.choice(odd)
    way = drawn.choice(["instead", "before", "joined"])
    lines[at : at + (way != "before")] = [new + lines[at]] if way == "joined" else [new]
    path.write_bytes(b"\n".join(lines))
    return f"{path.name}, line {at + 1}: {new[:20]!r} {way}"


def _good_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run's steps that a naive reader finds, line by line."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and record["step"] > 0 and len(record) > 1:
            found.append(record)
    return found
