"""Checkpoints whose contents make no sense although every digest is right: refused by a sentence, or harmless?

    python tools/mutate_checkpoints.py --count 2000 --seed 0

trains a small model on one rank (or takes ``--run RUN_DIR``, which is not changed), changes one thing in the newest
checkpoint of a copy, computes sizes and digests again, and asks the library. What is not refused must still resume, or
be refused then, in a sentence. Nothing may be removed by a refusal, and nothing may take longer than ten seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from dist_moe.config.files import digest_of, json_text  # noqa: E402
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, newest_good_checkpoint  # noqa: E402
from dist_moe.errors import UserError  # noqa: E402

LONGEST_S = 10.0
MANIFEST, TRAINER = "manifest.json", "trainer.json"
ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    -5,
    0,
    3,
    10**8,
    10**30,
    2**63,
    0.5,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "9" * 5000,
    [],
    [0],
    [[]],
    ["x"],
    {},
    {"x": 1},
    {"": {}},
]

Mutation = Callable[[Path, random.Random], str]
"""Changes a checkpoint and returns what it has done, in words; digests are computed afterwards."""


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` with the sizes and digests of the files that are there, and its own."""
    for name in list(manifest["files"]) if isinstance(manifest.get("files"), dict) else []:
        file = directory / name
        if name in {path.name for path in directory.iterdir()} and file.is_file():
            manifest["files"][name] = digest_of(file)
            if isinstance(manifest.get("sizes"), dict):
                manifest["sizes"][name] = file.stat().st_size
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(json_text(content).encode()).hexdigest()
    (directory / MANIFEST).write_text(json_text(content | {"sha256": digest}), encoding="utf-8")


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        yield (*path, name)
        yield from places(value, (*path, name))


def mutate_json(content: dict[str, Any], drawn: random.Random) -> str:
    """Change one value of a JSON object; return what was done."""
    path = drawn.choice(list(places(content)))
    owner = content
    for name in path[:-1]:
        owner = owner[name]
    kind = drawn.choice(["set", "set", "set", "delete", "add", "lengthen", "rename"])
    where = ".".join(map(str, path))
    if kind == "delete":
        del owner[path[-1]]
    elif kind == "add" and isinstance(owner, dict):
        owner[drawn.choice(["", "x", "step ", "../x", "seed"])] = drawn.choice(ODD_VALUES)
    elif kind == "rename" and isinstance(owner, dict):
        owner[drawn.choice(["-1", "x", "007", "../x", "99999999"])] = owner.pop(path[-1])
    elif kind == "lengthen" and isinstance(owner[path[-1]], list):
        owner[path[-1]] = owner[path[-1]] * 2 + [0]
    else:
        owner[path[-1]] = value = drawn.choice(ODD_VALUES)
        return f"{where} = {value!r:.40}"
    return f"{kind} {where}"


def change_trainer(directory: Path, drawn: random.Random) -> str:
    """Change a value of the trainer's state, in which callbacks and placements may have been added."""
    content = json.loads((directory / TRAINER).read_text(encoding="utf-8"))
    if drawn.random() < 0.3:
        order = drawn.choice([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 1, 2], [0, 1], list(range(8)), [-1, 0, 1, 2]])
        content["placements"] = {
            drawn.choice(["moe", "x", ""]): {"num_ranks": drawn.choice([1, 2, 3, 0]), "expert_of_position": order}
        }
    if drawn.random() < 0.2:
        content["callbacks"]["PlacementCallback"] = {"loads": drawn.choice(ODD_VALUES)}
    what = mutate_json(content, drawn)
    (directory / TRAINER).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return what


