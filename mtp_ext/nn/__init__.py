"""Multi-token-prediction heads: trainable modules, their form for decoding, and their files."""

from mtp_ext.nn import specs
from mtp_ext.nn.checkpoints import load_checkpoint, save_checkpoint
from mtp_ext.nn.head_file import default_head_path, load_head, read_head, save_head
from mtp_ext.nn.mtp_block import MTPBlock
from mtp_ext.nn.mtp_head import MTPHead
from mtp_ext.nn.parallel_heads import MedusaHeads, ParallelDrafter, ParallelHeads
from mtp_ext.nn.prediction_head import MTPPredictionHead
from mtp_ext.nn.specs import LatentSpec, MoESpec, MTPSpec

__all__ = [
    "LatentSpec",
    "MTPBlock",
    "MTPHead",
    "MTPPredictionHead",
    "MTPSpec",
    "MedusaHeads",
    "MoESpec",
    "ParallelDrafter",
    "ParallelHeads",
    "default_head_path",
    "load_checkpoint",
    "load_head",
    "read_head",
    "save_checkpoint",
    "save_head",
    "specs",
]
