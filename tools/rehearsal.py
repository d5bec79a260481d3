"""Every way to start a job on several machines, rehearsed on this one: does it train what one process trains?

    python -m tools.rehearsal --nodes 2 --ranks 1 --report results/rehearsal.md

The machines are network namespaces with cables of limited speed (tools/namespaces.py); as root on Linux.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dist_moe.config.files import parse_json, read_json
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.runs import write_config
from tools.namespaces import INTERFACE, Node, cluster, why_not

REPOSITORY = Path(__file__).parents[1]
PORT = 29511
STEPS = 20
SAME = 1e-5
PATIENCE_S = 900.0
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
"""Where programs are looked for: those of this interpreter's environment first, whether or not it is on PATH."""
PROGRAMS = ("dist-moe", "torchrun", "deepspeed")

PDSH = f"""#!{sys.executable} -SE
import os, subprocess, sys
hosts = sys.argv[sys.argv.index("-w") + 1].split(",")
command = " ".join(sys.argv[sys.argv.index("-w") + 2 :])
shells = [
    ["ip", "netns", "exec", dict(pair.split("=") for pair in os.environ["NODES"].split())[host], "sh", "-c"]
    for host in hosts
]
clean = {{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}}
nodes = [
    subprocess.Popen([*shell, command.replace("%n", str(rank))], env=clean) for rank, shell in enumerate(shells)
]
sys.exit(max(node.wait() for node in nodes))
"""


@dataclass(frozen=True)
class Rehearsal:
    """``ranks`` processes on each of ``nodes``; ``directory`` holds what is needed and written."""

    nodes: list[Node]
    ranks: int
    directory: Path

    @property
    def world_size(self) -> int:
        return self.ranks * len(self.nodes)

    def arguments(self, run: Path) -> list[str]:
        """``dist-moe``'s arguments for a job of all ranks."""
        layout = f"parallel.expert_parallel_size={self.world_size}"
        return ["train", str(self.directory / "config.yaml"), "--run-dir", str(run), layout]


@dataclass(frozen=True)
class Start:
    """A process to start: its words, and what it needs in its environment. ``cwd``: where it runs."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    cwd: Path = REPOSITORY


Way = Callable[[Rehearsal, Path], list[Start]]


def torchrun_static(rehearsal: Rehearsal, run: Path) -> list[Start]:
    """torchrun, where each node is told its number."""
    first = rehearsal.nodes[0].address
    shape = ["--nnodes", len(rehearsal.nodes), "--nproc-per-node", rehearsal.ranks]
    meeting = ["--master-addr", first, "--master-port", PORT, "-m", "dist_moe", *rehearsal.arguments(run)]
    return [
        Start(node.command("torchrun", *shape, "--node-rank", number, *meeting))
        for number, node in enumerate(rehearsal.nodes)
    ]


def torchrun_c10d(rehearsal: Rehearsal, run: Path) -> list[Start]:
    """torchrun, where the nodes find their numbers at a rendezvous."""
    first = rehearsal.nodes[0].address
    shape = ["--nnodes", len(rehearsal.nodes), "--nproc-per-node", rehearsal.ranks]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{PORT}", "--rdzv-id", "rehearsal"]
    module = ["-m", "dist_moe", *rehearsal.arguments(run)]
    return [
        Start(node.command("torchrun", *shape, *meeting, *_place(number, node), *module))
        for number, node in enumerate(rehearsal.nodes)
    ]


def _place(number: int, node: Node) -> list[str]:
    """The nodes share a host's name, so torchrun cannot find out by it which of them is the endpoint."""
    return ["--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", node.address]


def deepspeed_on_each_node(rehearsal: Rehearsal, run: Path) -> list[Start]:
    """The deepspeed launcher, started on each node: no ssh between them."""
    hostfile = _write_hostfile(rehearsal, run)
    first = rehearsal.nodes[0].address
    options = ["--hostfile", hostfile, "--no_ssh", "--master_addr", first, "--master_port", PORT]
    module = ["--module", "dist_moe", *rehearsal.arguments(run)]
    return [
        Start(node.command("deepspeed", *options, "--node_rank", number, *module))
        for number, node in enumerate(rehearsal.nodes)
    ]


