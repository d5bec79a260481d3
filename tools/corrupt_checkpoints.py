"""Is every damage to a checkpoint found, named and survived? Damages real checkpoints in many ways.

    python tools/corrupt_checkpoints.py --count 200 --seed 0 --report results/corruption.md

trains a small model on synthetic ratings on two ranks (or takes ``--run RUN_DIR``, which is not changed),
damages a copy of the newest checkpoint, one damage at a time, and asks the library: the damaged one must
be refused by a message that names it, and the one before it must be taken instead.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from dist_moe.engine.checkpoint.files import (  # noqa: E402
    checkpoints_of,
    complete_directories,
    newest_good_checkpoint,
    tested_checkpoint,
    verify_checkpoint,
)
from dist_moe.engine.checkpoint.format import MANIFEST  # noqa: E402
from dist_moe.errors import UserError  # noqa: E402


@dataclass(frozen=True)
class Damage:
    """``what``: for a person. ``names``: parts of paths, one of which a refusal must name."""

    kind: str
    what: str
    names: tuple[str, ...]


def flip_bit(newest: Path, older: Path, drawn: random.Random) -> Damage:
    file = drawn.choice(files_of(newest))
    return flip(file, drawn)


def flip_bit_of_manifest(newest: Path, older: Path, drawn: random.Random) -> Damage:
    return flip(newest / MANIFEST, drawn)


def flip_bit_of_trainer(newest: Path, older: Path, drawn: random.Random) -> Damage:
    return flip(newest / "trainer.json", drawn)


def flip(file: Path, drawn: random.Random) -> Damage:
    content = bytearray(file.read_bytes())
    position, bit = drawn.randrange(len(content)), drawn.randrange(8)
    content[position] ^= 1 << bit
    file.write_bytes(content)
    where = file.name if file.suffix == ".json" else "tensors"
    return Damage(f"bit flip in {where}", f"{file.name}: bit {bit} of byte {position}", (file.name,))


def truncate(newest: Path, older: Path, drawn: random.Random) -> Damage:
    file = drawn.choice(files_of(newest))
    length = drawn.randrange(1, file.stat().st_size)
    file.write_bytes(file.read_bytes()[:length])
    return Damage("truncation", f"{file.name} after {length} bytes", (file.name,))


def empty(newest: Path, older: Path, drawn: random.Random) -> Damage:
    file = drawn.choice(files_of(newest))
    file.write_bytes(b"")
    return Damage("zero length", file.name, (file.name,))


def lengthen(newest: Path, older: Path, drawn: random.Random) -> Damage:
    file = drawn.choice(files_of(newest))
    file.write_bytes(file.read_bytes() + drawn.choice([b"\n", b"\0", b" " * 8]))
    return Damage("bytes appended", file.name, (file.name,))


def remove(newest: Path, older: Path, drawn: random.Random) -> Damage:
    file = drawn.choice(files_of(newest))
    file.unlink()
    return Damage("missing file", file.name, (file.name,))


def swap(newest: Path, older: Path, drawn: random.Random) -> Damage:
    one, other = drawn.sample(files_of(newest), 2)
    ours, theirs = one.read_bytes(), other.read_bytes()
    assert ours != theirs
    one.write_bytes(theirs)
    other.write_bytes(ours)
    return Damage("swapped files", f"{one.name} and {other.name}", (one.name, other.name))


def add(newest: Path, older: Path, drawn: random.Random) -> Damage:
    name = drawn.choice(["experts-00099.safetensors", "notes.txt", ".hidden", "trainer.json.bak"])
    source = drawn.choice(files_of(older))
    shutil.copyfile(source, newest / name)
    return Damage("extra file", name, (name,))


def older_manifest(newest: Path, older: Path, drawn: random.Random) -> Damage:
    shutil.copyfile(older / MANIFEST, newest / MANIFEST)
    return Damage("stale manifest", f"of {older.name}", (MANIFEST,))


def older_file(newest: Path, older: Path, drawn: random.Random) -> Damage:
    names = [file.name for file in files_of(older) if file.name != MANIFEST]
    name = drawn.choice([name for name in names if (older / name).read_bytes() != (newest / name).read_bytes()])
    shutil.copyfile(older / name, newest / name)
    return Damage("stale file", f"{name} of {older.name}", (name,))


def older_directory(newest: Path, older: Path, drawn: random.Random) -> Damage:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    return Damage("stale directory", f"{older.name} under the name {newest.name}", (newest.name,))


KINDS: list[Callable[[Path, Path, random.Random], Damage]] = [
    flip_bit,
    truncate,
    flip_bit_of_manifest,
    remove,
    swap,
    flip_bit_of_trainer,
    add,
    empty,
    older_manifest,
    older_file,
    lengthen,
    older_directory,
]


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def attempt(run: Path, scratch: Path, index: int, drawn: random.Random) -> tuple[Damage, list[str]]:
    """One damage to a copy of ``run``, which must have two checkpoints; and what the library did wrong with it."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(checkpoints_of(run), checkpoints_of(scratch))
    older, newest = complete_directories(checkpoints_of(scratch))[-2:]
    damage = KINDS[index % len(KINDS)](newest, older, drawn)
    return damage, [*faults_of_refusal(newest, damage), *faults_of_fallback(scratch, newest, older)]


def faults_of_refusal(newest: Path, damage: Damage) -> list[str]:
    try:
        verify_checkpoint(newest)
    except UserError as refusal:
        message = str(refusal)
        named = str(newest) in message and any(name in message for name in damage.names)
        return [] if named else [f"refused without a name: {message}"]
    return ["not found"]


def faults_of_fallback(run: Path, newest: Path, older: Path) -> list[str]:
    try:
        found, faults = newest_good_checkpoint(run)
    except UserError as refusal:  # of another format, as one bit of the manifest may say
        return [] if "format_version" in str(refusal) and str(newest) in str(refusal) else [f"refused by: {refusal}"]
    wrong = [] if (found, len(faults)) == (older, 1) else [f"{found.name} was taken, {len(faults)} fault(s) reported"]
    try:
        tested_checkpoint(run)
    except UserError as refusal:
        return wrong if str(newest) in str(refusal) else [*wrong, f"evaluation refused by: {refusal}"]
    return [*wrong, "evaluation would have loaded it"]


def train(directory: Path) -> Path:
    from tests.data.tiny_movielens import write_tiny_movielens
    from tests.helpers.runs import write_config

    data = {"root": str(write_tiny_movielens(directory / "raw", 120, 90)), "cache": str(directory / "cache")}
    train = {"max_steps": 20, "checkpoint_every": 10}
    config = write_config(directory, data, model={"permutation": {"epochs": 0.5}}, train=train)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dist_moe"]
    command = [*launch, "train", config, "--run-dir", directory / "run", "parallel.expert_parallel_size=2"]
    subprocess.run([str(part) for part in command], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return directory / "run"


def page(counts: Counter[str], found: Counter[str], command: str, files: list[str]) -> str:
    rows = [f"| {kind} | {counts[kind]} | {found[kind]} |" for kind in sorted(counts)]
    head = [
        "# Damaged checkpoints",
        "",
        f"`{command}`: one damage at a time to the newest of two checkpoints of",
        f"a run ({', '.join(files)}).",
        "",
        "Found: refused by a message that names the file (or the directory), not loaded by evaluation, and the",
        "checkpoint before it taken by `--resume`.",
        "",
        "| damage | tried | found, named, survived |",
        "| --- | --- | --- |",
    ]
    total = f"| **all** | {sum(counts.values())} | {sum(found.values())} |"
    return "\n".join([*head, *rows, total, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run with two checkpoints (default: one is trained)")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="where to write a table")
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    counts: Counter[str] = Counter()
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or train(Path(scratch) / "trained")
        for index in range(options.count):
            damage, faults = attempt(run, Path(scratch) / "damaged", index, drawn)
            counts[damage.kind] += 1
            found[damage.kind] += not faults
            for fault in faults:
                print(f"{damage.kind}, {damage.what}: {fault}")
        files = [file.name for file in files_of(complete_directories(checkpoints_of(run))[-1])]
    command = f"python tools/corrupt_checkpoints.py --count {options.count} --seed {options.seed}"
    text = page(counts, found, command, files)
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    return 0 if counts == found else 1


if __name__ == "__main__":
    sys.exit(main())
