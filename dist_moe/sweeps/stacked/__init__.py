"""Many small trials trained together on one device: stacked parameters, one stream of batches."""

from dist_moe.sweeps.stacked.training import stack_error, stack_key, train_stack

__all__ = ["stack_error", "stack_key", "train_stack"]