def deepspeed_pdsh(rehearsal: Rehearsal, run: Path) -> list[Start]:
    """The deepspeed launcher, started once; a stand-in for pdsh enters the namespaces instead of using ssh.

    Like ssh, it carries no environment over but PATH and HOME: the rest must come from ``.deepspeed_env``.
    """
    hostfile = _write_hostfile(rehearsal, run)
    work = hostfile.parent
    pdsh = work / "pdsh"
    pdsh.write_text(PDSH, encoding="utf-8")
    pdsh.chmod(0o755)
    needed = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    (work / ".deepspeed_env").write_text(
        "".join(f"{name}={value}\n" for name, value in needed.items()), encoding="utf-8"
    )
    first = rehearsal.nodes[0].address
    options = ["--hostfile", hostfile, "--no_ssh_check", "--master_addr", first, "--master_port", PORT]
    nodes = " ".join(f"{node.address}={node.namespace}" for node in rehearsal.nodes)
    words = ["deepspeed", *options, "--module", "dist_moe", *rehearsal.arguments(run)]
    variables = {"PATH": f"{work}{os.pathsep}{PATH}", "NODES": nodes, "GLOO_SOCKET_IFNAME": ""}
    return [Start([str(word) for word in words], variables, work)]


def _write_hostfile(rehearsal: Rehearsal, run: Path) -> Path:
    work = run.with_name(f"{run.name}-launcher")
    work.mkdir()
    hostfile = work / "hostfile"
    hostfile.write_text(
        "".join(f"{node.address} slots={rehearsal.ranks}\n" for node in rehearsal.nodes), encoding="utf-8"
    )
    return hostfile


def torchx_slurm(rehearsal: Rehearsal, run: Path) -> list[Start]:
    """The commands that TorchX would give to Slurm's nodes, word by word."""
    from torchx.runner import get_runner

    command, config, *others = rehearsal.arguments(run)
    sizes = ["--nodes", len(rehearsal.nodes), "--ranks", rehearsal.ranks, "--port", PORT]
    assert (command, others[0]) == ("train", "--run-dir")
    options = ["--config", config, "--run_dir", others[1], "--interface", INTERFACE, *sizes, *others[2:]]
    with get_runner() as runner:
        component = str(REPOSITORY / "launch" / "components.py") + ":train"
        request = runner.dryrun_component(component, [str(option) for option in options], "slurm").request
    starts = []
    for number, (node, replica) in enumerate(zip(rehearsal.nodes, request.replicas.values(), strict=True)):
        conf = {"PET_RDZV_CONF": f"is_host={int(number == 0)}", "PET_LOCAL_ADDR": node.address}
        slurm = {"SLURM_JOB_NODELIST_HET_GROUP_0": rehearsal.nodes[0].address}
        starts.append(Start(node.command(replica.entrypoint, *replica.args), replica.env | conf | slurm))
    return starts


WAYS: dict[str, Way] = {
    "torchrun": torchrun_static,
    "torchrun-c10d": torchrun_c10d,
    "deepspeed-no-ssh": deepspeed_on_each_node,
    "deepspeed-pdsh": deepspeed_pdsh,
    "torchx-slurm": torchx_slurm,
}


