"""The user's DeepSpeed section: what is refused and why, what passes, what is added."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder.builder import OpBuilder

from dist_moe.engine.deepspeed import checks as deepspeed_checks
from dist_moe.engine.deepspeed.checks import check_deepspeed_section
from dist_moe.engine.deepspeed.config import complete_deepspeed_section, import_deepspeed, lookup, zero_stage
from dist_moe.engine.deepspeed.optimizers import build_optimizer, take_step
from dist_moe.engine.deepspeed.parameter_state import number_like
from dist_moe.errors import UserError

SECTION: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a refusal for CPUs")


def with_key(dotted: str, value: Any) -> dict[str, Any]:
    section = copy.deepcopy(SECTION)
    *parents, last = dotted.split(".")
    inner = section
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return section


REFUSED = [
    ("train_batch_size", 64, "set train.batch_size"),
    ("train_micro_batch_size_per_gpu", 32, "set train.batch_size"),
    ("managed_gradient_accumulation", False, "leave it out"),
    ("gradient_allreduce_op", "sum", "use mean"),
    ("zero_optimization.contiguous_gradients", False, "leave it out"),
    ("zero_optimization.contiguous_gradients", 0, "leave it out"),
    ("zero_optimization.contiguous_gradients", "false", "leave it out"),
    ("zero_optimization.reduce_scatter", False, "leave it out"),
    ("zero_optimization.reduce_scatter", 0, "leave it out"),
    ("zero_optimization.elastic_checkpoint", True, "without it"),
    ("zero_optimization.offload_optimizer.device", "nvme", "use cpu"),
    ("zero_optimization.offload_param.device", "nvme", "use cpu"),
    ("zero_optimization.offload_optimizer.ratio", 0.5, "leave it out"),
    ("zero_optimization.offload_optimizer.super_offload", True, "leave it out"),
    ("zero_optimization.cpu_offload", True, "offload_optimizer: {device: cpu}"),
    ("zero_optimization.cpu_offload_param", True, "offload_param: {device: cpu}"),
    ("zero_optimization.zero_hpz_partition_size", 2, "leave it out"),
    ("zero_optimization.zero_quantized_weights", True, "leave it out"),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, "leave it out"),
    ("zero_optimization.zero_quantized_gradients", True, "leave it out"),
    ("zero_optimization.stage3_module_granularity_threshold", 1000, "leave it out"),
    ("zero_optimization.round_robin_gradients", True, "leave it out"),
    ("zero_optimization.compute_grad_norm", False, "leave it out"),
    ("bf16.bf16_master_weights_and_grads", True, "leave it out"),
    ("bf16.bf16_optimizer_states", True, "leave it out"),
    ("activation_checkpointing", {"partition_activations": True}, "model.activation_checkpointing=true"),
    ("compile.deepcompile", True, "leave it out"),
    ("zero_optimization.legacy_stage1", True, "leave it out"),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "leave it out"),
    ("bf16.check_grad_overflow", False, "leave it out (true)"),
    ("zero_optimization.compute_grad_norm", False, "leave it out (true)"),
    ("prescale_gradients", True, "leave it out"),
    ("gradient_predivide_factor", 2.0, "leave it out"),
    ("wall_clock_breakdown", True, "leave it out"),
    ("flops_profiler.enabled", True, "leave it out"),
    ("checkpoint.load_universal", True, "leave it out"),
    ("expert_parallel", {"enabled": True}, "parallel.expert_parallel_size"),
    ("tensor_parallel", {"autotp_size": 2}, "leave it out"),
    ("sequence_parallel_size", 2, "leave it out"),
    ("use_data_before_expert_parallelism", True, "leave it out"),
    ("data_types.buffer_dtype", "bf16", "leave it out"),
    ("fp16.fp16_master_weights_and_grads", True, "leave it out"),
    ("comms_logger", {"enabled": True}, "leave it out"),
    ("tensorboard", {"enabled": True, "output_path": "runs"}, "trackers"),
    ("csv_monitor", {"enabled": "false"}, "trackers"),
    ("wandb", True, "trackers"),
    ("comet", {"enabled": True}, "trackers"),
    ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}, "bf16"),
    ("zero_force_ds_cpu_optimizer", True, "leave it out"),
]


@pytest.mark.parametrize(("field", "value", "remedy"), REFUSED)
def test_refused_options(field: str, value: Any, remedy: str) -> None:
    with pytest.raises(UserError) as error:
        check_deepspeed_section(with_key(field, value), batch_size=64, world_size=1)
    for part in (f"deepspeed.{field}=", str(value).lower(), remedy):
        assert part in str(error.value).replace("True", "true")


def test_every_refusal_has_a_case() -> None:
    assert {refusal.field for refusal in deepspeed_checks.REFUSALS} == {field for field, _, _ in REFUSED}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"bf16.enabled": True, "zero_optimization.stage": 0},
            ["bf16", "zero_optimization.stage=0", "stage 1, 2 or 3"],
        ),
        (
            {"data_types.grad_accum_dtype": "bf16", "zero_optimization.stage": 0},
            ["grad_accum_dtype", "stage 0", "stage 1, 2 or 3"],
        ),
        (
            {"zero_optimization.offload_optimizer": {"device": "cpu"}, "zero_optimization.stage": 0},
            ["offload_optimizer", "stage 0", "needs stage 1, 2 or 3"],
        ),
        (
            {
                "zero_optimization.offload_optimizer": {"device": "cpu"},
                "zero_optimization.stage": 3,
                "gradient_accumulation_steps": 2,
            },
            ["gradient_accumulation_steps", "offload_optimizer", "stage 3", "use stage 1 or 2"],
        ),
        ({"zero_optimization.offload_param": {"device": "cpu"}}, ["offload_param", "stage 1", "needs stage 3"]),
        ({"zero_optimization.offload_optimizer": {"device": "tape"}}, ["offload_optimizer.device=tape", "cpu"]),
        (
            {"zero_optimization.offload_optimizer": {"device": "cpu"}, "optimizer.params.torch_adam": False},
            ["torch_adam=false", "compiled", "lock", "leave it out"],
        ),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0", "whole number from 1"]),
        ({"gradient_accumulation_steps": 3}, ["train.batch_size=64", "gradient_accumulation_steps=3", "multiple of 3"]),
        ({"optimizer": None}, ["optimizer", "type", "AdamW"]),
        ({"optimizer.type": 5}, ["optimizer", "type", "AdamW"]),
        ({"optimizer.type": "Nope"}, ["optimizer.type=Nope", "AdamW"]),
        ({"optimizer.type": "Lion"}, ["optimizer.type=Lion", "AdamW"]),
        ({"optimizer.type": "OneBitAdam"}, ["optimizer.type=OneBitAdam", "AdamW"]),
        ({"optimizer.type": "Muon"}, ["optimizer.type=Muon", "AdamW"]),
        ({"zero_optimization.stagee": 1}, ["deepspeed", "stagee"]),
        ({"zero_optimization.overlap_com": True}, ["deepspeed", "overlap_com"]),
        ({"zero_optimization": 5}, ["zero_optimization"]),
        ({"bf16": True}, ["bf16"]),
        ({"bf16.enabled": "perhaps"}, ["enabled", "perhaps"]),
    ],
)
def test_refused_combinations(changes: dict[str, Any], parts: list[str]) -> None:
    section = copy.deepcopy(SECTION)
    for field, value in changes.items():
        *parents, last = field.split(".")
        inner = section
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    with pytest.raises(UserError) as error:
        check_deepspeed_section(section, batch_size=64, world_size=1)
    for part in parts:
        assert part in str(error.value)


@NO_GPU
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"fp16.enabled=true is refused: there is no GPU"):
        check_deepspeed_section(with_key("fp16.enabled", True), batch_size=64, world_size=1)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_at_stage_0_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    section = with_key(f"{name}.enabled", True) | {"zero_optimization": {"stage": 0}}
    with pytest.raises(UserError, match=f"{name}.enabled=true with deepspeed.zero_optimization.stage=0 is refused"):
        check_deepspeed_section(section, batch_size=64, world_size=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gradient_clipping", "much"),
        ("gradient_clipping", -1),
        ("gradient_clipping", float("nan")),
        ("gradient_clipping", None),
        ("optimizer.params", None),
        ("optimizer.params", 5),
        ("optimizer.params.lr", "fast"),
        ("optimizer.params.lr", -1),
        ("optimizer.params.rl", 0.1),
        ("optimizer.type", "LBFGS"),
        ("optimizer.type", "SparseAdam"),
        ("scheduler", {"type": "Nope"}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_steps": 3}}),
        ("data_types", {"grad_accum_dtype": "fp17"}),
    ],
)
def test_what_would_fail_only_in_the_engine(field: str, value: Any) -> None:
    """Each of these is accepted by DeepSpeed's parser and ends in a traceback once groups exist, or is ignored."""
    with pytest.raises(UserError) as error:
        check_deepspeed_section(with_key(field, value), batch_size=64, world_size=1)
    assert field.split(".")[0] in str(error.value)
    assert "attribute" not in str(error.value)


