"""The model card of a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path

from pruning.quantization.provenance import QUANTIZATION_FILE, Provenance
from pruning.surgery.model_card import FILE_NAME, front_matter, inherited_metadata, printable

_PAPER = "https://arxiv.org/abs/2210.17323"

__all__ = ["FILE_NAME", "model_card"]


def model_card(
    source: Path, base_model: str, provenance: Provenance, pruned_from: int | None = None
) -> str:
    """Return the card: where the model comes from, and how it was quantized.

    ``pruned_from``: how many layers it had before it was pruned, and quantized after that.
    """
    base_model = printable(base_model)
    metadata = front_matter(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gptq", f"{provenance.bits}-bit", "fathom"],
        **inherited_metadata(source / FILE_NAME),
    )
    groups = "a row" if provenance.group_size == -1 else f"{provenance.group_size} weights"
    pruned = ""
    if pruned_from is not None:
        pruned = (
            f"\nIt had been pruned before, from {pruned_from} layers; `fathom_plan.json` has the "
            "order of removal.\n"
        )
    return f"""{metadata}

# {base_model}, GPTQ {provenance.bits}-bit

This is {base_model} with the weights of its decoder layers in {provenance.bits} bits, and one
scale for {groups}, quantized with [GPTQ]({_PAPER}) on {provenance.num_tokens} tokens of
calibration text. `{QUANTIZATION_FILE}` has the details.
{pruned}
- Model before: `{provenance.base_fingerprint}`
- Calibration text: `{provenance.text_fingerprint}`
- Made with: {", ".join(f"{name} {version}" for name, version in provenance.versions.items())}
"""
