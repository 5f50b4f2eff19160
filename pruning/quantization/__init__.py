"""GPTQ: weights of 4 or 8 bits, alone and together with pruning.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, as GPTQModel implements it, in a process of its own. Pruning and
quantization work together: Men et al., arXiv 2403.03853, section 4.5.
"""

from pruning.quantization.checkpoint import Quantized, quantize_checkpoint, with_companions_of
from pruning.quantization.errors import GroupSizeError, QuantizationError, QuantizationFailed
from pruning.quantization.linear_layers import fitting_settings
from pruning.quantization.order import Order, prune_then_quantize
from pruning.quantization.provenance import QUANTIZATION_FILE, Provenance, plan_of_base
from pruning.quantization.settings import QuantizationSettings, check_not_quantized
from pruning.quantization.worker_process import Stop, gptqmodel_version

__all__ = [
    "QUANTIZATION_FILE",
    "GroupSizeError",
    "Order",
    "Provenance",
    "QuantizationError",
    "QuantizationFailed",
    "QuantizationSettings",
    "Quantized",
    "Stop",
    "check_not_quantized",
    "fitting_settings",
    "gptqmodel_version",
    "plan_of_base",
    "prune_then_quantize",
    "quantize_checkpoint",
    "with_companions_of",
]