@pytest.mark.parametrize("key", ["gradient_cliping", "zero_optimisation", "optimiser"])
def test_a_misspelt_key_is_not_ignored(key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_deepspeed_section(with_key(key, 1.0), batch_size=64, world_size=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gradient_clipping", 0.5),
        ("gradient_accumulation_steps", 4),
        ("bf16", {"enabled": True}),
        ("fp16", {"enabled": False}),
        ("fp16", {}),
        ("zero_optimization.reduce_bucket_size", 5e8),
        ("zero_optimization.overlap_comm", True),
        ("zero_optimization.contiguous_gradients", True),
        ("zero_optimization.round_robin_gradients", False),
        ("zero_optimization.offload_optimizer", {"device": "none"}),
        ("zero_optimization.offload_optimizer", {"device": "cpu"}),
        ("zero_optimization.stage", 3),
        ("gradient_allreduce_op", "mean"),
        ("communication_data_type", "bf16"),
        ("expert_parallel", {"enabled": False}),
        ("optimizer", {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}),
        ("optimizer", {"type": "NAdam", "params": {"lr": 0.1}}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}),
        ("scheduler", {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3}}),
    ],
)
def test_passed_through(field: str, value: Any) -> None:
    section = with_key(field, value)
    before = copy.deepcopy(section)
    check_deepspeed_section(section, batch_size=64, world_size=2)
    completed = complete_deepspeed_section(section, batch_size=64, world_size=2)
    assert section == before
    assert lookup(completed, field) == lookup(section, field) or field == "optimizer"


