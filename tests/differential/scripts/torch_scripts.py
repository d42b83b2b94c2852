"""All scripts of torch: importing them registers them."""

import torch_gradients
import torch_late
import torch_loops
import torch_optimizers
import torch_parameters
import torch_steps

__all__ = ["torch_gradients", "torch_late", "torch_loops", "torch_optimizers", "torch_parameters", "torch_steps"]
