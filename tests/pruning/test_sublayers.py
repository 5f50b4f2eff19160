from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pruning.importance import ImportanceError, measure_block_influence
from pruning.sublayers import Part, measure_sublayer_influence, without_part
from tests.architectures import BY_NAME, SHARED, UNGROUPED, hf
from tests.conftest import data_path
from tests.pruning.test_architectures import (
    CustomModel,
    influence,
    input_ids,
    library_model,
    stream_after,
    with_random_weights,
)

__all__ = ["input_ids"]

PARTS: tuple[Part, ...] = ("attention", "feed_forward")
SEQUENTIAL = (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3-MoE", "Mixtral", "Gemma", "Gemma 2", "Gemma 3",
    "OPT", "GPT-2", "Baichuan2 with RoPE (7B)", "Baichuan2 with ALiBi (13B)",
)  # fmt: skip


def part_modules(family: str, layer: Any, part: Part) -> list[nn.Module]:
    """The modules of one part, for each family."""
    match family, part:
        case "GPT-2", "attention":
            return [layer.attn]
        case "GPT-NeoX", "attention":
            return [layer.attention]
        case _, "attention":
            return [layer.self_attn]
        case "OPT", "feed_forward":
            return [layer.fc1, layer.fc2]
        case _:
            return [layer.mlp]


def with_zero_weights(family: str, model: Any, layer: int, part: Part) -> Any:
    """Return the model with one part whose weights, biases included, are all zero."""
    zeroed = copy.deepcopy(model)
    layers = zeroed.get_submodule(BY_NAME[family].layers)
    with torch.no_grad():
        for module in part_modules(family, layers[layer], part):
            for parameter in module.parameters():
                parameter.zero_()
    return zeroed


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_sequential_families(family: str, input_ids: torch.Tensor) -> None:
    model = library_model(family)
    paths = (BY_NAME[family].layers, BY_NAME[family].norm)
    measured = measure_sublayer_influence(model, input_ids.chunk(3))
    for layer in range(6):
        x = stream_after(model, layer, paths, input_ids)
        no_feed_forward = with_zero_weights(family, model, layer, "feed_forward")
        y = stream_after(no_feed_forward, layer + 1, paths, input_ids)
        z = stream_after(model, layer + 1, paths, input_ids)
        assert measured.attention.scores[layer] == pytest.approx(influence(x, y), rel=1e-10)
        assert measured.feed_forward.scores[layer] == pytest.approx(influence(y, z), rel=1e-10)
    assert min(measured.attention.scores + measured.feed_forward.scores) > 1e-4
    assert measured.attention.num_tokens == measured.feed_forward.num_tokens == 36


@pytest.mark.parametrize("family", [*SEQUENTIAL, "Phi", "GPT-NeoX"])
@pytest.mark.parametrize("part", PARTS)
def test_removal_equals_zero_weights(family: str, part: Part, input_ids: torch.Tensor) -> None:
    model = library_model(family)
    zeroed = with_zero_weights(family, model, 2, part)
    with torch.no_grad():
        dense = model(input_ids).logits
        with without_part(model, 2, part):
            removed = model(input_ids).logits
        assert torch.equal(removed, zeroed(input_ids).logits)
        assert not torch.equal(removed, dense)
        assert torch.equal(model(input_ids).logits, dense)


def test_custom_code_in_place(input_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = with_random_weights(CustomModel("in place"))
    separate = copy.deepcopy(model)
    for layer in separate.model.layers:
        layer.style = "tuple"
    assert measure_sublayer_influence(model, [input_ids]) == measure_sublayer_influence(
        separate, [input_ids]
    )


def test_padding_is_not_counted(input_ids: torch.Tensor) -> None:
    model = library_model("OPT")
    mask = torch.ones_like(input_ids)
    mask[0, 7:] = mask[2, 3:] = 0
    rows = [input_ids[:1, :7], input_ids[1:2], input_ids[2:, :3]]
    alone = measure_sublayer_influence(model, rows)
    together = measure_sublayer_influence(model, [input_ids], [mask])
    assert together.attention.num_tokens == 22
    assert together.attention.scores == pytest.approx(alone.attention.scores)
    assert together.feed_forward.scores == pytest.approx(alone.feed_forward.scores)


def sequential_gpt_neox() -> Any:
    return hf.GPTNeoXConfig(**UNGROUPED, use_parallel_residual=False)


def test_a_parallel_family_made_sequential_is_measured(input_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = with_random_weights(hf.AutoModelForCausalLM.from_config(sequential_gpt_neox()))
    measured = measure_sublayer_influence(model, [input_ids])
    paths = ("gpt_neox.layers", "gpt_neox.final_layer_norm")
    zeroed = with_zero_weights("GPT-NeoX", model, 1, "feed_forward")
    x = stream_after(model, 1, paths, input_ids)
    y = stream_after(zeroed, 2, paths, input_ids)
    assert measured.attention.scores[1] == pytest.approx(influence(x, y), rel=1e-10)


def post_norm_opt() -> Any:
    config = BY_NAME["OPT"].config()
    config.do_layer_norm_before = False
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BY_NAME["Phi"].config, "PhiDecoderLayer .* lacks a norm .* between the parts"),
        (
            BY_NAME["GPT-NeoX"].config,
            r"GPTNeoXLayer .* works on its input \(parallel\)",
        ),
        (post_norm_opt, "OPTDecoderLayer .* its first norm does not receive its input"),
        (BY_NAME["Mamba"].config, "layer 0: MambaBlock has no attention part that is known"),
        (
            lambda: hf.Olmo2Config(**SHARED),
            "Olmo2DecoderLayer .* lacks a norm before attention",
        ),
    ],
)
def test_other_layers_are_refused_with_the_reason(
    config: Callable[[], Any], reason: str, input_ids: torch.Tensor
) -> None:
    model = hf.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(ValueError, match=reason):
        measure_sublayer_influence(model, [input_ids])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_removed_attention_has_no_influence(input_ids: torch.Tensor) -> None:
    model = library_model("Llama")
    with without_part(model, 1, "attention"):
        measured = measure_sublayer_influence(model, [input_ids])
    assert measured.attention.scores[1] == pytest.approx(0, abs=1e-15)
    assert measured.attention.scores[2] > 1e-4


