"""Our layer and gates inside other people's code: DDP, FSDP, DeepSpeed, FairScale."""
