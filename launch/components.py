"""TorchX components: the same job on this machine, on Slurm, on Kubernetes.

    torchx run -s local_cwd --wait --log launch/components.py:train --config CONFIG --ranks 2 \
        parallel.expert_parallel_size=2
    torchx run -s slurm -cfg partition=gpu launch/components.py:train --config CONFIG --nodes 4 --ranks 8 \
        --gpus 8 parallel.expert_parallel_size=8
"""

from torchx import specs
from torchx.components.dist import ddp


def train(
    *overrides: str,
    config: str = "",
    resume: str = "",
    run_dir: str = "",
    nodes: int = 1,
    ranks: int = 2,
    threads: int = 1,
    gpus: int = 0,
    cpus: int = 2,
    memory_mb: int = 16384,
    image: str = "",
    max_retries: int = 0,
) -> specs.AppDef:
    """Train with dist_moe on ``nodes`` times ``ranks`` processes.

    Args:
        overrides: fields of the configuration to set differently, key=value
        config: YAML configuration, see configs/
        resume: run directory to go on with, instead of a configuration
        run_dir: where to write; on a file system that all nodes share
        nodes: machines
        ranks: processes on each machine
        threads: CPU threads of each process
        gpus: GPUs of each machine
        cpus: CPU cores of each machine
        memory_mb: memory of each machine in MB
        image: container image, for the schedulers that need one
        max_retries: times a failed job is started again; above 0 the run goes on by itself (--auto-resume)
    """
    command = ["train"]
    if resume:
        command += ["--resume", resume]
    if run_dir:
        command += ["--run-dir", run_dir]
    if config:
        command.append(config)
        if max_retries:
            command.append("--auto-resume")
    return ddp(
        *command,
        *overrides,
        m="dist_moe",
        name="dist_moe/train",
        image=image,
        j=f"{nodes}x{ranks}",
        gpu=gpus,
        cpu=cpus,
        memMB=memory_mb,
        max_retries=max_retries,
        env={"OMP_NUM_THREADS": str(threads)},
        tee=0,
    )