@pytest.mark.parametrize(("world_size", "accumulation", "micro"), [(1, 1, 64), (2, 1, 32), (2, 4, 8), (4, 16, 1)])
def test_sizes_are_filled_in(world_size: int, accumulation: int, micro: int) -> None:
    section = with_key("gradient_accumulation_steps", accumulation)
    check_deepspeed_section(section, batch_size=64, world_size=world_size)
    completed = complete_deepspeed_section(section, batch_size=64, world_size=world_size)
    assert completed["train_batch_size"] == 64
    assert completed["train_micro_batch_size_per_gpu"] == micro
    assert completed["gradient_accumulation_steps"] == accumulation


def test_nothing_is_clipped_unless_asked_for() -> None:
    """DeepSpeed's own default is to clip at 1."""
    assert complete_deepspeed_section(SECTION, batch_size=64, world_size=1).get("gradient_clipping") == 0.0


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "adamw"])
def test_adam_is_never_compiled_unasked(monkeypatch: pytest.MonkeyPatch, name: str, on_gpu: bool) -> None:
    """A GPU host need not have a CUDA toolkit, and ranks that build at once wait for one another's lock."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(OpBuilder, "load", lambda *_, **__: pytest.fail("an operation is compiled"))
    section = with_key("optimizer.type", name)
    check_deepspeed_section(section, batch_size=64, world_size=1)
    params = complete_deepspeed_section(section, batch_size=64, world_size=1)["optimizer"]["params"]
    assert (params["torch_adam"], params["fused"]) == (True, True)
    optimizer = build_optimizer(section, [torch.nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]


def test_a_compiled_adam_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    section = with_key("optimizer.params.torch_adam", False)
    with pytest.raises(UserError, match=r"torch_adam=false is refused.*lacks CUDA_HOME with nvcc"):
        check_deepspeed_section(section, batch_size=64, world_size=1)
    monkeypatch.setitem(import_deepspeed().git_version_info.installed_ops, "fused_adam", True)
    check_deepspeed_section(section, batch_size=64, world_size=1)
    with pytest.raises(UserError, match=r"amsgrad: DeepSpeed's own Adam .* has no such parameter"):
        check_deepspeed_section(section | with_params(torch_adam=False, amsgrad=True), batch_size=64, world_size=1)


def test_nothing_is_compiled_to_find_out_that_an_optimizer_is_no_muon() -> None:
    assert import_deepspeed().runtime.compiler.compile() is torch.compile
    assert not hasattr(
        sys.modules["deepspeed.runtime.zero.muon.original_muon"].muon_update, "_torchdynamo_orig_callable"
    )


def with_params(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def test_a_compiled_adam_gets_its_steps_back_as_it_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts in Python, and its kernel takes no tensor for a count."""
    counted = []

    class Kernel:
        def multi_tensor_adam(self, *arguments: Any) -> None:
            counted.append(arguments[7])

    fused_adam = import_deepspeed().ops.adam.fused_adam
    monkeypatch.setattr(fused_adam.FusedAdamBuilder, "load", lambda _: Kernel())
    new_optimizer = partial(build_optimizer, with_params(lr=0.1, torch_adam=False))
    like = take_step(new_optimizer([torch.nn.Parameter(torch.ones(2))]))
    assert type(number_like(like["step"], 5.0)) is int
    assert counted == [1]