def change_trainer_text(directory: Path, drawn: random.Random) -> str:
    """Replace the text of the trainer's state by one that is odd JSON, or none."""
    text = (directory / TRAINER).read_text(encoding="utf-8")
    name, odd = drawn.choice(
        [
            ("duplicate key", text.replace("{", '{"step": 0,', 1)),
            ("deep nesting", text.replace('"callbacks": {', '"callbacks": {"x": {"y": ' + "[" * 10**5, 1)),
            ("deep nesting, closed", '{"step":' * 5000 + "1" + "}" * 5000),
            ("integer of 5,000 digits", text.replace('"step": ', '"step": ' + "9" * 5000, 1)),
            ("byte order mark", "\ufeff" + text),
            ("cut short", text[: len(text) // 2]),
            ("empty", ""),
            ("list", f"[{text}]"),
            ("two objects", text + text),
            ("number", "1e999"),
            ("large", text + " " * (129 * 2**20)),
        ]
    )
    (directory / TRAINER).write_text(odd, encoding="utf-8")
    return name


def change_trainer_bytes(directory: Path, drawn: random.Random) -> str:
    """Change one byte of the trainer's state."""
    content = bytearray((directory / TRAINER).read_bytes())
    place, value = drawn.randrange(len(content)), drawn.randrange(256)
    content[place] = value
    (directory / TRAINER).write_bytes(content)
    return f"byte {place} = {value}"


def change_tensors(directory: Path, drawn: random.Random) -> str:
    """Change one tensor of one file: its values, its dtype, its shape, its name."""
    file = drawn.choice(sorted(directory.glob("*.safetensors")))
    tensors = load_file(file)
    name = drawn.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = drawn.choice(
        ["value", "value", "dtype", "shape", "rows", "missing", "name", "extra", "another's", "0-dim", "state", "large"]
    )
    if kind == "value" and tensor.numel():
        value = drawn.choice([float("nan"), float("inf"), -1.0, 1e38, -(10.0**30), 2.0**62, 0.0, 7.0])
        flat = tensor.clone().view(-1)
        if not tensor.is_floating_point():
            value = 7 if value != value else int(max(-(2**62), min(value, 2**62)))
        flat[drawn.randrange(len(flat))] = value
        tensors[name] = flat.view(tensor.shape)
        kind = f"a number is {value}"
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8]
    names = ["x", "x|master", "x|buffer", "a|b|c", "moe|master|-1", "|", "x|exp_avg", f"{name}|0", f"{name}|99"]
    if kind == "dtype":
        tensors[name] = tensor.to(drawn.choice(dtypes))
    elif kind == "shape":
        tensors[name] = tensor.reshape(-1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    elif kind == "rows":
        tensors[name] = torch.cat([tensor.reshape(-1)] * 2) if drawn.random() < 0.5 else tensor.reshape(-1)[:-1].clone()
    elif kind == "name":
        tensors[drawn.choice(names)] = tensor
    elif kind == "extra":
        tensors[name], tensors[drawn.choice(names)] = tensor, tensor.clone()
    elif kind == "another's" and tensors:
        tensors[name] = tensors[drawn.choice(sorted(tensors))].clone()
    elif kind == "0-dim":
        tensors[name] = torch.zeros((), dtype=tensor.dtype)
    elif kind == "state":
        tensors[name.replace("|exp_avg", "|momentum").replace("|master", "|exp_avg")] = tensor
    elif kind == "large":
        tensors[name] = torch.full_like(tensor, 10**9 if not tensor.is_floating_point() else 1e30)
    save_file({key: one.contiguous() for key, one in tensors.items()}, file)
    return f"{name}: {kind}"


def change_header(directory: Path, drawn: random.Random) -> str:
    """Change the head of a safetensors file: offsets, dtype, length, names."""
    file = drawn.choice(sorted(directory.glob("*.safetensors")))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = drawn.choice(sorted(key for key in header if key != "__metadata__"))
    kind = drawn.choice(["offsets", "overlap", "dtype", "length", "shape", "text", "duplicate", "value"])
    if kind == "offsets":
        header[name]["data_offsets"] = drawn.choice([[0, 2**62], [-1, 0], [8, 4], [0, 0], [0]])
    elif kind == "overlap":
        header[name]["data_offsets"] = header[drawn.choice(sorted(header))].get("data_offsets", [0, 0])
    elif kind == "dtype":
        header[name]["dtype"] = drawn.choice(["F8_E4M3", "F16", "U64", "I32", "x", ""])
    elif kind == "shape":
        header[name]["shape"] = drawn.choice([[2**40, 2**40], [-1], [], [0], ["x"]])
    elif kind == "value":
        mutate_json(header, drawn)
    text = json.dumps(header).encode()
    if kind == "text":
        text = drawn.choice([b"{", b"[]", b"{}", b"null", b"\xff" * 16, b"[" * 10**5])
    if kind == "duplicate":
        text = text.replace(
            b"{", b"{" + json.dumps(name).encode() + b": " + json.dumps(header[name]).encode() + b",", 1
        )
    size = drawn.choice([0, 2**62, length * 10**6]) if kind == "length" else len(text)
    file.write_bytes(size.to_bytes(8, "little") + text + data)
    return f"{file.name}, {name}: {kind}"


def change_manifest(directory: Path, drawn: random.Random) -> str:
    """Change a value of the manifest, whose own digest is right afterwards."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    del manifest["sha256"]
    if drawn.random() < 0.3:
        name = drawn.choice(["../x", "/etc/passwd", ".", "..", "", "sub/x", "a\0b", "x.safetensors", "manifest.json"])
        manifest["files"][name], manifest["sizes"][name] = "0" * 64, 0
        what = f"names {name!r}"
    else:
        what = mutate_json(manifest, drawn)
    seal(directory, manifest)
    return what


def change_files(directory: Path, drawn: random.Random) -> str:
    """Put something else in the place of a file, or beside it."""
    file = drawn.choice(sorted(path for path in directory.iterdir() if path.name != MANIFEST))
    kind = drawn.choice(["directory", "pipe", "link to nothing", "link", "missing", "another's", "beside"])
    if kind == "beside":
        (directory / drawn.choice(["x", "experts-00077.safetensors", ".hidden"])).mkdir()
        return kind
    content = file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link to nothing":
        file.symlink_to("nowhere")
    elif kind == "link":
        other = directory.parent.parent / file.name
        other.write_bytes(content)
        file.symlink_to(other)
    elif kind == "another's":
        shutil.copy(directory / drawn.choice(sorted(path.name for path in directory.iterdir())), file)
    return f"{file.name}: {kind}"


MUTATIONS: list[Mutation] = [
    change_trainer,
    change_tensors,
    change_header,
    change_trainer,
    change_tensors,
    change_manifest,
    change_trainer_text,
    change_files,
    change_trainer_bytes,
]


def mutate(directory: Path, index: int, drawn: random.Random) -> str:
    """Change one thing of a checkpoint, by the kind that ``index`` names; its digests are right afterwards."""
    mutation = MUTATIONS[index % len(MUTATIONS)]
    what = mutation(directory, drawn)
    if mutation is not change_manifest:
        seal(directory, json.loads((directory / MANIFEST).read_text(encoding="utf-8")))
    return f"{mutation.__name__}: {what}"


def state_of(run: Path) -> dict[str, bytes]:
    """Return every file under the checkpoints of a run, pipes and links to nothing as what they are."""
    root = checkpoints_of(run)
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in sorted(root.rglob("*"))
        if not path.is_dir()
    }


def attempt(
    run: Path, scratch: Path, index: int, drawn: random.Random, resume: Callable[[Path], int]
) -> tuple[str, str, list[str]]:
    """Change one thing in a copy of ``run``; return what, the outcome, and what the library did wrong with it.

    ``resume``: trains a run on, and returns its exit code; what it raises is a fault.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(run, scratch)
    newest = complete_directories(checkpoints_of(scratch))[-1]
    what = mutate(newest, index, drawn)
    before, begun = state_of(scratch), time.monotonic()
    faults, outcome = [], "refused"
    try:
        newest_good_checkpoint(scratch)
    except UserError as refusal:
        if newest.name not in str(refusal):
            faults.append(f"refused without its name: {refusal}")
    except Exception as error:
        faults.append(f"raised {type(error).__name__}: {error}")
    else:
        try:
            code = resume(scratch)
        except BaseException as error:
            faults.append(f"resumed: {str(error)[-600:]}")
            code = 1
        outcome = {0: "resumed", 2: "refused when loaded", 3: "diverged"}.get(code, f"exit code {code}")
        if code not in (0, 2, 3):
            faults.append(outcome)
    if outcome.startswith("refused") and state_of(scratch) != before:
        faults.append("a refusal has changed the checkpoints")
    if time.monotonic() - begun > LONGEST_S:
        faults.append(f"it took {time.monotonic() - begun:.0f} s")
    return what, outcome, faults


def train(directory: Path) -> Path:
    """Train the run whose checkpoint is changed; return its directory."""
    from tests.data.tiny_movielens import write_tiny_movielens
    from tests.helpers.commands import run_here
    from tests.helpers.runs import write_config

    data = {"root": str(write_tiny_movielens(directory / "raw", 120, 90)), "cache": str(directory / "cache")}
    config = write_config(directory, data, **SECTIONS)
    outcome = run_here(["train", "--run-dir", str(directory / "run"), str(config)])
    assert outcome.code == 0, outcome.err
    return directory / "run"


SECTIONS: dict[str, Any] = {
    "model": {"permutation": {"epochs": 0.5}},
    "train": {"max_steps": 4, "checkpoint_every": 4, "validate_every": 2},
    "deepspeed": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}},
}
"""The configuration of a run whose checkpoint has a learnt table, a schedule and validations."""


def main() -> int:
    """Try ``--count`` changes and say what became of them."""
    from tests.helpers.commands import run_here

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of one rank with a checkpoint (default: one is trained)")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="name every change that was not refused at once")
    options = parser.parse_args()
    drawn, outcomes, wrong = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or train(Path(scratch) / "trained")
        for index in range(options.count):
            what, outcome, faults = attempt(
                run,
                Path(scratch) / "changed",
                index,
                drawn,
                lambda copy: run_here(["train", "--resume", str(copy), "train.max_steps=6"]).code,
            )
            outcomes[outcome] += 1
            if options.verbose and outcome != "refused":
                print(f"{index}: {what}: {outcome}", flush=True)
            for fault in faults:
                wrong += 1
                print(f"{index}: {what}: {fault}", flush=True)
    print(f"--count {options.count} --seed {options.seed}: {dict(outcomes)}, {wrong} fault(s)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
