"""All scripts of torch: importing them registers them."""

from tests.differential.scripts import (
    torch_gradients,
    torch_late,
    torch_loops,
    torch_optimizers,
    torch_parameters,
    torch_steps,
)

__all__ = ["torch_gradients", "torch_late", "torch_loops", "torch_optimizers", "torch_parameters", "torch_steps"]
