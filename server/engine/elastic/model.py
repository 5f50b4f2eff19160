"""The model classes whose layers run on their active tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import ForwardContext, get_forward_context, set_forward_context
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

from server.engine.elastic.attention import attention_without_cache, elastic_backend
from server.engine.elastic.compatibility import check_model
from server.engine.elastic.compiled_layers import CompiledLayers
from server.engine.elastic.kv_only import write_keys_and_values
from server.engine.elastic.measurement import (
    ImportanceMeter,
    LayerMeter,
    QualityMeter,
    RepairFitter,
    marked_tokens,
)
from server.engine.elastic.residual_stream import Repair, ResidualStream
from server.engine.elastic.row_table import RowTable
from server.engine.elastic.row_tracker import row_table
from server.engine.elastic.stand_ins import StandIns
from server.engine.elastic.step import (
    ActiveTokens,
    ElasticStep,
    TokenSubset,
    Whole,
)


class ElasticCausalLM:
    """Mixed into a model of vLLM's before its class; runs the model's layers in its stead.

    It relies on what the supported families have in common, which
    :func:`server.engine.elastic.compatibility.check_model` checks when the model is made.
    """

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.rows = row_table(vllm_config)
        self.importance = ImportanceMeter(vllm_config.model_config.hf_text_config.num_hidden_layers)
        self.repair = RepairFitter()
        self.quality = QualityMeter(cast(Any, self).compute_logits)
        indices = range(self.model.start_layer, self.model.end_layer)
        self._layers = [(index, self.model.layers[index]) for index in indices]
        check_model(self.model, [layer for _, layer in self._layers])
        config = vllm_config.model_config
        self._stand_ins = StandIns(
            config.hf_text_config.num_hidden_layers, config.get_hidden_size()
        )
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
        """Return the hidden states after the last norm, [num_tokens, hidden_size]."""
        context = get_forward_context()
        step = _step_of(context, self._layers[0][1])
        if step is not None and not self.rows.is_tracked:
            raise RuntimeError(
                "vLLM gave the row tracker another configuration object than the model: the "
                "layers that requests skip would not be known, and all would run at full depth"
            )
        probed = step is not None and bool(self.rows.probed)
        stream = self._entering_stream(input_ids, positions, intermediate_tensors, inputs_embeds)
        if step is None:  # vLLM is profiling memory or warming up
            for _, layer in self._layers:
                stream.add(layer, Whole.ALL)
        elif step.is_uniform and not probed:
            for index, layer in self._layers:
                stream.add(layer, *self._work(step, index))
        else:
            self._run_step(stream, positions, context)

        hidden: torch.Tensor
        hidden, residual = stream.parts()
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        hidden = self._compiled.normalize(self.model.norm, hidden, residual)
        if step is not None and probed:
            self.quality.observe(step, self.rows, hidden)
        return hidden

    def compile_layers(self, vllm_config: VllmConfig) -> int:
        """Compile the layers, and return how many share the compiled code.

        Raises what :meth:`CompiledLayers.compile` raises; the layers run uncompiled then.
        """
        config = vllm_config.model_config
        layers = [layer for _, layer in self._layers]
        with (
            set_forward_context(None, vllm_config, slot_mapping={}),
            cast(Any, current_platform).inference_mode(),
        ):
            return self._compiled.compile(
                layers,
                self.model.norm,
                config.get_hidden_size(),
                cast(torch.dtype, config.dtype),
                max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                comparing=attention_without_cache(layers),
            )

    @property
    def stream_dtype(self) -> torch.dtype:
        """The type of the residual stream, also where the weights of layers are quantized."""
        return cast(torch.dtype, next(self.model.norm.parameters()).dtype)

    def load_stand_ins(self, path: Path, fingerprint: str) -> None:
        """Load stand-ins beside the present ones; raises what :meth:`StandIns.read` does."""
        device = next(self.model.norm.parameters()).device
        stand_ins = self._stand_ins.read(path, fingerprint, self.stream_dtype, device)
        self._stand_ins.put(self.rows.add_repair(fingerprint, stand_ins), stand_ins)

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

    def _work(self, step: ElasticStep, layer: int) -> _LayerWork:
        repairs = [
            Repair(self._stand_ins.of(*run), tokens) for run, tokens in step.repaired_tokens(layer)
        ]
        return _LayerWork(step.active_tokens(layer), repairs)

    def _run_step(
        self, stream: ResidualStream, positions: torch.Tensor, context: ForwardContext
    ) -> None:
        """Run every layer on its active tokens, and measure where that is asked for."""
        observers = [
            _LayerObserver(meter, stream)
            for meter in (self.importance, self.repair.fit, self.repair.held_out)
        ]
        for index, layer in self._layers:
            step = _step_of(context, layer)
            assert step is not None
            if self.rows.probed:
                for observer in observers:
                    observer.before(step, self.rows)
            kv_only = step.kv_only_tokens(index)
            if kv_only is not None:
                write_keys_and_values(layer, stream.total(kv_only), positions[kv_only], kv_only)
            work = self._work(step, index)
            if isinstance(work.active, TokenSubset):
                work.active.install(context, layer.self_attn.attn.layer_name)
            stream.add(layer, *work)
            for observer in observers:
                observer.after(index)


class _LayerWork(NamedTuple):
    """The tokens of a step that run a layer, and what does its work for others."""

    active: ActiveTokens
    repairs: list[Repair]


class _LayerObserver:
    """Shows a meter what a step's layers do to the tokens of the requests that it has marked."""

    def __init__(self, meter: LayerMeter, stream: ResidualStream) -> None:
        self._meter = meter
        self._stream = stream
        self._tokens: torch.Tensor | slice | None = None
        self._before: torch.Tensor | None = None

    def before(self, step: ElasticStep, rows: RowTable) -> None:
        """Note the stream before the first layer; later layers begin where the last one ended."""
        if self._tokens is None:
            self._tokens = marked_tokens(self._meter, step, rows)
        if self._tokens is not None and self._before is None:
            self._before = self._stream.total(self._tokens)

    def after(self, layer: int) -> None:
        if self._tokens is not None and self._before is not None:
            after = self._stream.total(self._tokens)
            self._meter.update(layer, self._before, after)
            self._before = after


def _step_of(context: ForwardContext, layer: Any) -> ElasticStep | None:
    if context.attn_metadata is None:
        return None
    assert isinstance(context.attn_metadata, dict)
    metadata = context.attn_metadata[layer.self_attn.attn.layer_name]
    return cast(ElasticStep, cast(Any, metadata).elastic_step)


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
