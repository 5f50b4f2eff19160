"""The model classes that walk their layers by the choice of each token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import ForwardContext, get_forward_context, set_forward_context
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from server.engine.elastic.attention import ElasticStep, Runners, TokenSubset, elastic_backend
from server.engine.elastic.compiled_layers import CompiledLayers
from server.engine.elastic.measurement import ImportanceMeter, QualityMeter
from server.engine.elastic.residual_stream import ResidualStream
from server.engine.elastic.row_tracker import row_table


class ElasticCausalLM:
    """Mixed into a model of vLLM's before its class; takes over the walk through its layers.

    It counts on what the supported families share: ``model.layers``, each of which is called
    with (positions, hidden, residual) and has ``input_layernorm`` and ``self_attn`` with
    ``qkv_proj``, ``rotary_emb`` and ``attn``, and ``model.norm``. `compatibility.py` checks it.
    """

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.rows = row_table(vllm_config)
        self.importance = ImportanceMeter(vllm_config.model_config.hf_text_config.num_hidden_layers)
        self.quality = QualityMeter(cast(Any, self).compute_logits)
        indices = range(self.model.start_layer, self.model.end_layer)
        self._layers = [(index, self.model.layers[index]) for index in indices]
        self._compiled = CompiledLayers()
        for _, layer in self._layers:
            attention = layer.self_attn.attn
            attention.attn_backend = elastic_backend(attention.attn_backend, self.rows)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        stream = self._entering_stream(input_ids, positions, intermediate_tensors, inputs_embeds)
        context = get_forward_context()
        step = _step_of(context, self._layers[0][1])
        probed = step is not None and bool(self.rows.probed)
        if step is None:  # vLLM is profiling memory or warming up
            for _, layer in self._layers:
                stream.run(Runners.EVERY, layer)
        elif step.is_uniform and not probed:
            for index, layer in self._layers:
                stream.run(step.runners(index), layer)
        else:
            self._walk(stream, positions, context)

        hidden: torch.Tensor
        hidden, residual = stream.parts()
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        hidden = self._compiled.normalize(self.model.norm, hidden, residual)
        if step is not None and probed:
            self.quality.observe(step, self.rows, hidden)
        return hidden

    def compile_layers(self, vllm_config: VllmConfig) -> int:
        """Compile the layers and return how many share the compiled code.

        Raises what torch.compile raises; the layers run uncompiled then.
        """
        config = vllm_config.model_config
        with (
            set_forward_context(None, vllm_config, slot_mapping={}),
            cast(Any, current_platform).inference_mode(),
        ):
            return self._compiled.compile(
                [layer for _, layer in self._layers],
                self.model.norm,
                config.get_hidden_size(),
                cast(torch.dtype, config.dtype),
            )

    def _entering_stream(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> ResidualStream:
        run_layers = self._compiled.run
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            tensors = intermediate_tensors
            hidden, residual = tensors["hidden_states"], tensors["residual"]
            return ResidualStream(run_layers, positions, hidden, residual)
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_input_ids(input_ids)
        # Zero and the embeddings: so the first layer is called as the others are.
        return ResidualStream(run_layers, positions, torch.zeros_like(inputs_embeds), inputs_embeds)

    def _walk(
        self, stream: ResidualStream, positions: torch.Tensor, context: ForwardContext
    ) -> None:
        """Run every layer on the tokens that run it, and measure where that is asked for."""
        marked: torch.Tensor | slice | None = None
        before: torch.Tensor | None = None
        for index, layer in self._layers:
            step = _step_of(context, layer)
            assert step is not None
            if self.rows.probed and marked is None:
                marked = self.importance.marked_tokens(step, self.rows)
            if marked is not None and before is None:
                before = stream.total(marked)
            leavers = step.key_leavers(index)
            if leavers is not None:
                _leave_keys_and_values(layer, stream.total(leavers), positions[leavers], leavers)
            runners = step.runners(index)
            if isinstance(runners, TokenSubset):
                runners.install(context, layer.self_attn.attn.layer_name)
            stream.run(runners, layer)
            if marked is not None and before is not None:
                after = stream.total(marked)
                self.importance.update(index, before, after)
                before = after


def _step_of(context: ForwardContext, layer: Any) -> ElasticStep | None:
    if context.attn_metadata is None:
        return None
    assert isinstance(context.attn_metadata, dict)
    metadata = context.attn_metadata[layer.self_attn.attn.layer_name]
    return cast(ElasticStep, cast(Any, metadata).elastic_step)


def _leave_keys_and_values(
    layer: Any, stream: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Write what ``layer`` would cache for tokens that do not run it.

    This is what the first half of the layer computes from the ``stream``, [num_tokens,
    hidden_size], as it passes by.
    """
    attention = layer.self_attn
    qkv, _ = attention.qkv_proj(layer.input_layernorm(stream))
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    query, key, value = qkv.split(sizes, dim=-1)
    if hasattr(attention, "k_norm"):
        by_head = key.view(-1, attention.num_kv_heads, attention.head_dim)
        key = attention.k_norm(by_head).view(key.shape)
    _, key = attention.rotary_emb(positions, query, key)
    slots = get_forward_context().slot_mapping
    assert isinstance(slots, dict)
    name = attention.attn.layer_name
    whole = slots[name]
    slots[name] = whole[tokens]
    shape = (-1, attention.num_kv_heads, attention.head_dim)
    unified_kv_cache_update(key.view(shape), value.view(shape), name)
    slots[name] = whole


class ElasticLlamaForCausalLM(ElasticCausalLM, LlamaForCausalLM):
    """Llama, and what vLLM serves with its class."""


class ElasticMistralForCausalLM(ElasticCausalLM, MistralForCausalLM):
    """Mistral and Ministral."""


class ElasticQwen2ForCausalLM(ElasticCausalLM, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class ElasticQwen3ForCausalLM(ElasticCausalLM, Qwen3ForCausalLM):
    """Qwen3."""


class ElasticQwen3MoeForCausalLM(ElasticCausalLM, Qwen3MoeForCausalLM):
    """Qwen3 with experts."""


class ElasticMixtralForCausalLM(ElasticCausalLM, MixtralForCausalLM):
    """Mixtral."""


class ElasticPhi3ForCausalLM(ElasticCausalLM, Phi3ForCausalLM):
    """Phi-3 and Phi-4."""


class ElasticGemmaForCausalLM(ElasticCausalLM, GemmaForCausalLM):
    """Gemma."""


class ElasticGemma2ForCausalLM(ElasticCausalLM, Gemma2ForCausalLM):
    """Gemma 2."""


class ElasticGemma3ForCausalLM(ElasticCausalLM, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma 3 that reads text alone."""


# Hugging Face architecture -> the class that runs it at any depth.
ELASTIC_CLASSES: dict[str, type[nn.Module]] = {
    "LlamaForCausalLM": ElasticLlamaForCausalLM,
    "MistralForCausalLM": ElasticMistralForCausalLM,
    "Qwen2ForCausalLM": ElasticQwen2ForCausalLM,
    "Qwen3ForCausalLM": ElasticQwen3ForCausalLM,
    "Qwen3MoeForCausalLM": ElasticQwen3MoeForCausalLM,
    "MixtralForCausalLM": ElasticMixtralForCausalLM,
    "Phi3ForCausalLM": ElasticPhi3ForCausalLM,
    "GemmaForCausalLM": ElasticGemmaForCausalLM,
    "Gemma2ForCausalLM": ElasticGemma2ForCausalLM,
    "Gemma3ForCausalLM": ElasticGemma3ForCausalLM,
}
