"""Training: fit and its callbacks, checkpoints, DeepSpeed, launch, monitoring, health."""
