"""Other systems' layers, one file each. What is not installed is reported with the way to install it."""

from tools.bench.candidate import Candidate
from tools.bench.peers import autoep, deepspeed_moe, fairscale_moe, transformers_moe

CANDIDATES: tuple[Candidate, ...] = (
    *deepspeed_moe.CANDIDATES,
    *autoep.CANDIDATES,
    *fairscale_moe.CANDIDATES,
    *transformers_moe.CANDIDATES,
)