def test_removal_drops_a_damaged_part(input_ids: torch.Tensor) -> None:
    model = library_model("Llama")
    sound = with_zero_weights("Llama", model, 1, "feed_forward")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
        with pytest.raises(ImportanceError, match="layer 1, feed_forward: the influence is not"):
            measure_sublayer_influence(model, [input_ids])
        with without_part(model, 1, "feed_forward"):
            assert torch.equal(model(input_ids).logits, sound(input_ids).logits)


def test_removal_holds_in_generation(input_ids: torch.Tensor) -> None:
    # Attention of layer 0 is where the library reads the length of the cache.
    model = library_model("Llama")
    zeroed = with_zero_weights("Llama", model, 0, "attention")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(input_ids)
    expected = zeroed.generate(input_ids, attention_mask=mask, **options)
    with without_part(model, 0, "attention"):
        removed = model.generate(input_ids, attention_mask=mask, **options)
    assert torch.equal(removed, expected)


def test_parts_and_layers_that_do_not_exist_are_refused() -> None:
    model = library_model("Llama")
    for layer in (-1, 6):
        with (
            pytest.raises(ValueError, match=f"layer: got {layer}, allowed: 0 to 5"),
            without_part(model, layer, "attention"),
        ):
            pass
    part: Any = "norm"
    with (
        pytest.raises(ValueError, match="part: got 'norm', allowed: attention or feed_forward"),
        without_part(model, 0, part),
    ):
        pass
    with (
        pytest.raises(ValueError, match="layer 1: MambaBlock has no feed_forward part"),
        without_part(library_model("Mamba"), 1, "feed_forward"),
    ):
        pass


@pytest.fixture
def stories(stories_model: Path) -> tuple[Any, torch.Tensor]:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text())[:20]
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    model = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float64)
    ids = [tokenizer(text, truncation=True, max_length=128).input_ids for text in texts]
    return model, torch.tensor(ids)


def streams_by_hand(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return x, y and z of every layer of a Llama, attention written out."""
    config, batch, length = model.config, *ids.shape
    rotary = model.model.rotary_emb(model.model.embed_tokens(ids), torch.arange(length)[None])
    groups = config.num_attention_heads // config.num_key_value_heads
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    z = model.model.embed_tokens(ids)
    streams: list[tuple[torch.Tensor, ...]] = []
    for layer in model.model.layers:
        x, attention = z, layer.self_attn
        normed = layer.input_layernorm(x)
        query, key, value = (
            project(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        weights = query @ key.mT / math.sqrt(attention.head_dim)
        mixed = weights.masked_fill(later, -math.inf).softmax(-1) @ value
        y = x + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        normed, mlp = layer.post_attention_layernorm(y), layer.mlp
        gated = nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        z = y + mlp.down_proj(gated)
        streams.append((x, y, z))
    return streams


def test_stories260k_by_hand(stories: tuple[Any, torch.Tensor]) -> None:
    model, ids = stories
    measured = measure_sublayer_influence(model, ids.chunk(4))

    def influence(before: torch.Tensor, after: torch.Tensor) -> float:
        cosines = nn.functional.cosine_similarity(before, after, dim=-1, eps=0)
        return float(1 - cosines.mean())

    with torch.no_grad():
        streams = streams_by_hand(model, ids)
    # Norms and rotations of the library are computed in float32.
    assert measured.attention.scores == pytest.approx(
        [influence(x, y) for x, y, _ in streams], abs=1e-6
    )
    assert measured.feed_forward.scores == pytest.approx(
        [influence(y, z) for _, y, z in streams], abs=1e-6
    )
    assert measure_block_influence(model, [ids]).scores == pytest.approx(
        [influence(x, z) for x, _, z in streams], abs=1e-6
    )


@pytest.mark.parametrize("part", PARTS)
def test_removal_on_stories260k(stories: tuple[Any, torch.Tensor], part: Part) -> None:
    model, ids = stories
    for layer in range(5):
        zeroed = copy.deepcopy(model)
        module = zeroed.model.layers[layer]
        last = module.self_attn.o_proj if part == "attention" else module.mlp.down_proj
        with torch.no_grad():
            last.weight.zero_()
            dense = model(ids, labels=ids).loss
            with without_part(model, layer, part):
                removed = model(ids, labels=ids)
            expected = zeroed(ids, labels=ids)
        assert torch.equal(removed.logits, expected.logits)
        assert torch.equal(removed.loss, expected.loss)
        assert removed.loss > dense
