"""The model card of a checkpoint that has lost layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pruning.collapse import CollapsedModel
from pruning.plan import Plan
from pruning.repair.folding import FoldedRepair, FoldMethod
from pruning.surgery.layer_map import LayerMap

FILE_NAME = "README.md"
_PAPER = "https://arxiv.org/abs/2403.03853"
# Metadata that a derived model's card must keep from that of its base.
_INHERITED = ("license", "license_name", "license_link", "language")

_HOW = {
    FoldMethod.REPLACE_ME: (
        "For the removed layers, a linear map on what the MLP of the layer before them adds",
        "([ReplaceMe](https://arxiv.org/abs/2505.02819))",
    ),
    FoldMethod.LINEAR_PATCH: (
        "For the removed layers, a scale for each channel of what the MLP of the layer before them",
        "adds, between a Hadamard rotation and its inverse (of the form of",
        "[LinearPatch](https://arxiv.org/abs/2505.24680), which acts on the whole stream),",
    ),
}

logger = logging.getLogger(__name__)


def model_card(
    source: Path,
    base_model: str,
    plan: Plan,
    layers: LayerMap,
    repair: FoldedRepair | None = None,
    collapse: CollapsedModel | None = None,
) -> str:
    """Return the card: where the model comes from, which layers it lacks, and why those.

    With ``repair``, it says into which weights maps were folded, and what they gain; with
    ``collapse``, which layers were merged.

    The licence and the languages are those of the card in ``source``, where there is one.
    """
    base_model = printable(base_model)
    metadata = front_matter(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "shortgpt", "fathom"],
        depth=layers.depth,
        removed_layers=list(layers.removed),
        **inherited_metadata(source / FILE_NAME),
    )
    removed = ", ".join(map(str, layers.removed)) or "none"
    unchanged = "the other weights are unchanged"
    if repair is not None and repair.folds:
        unchanged = "the other weights, apart from those below, are unchanged"
    order = "`fathom_plan.json` has the order of removal."
    if collapse is not None and collapse.collapse.merged:
        unchanged = "the other weights, apart from those of the layers below, are unchanged"
        order = "These scores did not choose the removed layers here; see below."
    return f"""{metadata}

# {base_model}, {layers.depth} of {layers.num_layers} layers

This is {base_model} without some of its decoder layers. Removed: {removed}. Nothing was trained
afterwards; {unchanged}, and layers are numbered anew.

How much each layer matters was measured as Block Influence: 1 minus the mean cosine between the
residual stream before and after the layer, here over {plan.num_tokens} tokens of calibration text
(Men et al., [ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect]({_PAPER})). {order}

| Layer | Block Influence | Standard error | Layer here |
|---:|---:|---:|---:|
{_rows(plan, layers)}
{_repair(layers, repair)}{_collapse(layers, collapse)}
- Model: `{plan.model_fingerprint}`
- Calibration text: `{plan.text_fingerprint}`
- Measured with: {", ".join(f"{name} {version}" for name, version in plan.versions.items())}
"""


def _repair(layers: LayerMap, repair: FoldedRepair | None) -> str:
    if repair is None or not repair.folds:
        return ""
    lines = [
        "",
        *_HOW[repair.method],
        f"was fitted in closed form on {repair.num_tokens} tokens, and multiplied into its down",
        "projection. *Unexplained* is the share of what the removed layers add that the map leaves",
        "out.",
        "",
        "| Layer | Layer here | Stands in for | Unexplained |",
        "|---:|---:|---|---:|",
    ]
    for fold in repair.folds:
        removed = ", ".join(map(str, fold.removed))
        new = layers.new_index(fold.layer)
        lines.append(f"| {fold.layer} | {new} | {removed} | {fold.unexplained:.3f} |")
    lines += [
        "",
        f"Perplexity on {repair.num_held_out_tokens} tokens of held-out text: "
        f"{repair.perplexity:.2f}; {repair.plain_perplexity:.2f} without these maps,",
        f"{repair.dense_perplexity:.2f} with all layers.",
        "",
        f"- Text of the maps: `{repair.text_fingerprint}`",
        "",
    ]
    return "\n".join(lines)


def _collapse(layers: LayerMap, collapse: CollapsedModel | None) -> str:
    if collapse is None or not collapse.collapse.merged:
        return ""
    found = collapse.collapse
    lines = [
        "",
        "The removed layers were merged into earlier ones by the differences of their weights",
        "([LaCo](https://arxiv.org/abs/2402.11187)). A merge was kept where the mean cosine of the",
        f"model's last states to those of the dense model, on {found.num_tokens} tokens,",
        f"was above a threshold, in the end {found.threshold:.2f}; it is",
        f"{found.similarity:.3f} now.",
        "",
        "| Layer | Layer here | Has taken up |",
        "|---:|---:|---|",
    ]
    for layer, taken in sorted(found.merged.items()):
        lines.append(f"| {layer} | {layers.new_index(layer)} | {', '.join(map(str, taken))} |")
    lines += [
        "",
        f"Perplexity on {collapse.num_held_out_tokens} tokens of held-out text: "
        f"{collapse.perplexity:.2f}; {collapse.plain_perplexity:.2f} without the merges,",
        f"{collapse.dense_perplexity:.2f} with all layers.",
        "",
        f"- Text of the merges: `{collapse.text_fingerprint}`",
        "",
    ]
    return "\n".join(lines)


def _rows(plan: Plan, layers: LayerMap) -> str:
    lines = []
    for layer, (score, stderr) in enumerate(zip(plan.scores, plan.stderrs, strict=True)):
        new = layers.new_index(layer)
        lines.append(
            f"| {layer} | {score:.6f} | {stderr:.6f} | {'removed' if new is None else new} |"
        )
    return "\n".join(lines)


def inherited_metadata(card: Path) -> dict[str, str | list[str]]:
    """Return licence and languages of a card, as far as there are any.

    Faults of a card are only logged: they must not keep a model from being written.
    """
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        text = card.read_text("utf-8", errors="replace")
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        metadata = data.to_dict()
    except Exception as error:  # the package documents no base class of what it raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.warning("%s: licence and languages are not taken from it: %s", card, reason)
        return {}
    inherited = {name: metadata[name] for name in _INHERITED if metadata.get(name) is not None}
    for name in [name for name, value in inherited.items() if not _is_text(value)]:
        logger.warning("%s: %s: allowed: text, or a list of texts", card, name)
        del inherited[name]
    return inherited


def front_matter(**metadata: Any) -> str:
    """Return metadata of a model as YAML, with which a card begins."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---"


def printable(name: str) -> str:
    """Return a name as one line of valid text; a file's name may be anything."""
    return " ".join(name.encode("utf-8", "replace").decode().split()) or "?"


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )
