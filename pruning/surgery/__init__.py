"""Checkpoint surgery: a standalone checkpoint with some of the layers of another.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853, section 3: layers are removed outright, nothing is trained afterwards. So a
pruned checkpoint is the old one with tensors left out, layers renumbered and a configuration
that says so. No weight is ever loaded: bytes go from file to file.
"""

from pruning.surgery.errors import SurgeryError
from pruning.surgery.export import PLAN_FILE, Export, check_output, count_layers, export_checkpoint

__all__ = [
    "PLAN_FILE",
    "Export",
    "SurgeryError",
    "check_output",
    "count_layers",
    "export_checkpoint",
]