def test_numbers_come_back_where_an_optimizer_counts_them() -> None:
    """torch's fused Adam counts on the device of its parameters, others on the CPU."""
    on_device = number_like(torch.zeros((), device="meta"), 5.0)
    assert (on_device.device.type, on_device.dtype, on_device.dim()) == ("meta", torch.float32, 0)
    assert number_like(torch.zeros(()), 5.0).item() == 5.0


@NO_GPU
def test_adam_cannot_be_compiled_on_a_cpu() -> None:
    """A build that was killed leaves a lock, and later runs wait for it without a word."""
    with pytest.raises(UserError, match="torch_adam=false is refused"):
        check_deepspeed_section(with_key("optimizer.params.torch_adam", False), batch_size=64, world_size=1)


def test_an_offloaded_adam_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU too it steps on the CPU then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    section = with_key("zero_optimization.offload_optimizer", {"device": "cpu"})
    completed = complete_deepspeed_section(section, batch_size=64, world_size=1)
    assert completed["optimizer"]["params"]["torch_adam"] is True
    assert completed["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "adamw"])
def test_adam_decays_no_weights_unless_asked_to(monkeypatch: pytest.MonkeyPatch, name: str, on_gpu: bool) -> None:
    """torch's AdamW, which a CPU gets, would by 0.01; DeepSpeed's own would not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    for section in ({"optimizer": {"type": name}}, with_key("optimizer.type", name)):
        completed = complete_deepspeed_section(section, batch_size=64, world_size=1)
        assert completed["optimizer"]["params"]["weight_decay"] == 0.0
    decaying = with_key("optimizer", {"type": name, "params": {"weight_decay": 0.1}})
    completed = complete_deepspeed_section(decaying, batch_size=64, world_size=1)
    assert completed["optimizer"]["params"]["weight_decay"] == 0.1


def test_another_optimizer_keeps_its_own_defaults() -> None:
    completed = complete_deepspeed_section(with_key("optimizer", {"type": "Lamb"}), batch_size=64, world_size=1)
    assert completed["optimizer"] == {"type": "Lamb"}


def test_zero_stage() -> None:
    assert zero_stage(SECTION) == 1
    assert zero_stage({"optimizer": {}}) == 0
    assert zero_stage(with_key("zero_optimization.stage", 2)) == 2
