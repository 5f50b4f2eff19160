from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pruning.decoder import find_decoder, without_layers
from pruning.fingerprint import model_fingerprint
from pruning.importance import ImportanceError, measure_block_influence
from pruning.plan import Plan
from pruning.quality import QualityError, measure_quality, quality_of_windows, token_statistics
from pruning.surgery import export_checkpoint
from tests.architectures import (
    ARCHITECTURES,
    BY_NAME,
    SIZES,
    Architecture,
    hf,
    make_checkpoint,
    make_model,
)
from tests.pruning.models import PROMPTS, generate, load, logits
from tests.pruning.models import without_layers as without_layers_by_hand

NUM_CUSTOM_LAYERS = 4
# transformers halves the residual stream after every few layers of this model.
RESCALED = Architecture(
    "RWKV, rescaled",
    "RwkvForCausalLM",
    lambda: hf.RwkvConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=6, context_length=64, rescale_every=2
    ),
    "rwkv.blocks",
    "rwkv.ln_out",
)


class AlibiAttention(nn.Module):
    """Attention of Baichuan2-13B's shape: a packed projection, a bias by distance."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.W_pack = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden_states: torch.Tensor, alibi: torch.Tensor) -> Any:
        batch, length, hidden = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, self.num_heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=alibi)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden)), (key, value)


class CustomLayer(nn.Module):
    """A layer as checkpoints bring it along; ``style`` says how it passes the stream."""

    def __init__(self, hidden: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.input_layernorm = nn.RMSNorm(hidden)
        self.self_attn = AlibiAttention(hidden, num_heads=4)
        self.post_attention_layernorm = nn.RMSNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 48), nn.SiLU(), nn.Linear(48, hidden))

    def forward(self, x: torch.Tensor, alibi: torch.Tensor) -> Any:
        mixed, present = self.self_attn(self.input_layernorm(x), alibi)
        if self.style == "in place":
            x += mixed
            x += self.mlp(self.post_attention_layernorm(x))
        else:
            x = x + mixed
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x if self.style == "tensor" else (x, None, present)


class CustomDecoder(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.by_keyword = style == "keyword"
        self.embed_tokens = nn.Embedding(96, 32)
        self.layers = nn.ModuleList([CustomLayer(32, style) for _ in range(NUM_CUSTOM_LAYERS)])
        self.norm = nn.RMSNorm(32)

    def forward(self, input_ids: torch.Tensor) -> Any:
        states = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        slopes = 2.0 ** -torch.arange(1, 5)[:, None, None]
        alibi = (-slopes * distance).masked_fill(distance < 0, -torch.inf).to(states.dtype)
        for layer in self.layers:
            out = layer(alibi=alibi, x=states) if self.by_keyword else layer(states, alibi)
            states = out[0] if isinstance(out, tuple) else out
        return (self.norm(states),)


class CustomModel(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.model = CustomDecoder(style)
        self.lm_head = nn.Linear(32, 96, bias=False)

    def forward(self, input_ids: torch.Tensor) -> Any:
        raise AssertionError("the product with the output embeddings is not needed")


def with_random_weights(model: Any) -> Any:
    """Return the model in float64, its weights so large that every layer turns the stream."""
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def library_model(name: str) -> Any:
    return make_model(BY_NAME[name]).double()


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))


def stream_after(model: Any, num_layers: int, paths: tuple[str, str], ids: torch.Tensor) -> Any:
    """Return the raw residual stream after some layers, by a model that has no more of them."""
    cut = copy.deepcopy(model)
    layers, norm = paths
    cut.set_submodule(layers, cut.get_submodule(layers)[:num_layers])
    cut.set_submodule(norm, nn.Identity())
    decoder = cut.get_submodule(layers.rpartition(".")[0])
    with torch.no_grad():
        return decoder(input_ids=ids)[0]


def influence(before: torch.Tensor, after: torch.Tensor) -> float:
    a, b = (s.detach().double().flatten(0, -2).numpy() for s in (before, after))
    cosines = (a * b).sum(-1) / np.sqrt((a * a).sum(-1)) / np.sqrt((b * b).sum(-1))
    return float(1 - cosines.mean())


def expected_scores(model: Any, paths: tuple[str, str], ids: torch.Tensor) -> list[float]:
    num_layers = len(model.get_submodule(paths[0]))
    streams = [stream_after(model, n, paths, ids) for n in range(num_layers + 1)]
    return [influence(a, b) for a, b in pairwise(streams)]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, RESCALED], ids=str)
def test_block_influence(architecture: Architecture, input_ids: torch.Tensor) -> None:
    model = make_model(architecture).double()
    paths = (architecture.layers, architecture.norm)
    around = model.get_submodule(paths[0].rpartition(".")[0])
    decoder = find_decoder(model)
    assert list(decoder.layers) == list(model.get_submodule(paths[0]))
    assert decoder.module is around

    measured = measure_block_influence(model, input_ids.chunk(3))
    assert measured.scores == pytest.approx(expected_scores(model, paths, input_ids), rel=1e-7)
    assert measured.num_tokens == input_ids.numel()
    assert min(measured.scores) > 1e-4
    # The norm after the last layer turns the state: measured after it, the score would differ.
    normed = around(input_ids=input_ids)[0]
    before = stream_after(model, len(decoder.layers) - 1, paths, input_ids)
    assert abs(influence(before, normed) - measured.scores[-1]) > 1e-3


@pytest.mark.filterwarnings("ignore:Could not load the custom kernel")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_plan_and_quality_are_those_of_the_exports(
    architecture: Architecture, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(architecture, tmp_path / "model")
    dense = load(checkpoint)
    plan = Plan.from_importance(
        measure_block_influence(dense, PROMPTS.chunk(5)),
        model_fingerprint=model_fingerprint(checkpoint),
        text_fingerprint="sha256:0",
        versions={},
    )
    by_hand = replace(plan, removal_order=(0, 3, 1, 2, 4, 5))
    cuts = [(plan, 4), (plan, 2), (by_hand, 4)]
    skipped = [(), *(chosen.skipped(depth) for chosen, depth in cuts)]
    same, *measured = measure_quality(dense, PROMPTS, skipped)
    assert (same.agreement, same.kl_nats, same.num_tokens) == (1, 0, 5 * 17)
    reference = logits(dense)
    for number, ((chosen, depth), quality) in enumerate(zip(cuts, measured, strict=True)):
        out = tmp_path / str(number)
        export_checkpoint(checkpoint, out, chosen, depth, with_code=architecture.has_code)
        windows = zip(logits(load(out)), reference, PROMPTS, strict=True)
        expected = quality_of_windows(
            [token_statistics(a[:-1], b[:-1], ids[1:]).tolist() for a, b, ids in windows]
        )
        assert quality.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert quality.agreement == expected.agreement
        assert quality.kl_nats == pytest.approx(expected.kl_nats, rel=1e-3)
        assert quality.kl_nats is not None
        assert quality.agreement is not None
        assert quality.kl_nats > 1e-4
        assert quality.agreement < 1
    assert len({quality.perplexity for quality in measured}) == len(cuts)


def test_generation_without_layers() -> None:
    model = library_model("Llama")
    before = generate(model)
    with without_layers(find_decoder(model).layers, (1, 4)):
        cut = generate(model)
    assert cut == generate(without_layers_by_hand(library_model("Llama"), "model.layers", (1, 4)))
    assert cut != before == generate(model)


def test_what_has_no_quality_is_refused() -> None:
    model = library_model("Llama")
    for layer in (-1, 6):
        with pytest.raises(ValueError, match=f"skipped: got layer {layer}, allowed: 0 to 5"):
            measure_quality(model, PROMPTS, [(2, layer)])
    with pytest.raises(ValueError, match=r"LlamaModel returned .* without logits"):
        measure_quality(model.model, PROMPTS, [(1,)])
    with pytest.raises(QualityError, match="window 0: got no tokens"):
        measure_quality(model, PROMPTS[:, :1], [(1,)])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    with pytest.raises(ValueError, match="training mode"):
        measure_quality(model.train(), PROMPTS, [(1,)])


@pytest.mark.parametrize("style", ["in place", "tuple"])
def test_layers_that_add_in_place_are_left_out(style: str, input_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = with_random_weights(CustomModel(style))
    ids = input_ids[:1]
    whole = model.model(ids)[0]
    with without_layers(find_decoder(model).layers, (1, 2)):
        cut = model.model(ids)[0]
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    assert torch.equal(cut, model.model(ids)[0])
    assert not torch.allclose(cut, whole)


@pytest.mark.parametrize("style", ["tensor", "tuple", "keyword", "in place"])
def test_custom_code(style: str, input_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = with_random_weights(CustomModel(style))
    measured = measure_block_influence(model, [input_ids])
    expected = expected_scores(model, ("model.layers", "model.norm"), input_ids)
    assert measured.scores == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("family", ["GPT-2", "OPT", "Gemma 3", "Mixtral", "Mamba", "RWKV"])
def test_padding_on_the_right_is_not_counted(family: str, input_ids: torch.Tensor) -> None:
    model = library_model(family)
    if family == "Gemma 3":  # eager attention makes NaN of padding that sees nothing
        model.set_attn_implementation("sdpa")
    mask = torch.ones_like(input_ids)
    mask[0, 7:] = mask[2, 3:] = 0
    alone = measure_block_influence(model, [input_ids[:1, :7], input_ids[1:2], input_ids[2:, :3]])
    together = measure_block_influence(model, [input_ids], [mask])
    assert together.num_tokens == alone.num_tokens == 7 + 12 + 3
    assert together.scores == pytest.approx(alone.scores, rel=1e-6)


def test_layers_of_a_multimodal_model_are_those_of_its_text_model() -> None:
    vision: Any = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = hf.Gemma3TextConfig(**SIZES)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = hf.Gemma3ForConditionalGeneration(config)
    assert list(find_decoder(model).layers) == list(model.model.language_model.layers)


def test_a_model_without_known_layers_is_refused_with_what_was_looked_for() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)).eval()
    names = "'layers' or 'h' or 'blocks', neither itself nor in model, transformer, backbone"
    with pytest.raises(ValueError, match=f"^model: Sequential has no module list named {names}"):
        measure_block_influence(model, [torch.ones(1, 4, dtype=torch.long)])


def test_an_encoder_decoder_is_refused() -> None:
    config = hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, an encoder-decoder"):
        measure_block_influence(hf.T5ForConditionalGeneration(config).eval(), [])


def test_masks_for_a_model_that_takes_none_are_refused(input_ids: torch.Tensor) -> None:
    model = CustomModel("tuple").eval()
    with pytest.raises(ValueError, match="CustomDecoder takes no attention_mask"):
        measure_block_influence(model, [input_ids], [torch.ones_like(input_ids)])


class Wrong(nn.Module):
    def __init__(self, result: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, states: torch.Tensor, alibi: torch.Tensor) -> Any:
        return self.result(states)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: {"states": x}, "layers: Wrong returned dict, allowed: the hidden states"),
        (lambda x: x.flatten(0, 1), "got states of shape [36, 32] for tokens of shape [3, 12]"),
    ],
)
def test_layers_that_return_something_else_are_refused(
    result: Callable[[torch.Tensor], Any], message: str, input_ids: torch.Tensor
) -> None:
    model = CustomModel("tensor")
    model.model.layers[2] = Wrong(result)
    with pytest.raises(ValueError, match=re.escape(message)):
        measure_block_influence(model.eval(), [input_ids])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


def test_a_layer_that_does_not_run_is_refused(input_ids: torch.Tensor) -> None:
    model = library_model("Llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ImportanceError, match="layer 5: measured on 0 tokens"):
        measure_block_influence(model, [input_ids])
