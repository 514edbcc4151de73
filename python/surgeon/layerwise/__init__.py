"""Layer-wise baselines: each block is pruned on the activations that the blocks before it now give.

Wanda and SparseGPT look at one layer's inputs at a time (activations only, ``G = I``) and set the
same sparsity in every layer. The mathematics is pure; :func:`prune_blocks` feeds it.
"""

from surgeon.layerwise.blocks import prune_blocks
from surgeon.layerwise.sparsegpt import InverseFactor, eliminate, inverse_factor, sparsegpt
from surgeon.layerwise.wanda import input_norms, wanda_costs, wanda_mask, wanda_nm_mask

__all__ = [
    "InverseFactor",
    "eliminate",
    "input_norms",
    "inverse_factor",
    "prune_blocks",
    "sparsegpt",
    "wanda_costs",
    "wanda_mask",
    "wanda_nm_mask",
]
