"""SegBlocks: run convolutional networks on image blocks of two resolutions.

blocks = segblocks.to_blocks(image, grid)             # image (N,C,H,W), grid (N,Gh,Gw) bool
image = blocks.combine()
output = segblocks.execute_with_grid(net, image, grid)
model = segblocks.SegBlocksModel(net, segblocks.build_policy("reinforce"))
result = model(image)                                 # result.logits, result.grid, ...
"""

from . import rules  # noqa: F401 - fills the table of rules
from .fast.compile import FastModel, compile
from .graphs import TrainingGraphs
from .grid import BlockGrid
from .model import SegBlocksModel, SegBlocksOutput, execute_with_grid, no_blocks
from .policy import BudgetError, Decision, Policy, build_policy
from .replicas import Replicas
from .sync import SyncBatchNorm, convert_sync_batchnorm
from .tensor import DualResTensor, to_blocks

__version__ = "0.1.0"

__all__ = [
    "BlockGrid",
    "BudgetError",
    "Decision",
    "DualResTensor",
    "FastModel",
    "Policy",
    "Replicas",
    "SegBlocksModel",
    "SegBlocksOutput",
    "SyncBatchNorm",
    "TrainingGraphs",
    "build_policy",
    "compile",
    "convert_sync_batchnorm",
    "execute_with_grid",
    "no_blocks",
    "to_blocks",
]
