"""The model card of a checkpoint that has lost layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pruning.plan import Plan
from pruning.surgery.layer_map import LayerMap

FILE_NAME = "README.md"
_PAPER = "https://arxiv.org/abs/2403.03853"
# What a derived model must not lose of the card of its base.
_INHERITED = ("license", "license_name", "license_link", "language")


def model_card(source: Path, base_model: str, plan: Plan, layers: LayerMap) -> str:
    """Return the card: where the model comes from, which layers it lacks, and why those.

    The licence and the languages are those of the card in ``source``, where there is one.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "shortgpt", "fathom"],
        depth=layers.depth,
        removed_layers=list(layers.removed),
        **inherited_metadata(source / FILE_NAME),
    )
    removed = ", ".join(map(str, layers.removed)) or "none"
    return f"""---
{metadata.to_yaml()}
---

# {base_model}, {layers.depth} of {layers.num_layers} layers

This is {base_model} without some of its decoder layers. Removed: {removed}. Nothing was trained
afterwards; the other weights are unchanged, and layers are numbered anew.

How much each layer matters was measured as Block Influence: 1 minus the mean cosine between the
residual stream before and after the layer, here over {plan.num_tokens} tokens of calibration text
(Men et al., [ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect]({_PAPER})). `fathom_plan.json` has the order of removal.

| Layer | Block Influence | Standard error | Layer here |
|---:|---:|---:|---:|
{_rows(plan, layers)}

- Model: `{plan.model_fingerprint}`
- Calibration text: `{plan.text_fingerprint}`
- Measured with: {", ".join(f"{name} {version}" for name, version in plan.versions.items())}
"""


def _rows(plan: Plan, layers: LayerMap) -> str:
    lines = []
    for layer, (score, stderr) in enumerate(zip(plan.scores, plan.stderrs, strict=True)):
        new = layers.new_index(layer)
        lines.append(
            f"| {layer} | {score:.6f} | {stderr:.6f} | {'removed' if new is None else new} |"
        )
    return "\n".join(lines)


def inherited_metadata(card: Path) -> dict[str, Any]:
    """Return licence and languages of a card, where there is one and it says."""
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        metadata = ModelCard(card.read_text("utf-8"), ignore_metadata_errors=True).data
    except (ValueError, TypeError):  # no text, or no metadata
        return {}
    return {name: value for name in _INHERITED if (value := metadata.get(name)) is not None}
