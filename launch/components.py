"""TorchX components: the same job on this machine, on Slurm, on Kubernetes; docs/launch.md has a page for each.

    torchx run -s local_cwd --wait --log launch/components.py:train --config CONFIG --ranks 2 \
        parallel.expert_parallel_size=2
    torchx run -s slurm -cfg partition=gpu launch/components.py:train --config CONFIG --nodes 4 --ranks 8 \
        --gpus 8 parallel.expert_parallel_size=8
    torchx run -s kubernetes -cfg queue=default launch/components.py:elastic --config CONFIG --min_nodes 2 \
        --max_nodes 4 --ranks 8 --gpus 8 --image IMAGE --run_dir /shared/run parallel.expert_parallel_size=8
"""

from torchx import specs
from torchx.components.dist import ddp


def train(
    *overrides: str,
    config: str = "",
    resume: str = "",
    run_dir: str = "",
    auto_resume: bool = False,
    nodes: int = 1,
    ranks: int = 2,
    threads: int = 1,
    gpus: int = 0,
    cpus: int = 2,
    memory_mb: int = 16384,
    image: str = "",
    mounts: str = "",
    interface: str = "",
    port: int = 29500,
    grace_s: int = 100,
    max_retries: int = 0,
) -> specs.AppDef:
    """Train with dist_moe on ``nodes`` times ``ranks`` processes.

    Args:
        overrides: fields of the configuration to set differently, key=value
        config: YAML configuration, see configs/
        resume: run directory to go on with, instead of a configuration
        run_dir: where to write; on a file system that all nodes share
        auto_resume: go on with run_dir if it holds a run; a job that is started again needs it
        nodes: machines
        ranks: processes on each machine
        threads: CPU threads of each process
        gpus: GPUs of each machine
        cpus: CPU cores of each machine
        memory_mb: memory of each machine in MB
        image: container image, for the schedulers that need one
        mounts: what to mount into containers, for example type=volume,src=CLAIM,dst=/shared
        interface: network interface by which the machines reach one another, where the host's name does not tell
        port: where rank 0 listens for the others
        grace_s: seconds in which the ranks may write their checkpoint when the job is told to stop
        max_retries: times a failed job is started again; above 0 it goes on by itself (auto_resume)
    """
    command = _command(config, resume, run_dir, auto_resume or (max_retries > 0 and not resume), overrides)
    environment = _environment(threads, interface, grace_s)
    size = {"gpu": gpus, "cpu": cpus, "memMB": memory_mb}
    return _job(command, f"{nodes}x{ranks}", environment, size, image, mounts, port, max_retries)


def elastic(
    *overrides: str,
    config: str = "",
    run_dir: str = "",
    auto_resume: bool = True,
    min_nodes: int = 1,
    max_nodes: int = 2,
    ranks: int = 2,
    threads: int = 1,
    gpus: int = 0,
    cpus: int = 2,
    memory_mb: int = 16384,
    image: str = "",
    mounts: str = "",
    interface: str = "",
    port: int = 29500,
    grace_s: int = 100,
    max_restarts: int = 3,
    max_retries: int = 3,
) -> specs.AppDef:
    """Train on as many machines as there are, ``min_nodes`` to ``max_nodes``; when one goes or comes, the
    others begin again with the newest checkpoint. Machines meet at the c10d rendezvous of the first.

    Args:
        overrides: fields of the configuration to set differently; parallel.expert_parallel_size must divide
            the ranks of every number of machines
        config: YAML configuration, see configs/
        run_dir: where to write; on a file system that all nodes share
        auto_resume: go on with run_dir if it holds a run; without it a restart is refused
        min_nodes: machines without which the training waits
        max_nodes: machines that are asked for
        ranks: processes on each machine
        threads: CPU threads of each process
        gpus: GPUs of each machine
        cpus: CPU cores of each machine
        memory_mb: memory of each machine in MB
        image: container image, for the schedulers that need one
        mounts: what to mount into containers, for example type=volume,src=CLAIM,dst=/shared
        interface: network interface by which the machines reach one another, where the host's name does not tell
        port: where the first machine listens for the others
        grace_s: seconds in which the ranks may write their checkpoint when the job is told to stop
        max_restarts: times the ranks are started again on the machines that are left
        max_retries: times the scheduler starts a failed job again
    """
    if not 1 <= min_nodes <= max_nodes:
        raise ValueError(f"--min_nodes {min_nodes} is not in 1..{max_nodes} (--max_nodes)")
    command = _command(config, "", run_dir, auto_resume, overrides)
    # torchrun reads its options from PET_* where the command line, which dist.ddp writes, leaves them out.
    environment = _environment(threads, interface, grace_s) | {"PET_MAX_RESTARTS": str(max_restarts)}
    size = {"gpu": gpus, "cpu": cpus, "memMB": memory_mb}
    return _job(command, f"{min_nodes}:{max_nodes}x{ranks}", environment, size, image, mounts, port, max_retries)


def _command(config: str, resume: str, run_dir: str, auto_resume: bool, overrides: tuple[str, ...]) -> list[str]:
    command = ["train"]
    if resume:
        command += ["--resume", resume]
    if run_dir:
        command += ["--run-dir", run_dir]
    if auto_resume:
        command.append("--auto-resume")
    if config:
        command.append(config)
    return [*command, *overrides]


def _environment(threads: int, interface: str, grace_s: int) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_s)}
    if interface:
        environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return environment


def _job(
    command: list[str],
    nodes_by_ranks: str,
    environment: dict[str, str],
    size: dict[str, int],
    image: str,
    mounts: str,
    port: int,
    max_retries: int,
) -> specs.AppDef:
    return ddp(
        *command,
        m="dist_moe",
        name="dist_moe/train",
        image=image,
        j=nodes_by_ranks,
        max_retries=max_retries,
        rdzv_port=port,
        mounts=mounts.split(",") if mounts else None,
        env=environment,
        tee=0,
        **size,
    )
