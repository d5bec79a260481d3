"""DeepSpeed's engine for models with experts, at ZeRO stages 0 to 3."""
