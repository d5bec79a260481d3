"""The MoE layer against its peers, and against what the machine can do at best: ``dist-moe bench``."""
