"""Tensor names: the layers in them, and new names for the layers that stay."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pruning.checkpoint import CheckpointError
from pruning.surgery.errors import SurgeryError
from pruning.surgery.layer_map import LayerMap

# Names of lists of layers: model.layers, transformer.h, gpt_neox.layers, rwkv.blocks.
_LIST_NAMES = frozenset({"layers", "layer", "h", "blocks", "block"})
_OTHER_TOWERS = re.compile(r"vision|visual|audio|speech|image|video", re.IGNORECASE)
# RWKV keeps the norm of the embeddings in the first layer, whichever layer that is after a cut.
_OF_THE_FIRST_LAYER = ("pre_ln.",)
_INPUT_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "embeddings",
    "embedding",
    "word_embeddings",
    "tok_embeddings",
)
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "head.weight", "output.weight")
# Input embeddings by container, for models that store tied embeddings as output embeddings only.
_INPUT_BESIDE = {
    "model.layers": "embed_tokens",
    "decoder.layers": "embed_tokens",
    "language_model.layers": "embed_tokens",
    "gpt_neox.layers": "embed_in",
    "backbone.layers": "embeddings",
    "rwkv.blocks": "embeddings",
    "transformer.h": "wte",
    "transformer.blocks": "wte",
}


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a checkpoint's tensors. ``container`` is the list of layers in them."""

    container: str
    # New names of output embeddings that are to be stored as input embeddings.
    embeddings: Mapping[str, str]

    @classmethod
    def of(cls, names: Collection[str], num_layers: int, *, tied: bool) -> TensorNames:
        """Find the layers and the embeddings in ``names``.

        ``tied``: whether the output uses the embeddings of the input.
        Raises :class:`SurgeryError` where the layers cannot be found, and
        :class:`pruning.checkpoint.CheckpointError` where one of them has no tensors.
        """
        container = _find_container(names, num_layers)
        return cls(container, _misnamed_embeddings(names, container) if tied else {})

    @property
    def list_name(self) -> str:
        return self.container.rpartition(".")[2]

    def renamed(self, name: str, layers: LayerMap) -> str | None:
        """Return the new name of a tensor, None if its layer is removed."""
        prefix = f"{self.container}."
        index, dot, rest = name.removeprefix(prefix).partition(".")
        if not (name.startswith(prefix) and dot and index.isdecimal()):
            return self.embeddings.get(name, name)
        layer = int(index)
        if layer == 0 and rest.startswith(_OF_THE_FIRST_LAYER):
            return name
        new = layers.new_index(layer)
        return None if new is None else f"{prefix}{new}.{rest}"


def _find_container(names: Collection[str], num_layers: int) -> str:
    indices: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
        if number:
            indices[".".join(parts[:number])].add(int(parts[number]))
    lists = {
        container: found
        for container, found in indices.items()
        if container.rpartition(".")[2] in _LIST_NAMES and not _OTHER_TOWERS.search(container)
    }
    whole = [name for name, found in lists.items() if found >= set(range(num_layers))]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise SurgeryError(
            f"tensors: {' and '.join(sorted(whole))} both have {num_layers} layers, "
            "allowed: one list of as many layers as the configuration says"
        )
    if not lists:
        raise SurgeryError(
            "tensors: none is named after a layer, allowed: names such as "
            "model.layers.0.mlp.up_proj.weight"
        )
    container, found = max(lists.items(), key=lambda item: len(item[1]))
    missing = min(set(range(num_layers)) - found)
    raise CheckpointError(
        f"tensors: none of {container}.{missing}, though the configuration says {num_layers} layers"
    )


def _misnamed_embeddings(names: Collection[str], container: str) -> dict[str, str]:
    """Return the new name of tied embeddings that are stored as output embeddings only.

    Loaders look for input embeddings; vLLM ignores those of the output.
    """
    if any(_is_input_embedding(name) for name in names):
        return {}
    outputs = [
        name
        for name in names
        if any(name == output or name.endswith(f".{output}") for output in _OUTPUT_EMBEDDINGS)
    ]
    parent, _, list_name = container.rpartition(".")
    beside = _INPUT_BESIDE.get(f"{parent.rpartition('.')[2]}.{list_name}")
    if beside is None or len(outputs) != 1:
        return {}
    return {outputs[0]: f"{parent}.{beside}.weight"}


def _is_input_embedding(name: str) -> bool:
    return any(part in _INPUT_EMBEDDINGS for part in name.split(".")) and not (
        _OTHER_TOWERS.search(name)
    )