@dataclass(frozen=True)
class Result:
    """Losses of every step, the test figures, and rows sent to other ranks in all steps."""

    losses: list[float]
    test: dict[str, Any]
    wire_rows: int

    @classmethod
    def read(cls, run: Path) -> Result:
        records = [parse_json(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        test = read_json(run / "summary.json")["test"]
        losses = [float(record["loss"]) for record in records]
        return cls(losses, test, sum(int(record["wire_rows"]) for record in records))

    def difference(self, other: Result) -> float:
        """The largest difference of a loss, of any step or of the test."""
        ours, theirs = ([*result.losses, result.test["loss"]] for result in (self, other))
        return max(abs(one - another) for one, another in zip(ours, theirs, strict=True))


def prepare(directory: Path) -> Path:
    """Write the data and the configuration of a tiny run into ``directory``; the configuration."""
    root = write_tiny_movielens(directory / "raw", users=120, items=90)
    data = {"root": str(root), "cache": str(directory / "cache")}
    return write_config(directory, data, train={"max_steps": STEPS})


def train_alone(config: Path) -> Result:
    """Train in one process and return its result."""
    run = config.with_name("one-process")
    _run_all([Start(["dist-moe", "train", str(config), "--run-dir", str(run)])])
    return Result.read(run)


def rehearse(rehearsal: Rehearsal, name: str, into: str) -> Result:
    """Train on all nodes, started in the way of that name, into that directory.

    Raises RuntimeError with what was said if it fails.
    """
    run = rehearsal.directory / into
    _run_all(WAYS[name](rehearsal, run))
    return Result.read(run)


def _run_all(starts: Sequence[Start]) -> None:
    """Run processes side by side until all have ended; on any failure none of them is left."""
    common = {
        "PATH": PATH,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE if len(starts) > 1 else "",
    }
    common = {name: value for name, value in common.items() if value}
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for number, start in enumerate(starts):
                own = {name: value for name, value in start.variables.items() if value}
                with open(f"{logs}/{number}", "w", encoding="utf-8") as log:
                    environment = os.environ | common | own
                    processes.append(
                        subprocess.Popen(
                            start.words,
                            cwd=start.cwd,
                            env=environment,
                            stdout=log,
                            stderr=log,
                            text=True,
                            encoding="utf-8",
                        )
                    )
            codes = _wait(processes)
        finally:
            for process in processes:
                process.terminate()
        if codes != [0] * len(starts):
            raise RuntimeError(_story(starts, codes, Path(logs)))


def _wait(processes: Sequence[subprocess.Popen[str]]) -> list[int | None]:
    """Exit codes, as soon as all have ended or one has failed; None for those that still run."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    return codes


def _story(starts: Sequence[Start], codes: Sequence[int | None], logs: Path) -> str:
    ends = [f"{shlex.join(start.words)}\nended with {code}:" for start, code in zip(starts, codes, strict=True)]
    said = [(logs / str(number)).read_text(encoding="utf-8")[-3000:] for number in range(len(starts))]
    return "\n".join(part for pair in zip(ends, said, strict=True) for part in pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each node")
    parser.add_argument("--rate", default="1gbit", help="speed of each node's cable, as tc writes it")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--report", type=Path, help="file to write the table to as well")
    options = parser.parse_args()
    if missing := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
        sys.exit(f"{' and '.join(missing)} not found beside {sys.executable} nor on PATH: install what dist_moe needs")
    if reason := why_not():
        sys.exit(f"no machines can be made here: {reason}")
    signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory() as directory, cluster(options.nodes, options.rate) as nodes:
        one = train_alone(prepare(Path(directory)))
        rehearsal = Rehearsal(nodes, options.ranks, Path(directory))
        results = {}
        for name in options.ways:
            results[name] = rehearse(rehearsal, name, name)
            print(f"{name}: differs from one process by {results[name].difference(one):.1e}", file=sys.stderr)
    report = describe(options, one, results)
    print(report)
    if options.report:
        options.report.write_text(report, encoding="utf-8")
    if any(result.difference(one) > SAME for result in results.values()):
        sys.exit("not every way gives what one process gives")


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)  # by way of every 'finally'


def describe(options: argparse.Namespace, one: Result, results: dict[str, Result]) -> str:
    """The report, in Markdown."""
    first = next(iter(results.values()))
    rows = [
        f"| {name} | {result.losses[-1]:.6f} | {result.difference(one):.1e} | "
        f"{'yes' if result.difference(first) == 0 else 'no'} | {result.wire_rows} |"
        for name, result in results.items()
    ]
    command = f"python -m tools.rehearsal --nodes {options.nodes} --ranks {options.ranks} --rate {options.rate}"
    return "\n".join(
        [
            "# A rehearsal of several machines",
            "",
            f"`{command}`, seed 0, on {os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
            f"torch {torch.__version__}.",
            f"{options.nodes} network namespaces with {options.ranks} rank(s) each, cables of {options.rate}, "
            f"{STEPS} steps on generated ratings, experts split over all ranks.",
            "",
            "| started by | loss of the last step | largest difference from one process, of any step and of the "
            "test loss | bit for bit as the first way | rows sent to other ranks |",
            "| --- | --- | --- | --- | --- |",
            f"| one process | {one.losses[-1]:.6f} | | | {one.wire_rows} |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
