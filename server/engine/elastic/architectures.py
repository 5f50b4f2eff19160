"""The architectures that the elastic engine runs, known without importing vLLM."""

from __future__ import annotations

from collections.abc import Sequence

# Hugging Face architecture -> the name that the elastic class is registered under.
ELASTIC_ARCHITECTURES = {
    name: f"FathomElastic{name}"
    for name in (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "MixtralForCausalLM",
        "Phi3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    )
}


class UnsupportedArchitecture(ValueError):
    """The model's architecture is none that the elastic engine runs."""


def elastic_architecture(architectures: Sequence[str]) -> str:
    """Return the registered name for the ``architectures`` of a model's config.

    Raises:
        UnsupportedArchitecture: None of them is supported; the message lists what is.
    """
    for name in architectures:
        if name in ELASTIC_ARCHITECTURES:
            return ELASTIC_ARCHITECTURES[name]
    given = ", ".join(architectures) or "none"
    raise UnsupportedArchitecture(
        f"architecture {given} cannot run at several depths; "
        f"supported: {', '.join(ELASTIC_ARCHITECTURES)}"
    )
