"""How long a training step takes on machines that one need not have: a model of arithmetic and bytes."""
