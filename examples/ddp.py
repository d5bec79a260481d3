"""Experts split over the ranks of a DDP of one's own: torchrun --nproc-per-node 2 examples/ddp.py"""

import torch
import torch.distributed as dist

import dist_moe
from dist_moe.integrations.data_parallel import clip_grad_norm_, wrap_ddp

dist.init_process_group("gloo")
world = dist_moe.parallel.ProcessWorld(dist.group.WORLD)
torch.manual_seed(0)  # alike on all ranks: experts are drawn by their ids
mine = dist_moe.parallel.experts_of_rank(8, world)
experts = dist_moe.experts.FeedForwardBank(16, 32, num_experts=8, expert_ids=mine)
moe = dist_moe.MoE(dist_moe.gates.Comet(16, 8, k=2), experts, world=world)
ddp = wrap_ddp(torch.nn.Sequential(torch.nn.Linear(16, 16), moe))  # in place of DistributedDataParallel
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.5, weight_decay=0.01)
for step in range(5):
    x_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)).chunk(world.size)[world.rank]
    optimizer.zero_grad()
    (ddp(x_TD).outputs[0] - x_TD).square().mean().backward()
    norm = clip_grad_norm_(ddp, max_norm=0.05)  # in place of torch's: over the experts of all ranks
    optimizer.step()
    print(f"rank {world.rank} of {world.size}, step {step}: gradient norm {norm:.6f}")
dist.destroy_process_group()
