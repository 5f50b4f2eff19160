from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pruning.checkpoint import CheckpointError, check_checkpoint
from pruning.fingerprint import model_fingerprint
from pruning.plan import Plan, PlanError
from pruning.surgery import PLAN_FILE, SurgeryError, check_output, count_layers, export_checkpoint
from pruning.surgery.layer_map import LayerMap
from pruning.surgery.model_config import cut_config
from pruning.surgery.module_rules import renumber_rules
from pruning.surgery.shard import Shard
from pruning.surgery.tensor_names import TensorNames

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, which wait for each other on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def plan_of(model: Path, removed: tuple[int, ...] = (), num_layers: int | None = None) -> Plan:
    """A plan that removes ``removed`` first and the other layers from the last."""
    num_layers = num_layers or count_layers(model)
    others = [layer for layer in reversed(range(num_layers)) if layer not in removed]
    return Plan(
        removal_order=(*removed, *others),
        scores=tuple(0.25 for _ in range(num_layers)),
        stderrs=(0.5,) * num_layers,
        model_fingerprint=model_fingerprint(model),
        text_fingerprint="sha256:0",
        num_tokens=7,
        versions={"package": "1.0"},
        created_at=0.0,
    )


def export(model: Path, out: Path, removed: tuple[int, ...], **options: Any) -> Path:
    num_layers = count_layers(model)
    written = export_checkpoint(
        model, out, plan_of(model, removed), num_layers - len(removed), **options
    )
    assert (written.directory, written.removed) == (out, tuple(sorted(removed)))
    check_checkpoint(out)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.glob(f"{out.name}*"))


# Names and numbers


@st.composite
def layer_maps(draw: st.DrawFn) -> LayerMap:
    num_layers = draw(st.integers(1, 24))
    removed = draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers - 1))
    return LayerMap(num_layers, tuple(sorted(removed)))


@given(layer_maps())
def test_layers_that_stay_are_numbered_in_their_order(layers: LayerMap) -> None:
    kept = [i for i in range(layers.num_layers) if i not in layers.removed]
    assert list(layers.kept) == kept
    assert [layers.new_index(layer) for layer in kept] == list(range(layers.depth))
    assert all(layers.new_index(layer) is None for layer in layers.removed)
    assert layers.new_index(layers.num_layers + 1) == layers.depth + 1
    assert layers.cut(range(layers.num_layers)) == kept
    assert layers.renumber(range(layers.num_layers)) == list(range(layers.depth))
    for layer in range(layers.num_layers + 1):
        assert layers.num_kept_below(layer) == sum(i < layer for i in kept)


CONTAINERS = [
    "model.layers",
    "model.decoder.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "transformer.h",
    "transformer.blocks",
    "transformer.encoder.layers",
    "gpt_neox.layers",
    "backbone.layers",
    "rwkv.blocks",
    "h",
]


@given(layer_maps(), st.sampled_from(CONTAINERS))
def test_tensors_of_layers_are_renamed_and_no_others(layers: LayerMap, container: str) -> None:
    others = {"lm_head.weight", "x.embed_tokens.weight", "vision_tower.layers.0.w", "mtp.fc.weight"}
    others |= {f"model.visual.blocks.{i}.w" for i in range(layers.num_layers)}
    parts = ("mlp.experts.3.up_proj.qweight", "self_attn.q_proj.g_idx")
    names = {f"{container}.{i}.{part}" for i in range(layers.num_layers) for part in parts}
    found = TensorNames.of(names | others, layers.num_layers, tied=True)
    assert (found.container, found.embeddings) == (container, {})
    assert {name: found.renamed(name, layers) for name in others} == {n: n for n in others}
    renamed = {found.renamed(name, layers) for name in names} - {None}
    assert renamed == {f"{container}.{i}.{part}" for i in range(layers.depth) for part in parts}
    for new, old in enumerate(layers.kept):
        expected = f"{container}.{new}.mlp.experts.3.up_proj.qweight"
        assert found.renamed(f"{container}.{old}.mlp.experts.3.up_proj.qweight", layers) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.w"], "tensors: none of model.layers.1, though the configuration says 2"),
        (["lm_head.weight"], "tensors: none is named after a layer, allowed: names such as"),
        (["a.layers.0.w", "a.layers.1.w", "b.h.0.w", "b.h.1.w"], "a.layers and b.h both have 2"),
    ],
)
def test_layers_that_cannot_be_found(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TensorNames.of(names, 2, tied=False)


def test_the_first_layer_keeps_the_norm_of_the_embeddings() -> None:
    names = {f"rwkv.blocks.{i}.ln1.weight" for i in range(3)} | {"rwkv.blocks.0.pre_ln.weight"}
    found = TensorNames.of(names, 3, tied=False)
    layers = LayerMap(3, (0,))
    assert found.renamed("rwkv.blocks.0.pre_ln.weight", layers) == "rwkv.blocks.0.pre_ln.weight"
    assert found.renamed("rwkv.blocks.0.ln1.weight", layers) is None
    assert found.renamed("rwkv.blocks.1.ln1.weight", layers) == "rwkv.blocks.0.ln1.weight"


# Quantization rules


MODULES = ("self_attn.q_proj", "mlp.experts.1.up_proj", "mlp.experts.2.down_proj")


def first_match(rules: dict[str, int], name: str) -> int | None:
    """What GPTQModel's ``dynamic`` says of a module: the first rule that matches."""
    return next((v for rule, v in rules.items() if re.match(rule[2:], name)), None)


@st.composite
def dynamic_rules(draw: st.DrawFn, num_layers: int) -> dict[str, int]:
    layer = st.integers(0, num_layers - 1).map(str)
    number = st.one_of(
        layer,
        st.lists(layer, min_size=1, max_size=4).map(lambda items: f"({'|'.join(items)})"),
        st.sampled_from(
            [r"\d+", "[0-9]", "[2-5]", "1[0-9]", ".*", "[0-9]+", "1?[13579]", "1.*", "(?:[12]|3)"]
        ),
    )
    head = st.sampled_from(
        [r".*\.layers\.", r".*[.]layers[.]", r"model\.layers\.", r"^model.layers.", r".*layers\."]
    )
    tail = st.sampled_from([r"\..*", r"\.mlp\..*", r"\..*down_proj$", ".mlp", ".*experts.1.*"])
    rule = st.builds("{}{}{}{}".format, st.sampled_from(["-:", "+:"]), head, number, tail)
    rules = draw(st.lists(st.one_of(rule, st.just(r"+:.*\.q_proj")), max_size=4, unique=True))
    return {rule: value for value, rule in enumerate(rules)}


@given(st.data(), layer_maps())
def test_rules_mean_the_same_for_every_module(data: st.DataObject, layers: LayerMap) -> None:
    rules = data.draw(dynamic_rules(layers.num_layers))
    renumbered = renumber_rules({"bits": 4, "dynamic": rules}, "layers", layers)["dynamic"]
    for new, old in enumerate(layers.kept):
        for module in MODULES:
            before = first_match(rules, f"model.layers.{old}.{module}")
            after = first_match(renumbered, f"model.layers.{new}.{module}")
            assert before == after, (rules, renumbered, old, module)


def test_lists_of_modules_are_renumbered() -> None:
    rules: Any = {
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.3.mlp", "model.layers.2"],
        "ignore": ["re:.*layers.1.*", "model.layers.1.mlp.gate"],
        "extra_config": {"model.layers.1.mlp": {"bits": 8}, "model.layers.3.mlp": {"bits": 2}},
        "group_size": [128, "model.layers.2.x"],
    }
    assert renumber_rules(rules, "layers", LayerMap(4, (1,))) == {
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.2.mlp", "model.layers.1"],
        "ignore": [],
        "extra_config": {"model.layers.2.mlp": {"bits": 2}},
        "group_size": [128, "model.layers.1.x"],
    }


def test_rule_whose_layers_cannot_be_told_is_refused() -> None:
    rule = r"-:layers\.(1\.mlp|2\.self_attn)\.x"
    with pytest.raises(SurgeryError, match=r"quantization_config: found .*1\\\\.mlp.*, allowed:"):
        renumber_rules({"dynamic": {rule: {}}}, "layers", LayerMap(4, (1,)))


# Configurations


@given(layer_maps())
def test_whatever_is_kept_per_layer_is_cut(layers: LayerMap) -> None:
    size = layers.num_layers
    config = {
        "n_layer": size,
        "layer_types": [f"kind {i}" for i in range(size)],
        "num_key_value_heads_per_layer": list(range(size)),
        "block_configs": [{"n": i} for i in range(size)],
        "mlp_only_layers": list(range(0, size, 3)),
        "first_k_dense_replace": size // 2,
        "moe_layer_end_index": size - 1,
        "hybrid_override_pattern": "M*-E" * 6 + "M" * size,
        "eos_token_id": list(range(size)),
        "rope_scaling": {"short_factor": list(range(size))},
        "vision_config": {"num_hidden_layers": size, "layer_types": list(range(size))},
    }
    cut = cut_config(config, layers)
    kept = layers.kept
    changed = {
        "n_layer": len(kept),
        "layer_types": [f"kind {i}" for i in kept],
        "num_key_value_heads_per_layer": list(kept),
        "block_configs": [{"n": i} for i in kept],
        "mlp_only_layers": [new for new, old in enumerate(kept) if old % 3 == 0],
        "first_k_dense_replace": sum(i < size // 2 for i in kept),
        "moe_layer_end_index": len(kept) - 1,
    }
    assert cut == config | changed
    nested = cut_config({"text_config": config, "x": 1}, layers)
    assert nested == {"text_config": cut, "x": 1}
    pattern = {"num_layers": size, "hybrid_override_pattern": ("M*-E" * size)[:size]}
    expected = "".join("M*-E"[i % 4] for i in kept)
    assert cut_config(pattern, layers)["hybrid_override_pattern"] == expected


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"model_type": "jamba"}, "attn_layer_period: found 8"),
        ({"model_type": "x", "moe_layer_freq": 2}, "moe_layer_freq: found 2"),
        ({"model_type": "gemma3n_text"}, "num_kv_shared_layers"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_layers_that_depend_on_their_number_are_refused(config: Any, name: str) -> None:
    config = {"num_hidden_layers": 16, **config}
    with pytest.raises(SurgeryError, match=rf"^config\.json: {name}"):
        cut_config(config, LayerMap(16, (3,)))
    assert cut_config(config, LayerMap(16, ())) == config


def test_a_rule_that_still_holds_is_no_obstacle() -> None:
    config = {"num_layers": 6, "moe_layer_freq": 2}
    assert cut_config(config, LayerMap(6, (2, 3))) == {"num_layers": 4, "moe_layer_freq": 2}


# Models

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def gpt(**more: Any) -> Any:
    sizes: Any = {"n_layer": 6, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    return hf.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=1, eos_token_id=2, **more)


def gemma3(**more: Any) -> Any:
    return hf.Gemma3TextConfig(**SIZES, sliding_window=5, **more)


def gemma3_with_vision() -> Any:
    vision: Any = {"num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return hf.Gemma3Config(text_config=gemma3(), vision_config=vision, mm_tokens_per_image=4)


# The configuration; where the layers are; what is left to the library's rules.
FAMILIES: dict[str, tuple[Callable[[], Any], str, tuple[str, ...]]] = {
    "llama": (lambda: hf.LlamaConfig(**SIZES), "model.layers", ()),
    "qwen2": (
        lambda: hf.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=3
        ),
        "model.layers",
        ("layer_types",),
    ),
    "gemma2": (
        lambda: hf.Gemma2Config(**SIZES, sliding_window=5),
        "model.layers",
        ("layer_types",),
    ),
    "gemma3": (gemma3, "model.layers", ()),
    "gemma3-by-pattern": (
        lambda: gemma3(sliding_window_pattern=3),
        "model.layers",
        ("layer_types",),
    ),
    "gemma3-with-vision": (gemma3_with_vision, "model.language_model.layers", ()),
    "smollm3": (lambda: hf.SmolLM3Config(**SIZES), "model.layers", ()),
    "smollm3-by-interval": (
        lambda: hf.SmolLM3Config(**SIZES),
        "model.layers",
        ("layer_types", "no_rope_layers"),
    ),
    "gpt2": (gpt, "transformer.h", ()),
    "gpt-neo": (
        lambda: hf.GPTNeoConfig(
            vocab_size=96,
            hidden_size=32,
            num_layers=6,
            num_heads=4,
            window_size=5,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 3]],
            initializer_range=0.3,
        ),
        "transformer.h",
        ("attention_layers",),
    ),
    "gpt-neox": (
        lambda: hf.GPTNeoXConfig(
            **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
        ),
        "gpt_neox.layers",
        (),
    ),
    "opt": (
        lambda: hf.OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            init_std=0.3,
        ),
        "model.decoder.layers",
        (),
    ),
    "mixtral": (
        lambda: hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "model.layers",
        (),
    ),
    "qwen3-moe": (
        lambda: hf.Qwen3MoeConfig(
            **SIZES, **MOE, num_experts=4, decoder_sparse_step=2, mlp_only_layers=[3]
        ),
        "model.layers",
        (),
    ),
    "mamba": (
        lambda: hf.MambaConfig(
            vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=6, initializer_range=0.3
        ),
        "backbone.layers",
        (),
    ),
    "rwkv": (
        lambda: hf.RwkvConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=6, context_length=64, rescale_every=0
        ),
        "rwkv.blocks",
        (),
    ),
}


def random_model(config: Any, directory: Path, **saving: Any) -> Path:
    auto: Any = hf.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():  # many are equal in all layers, or zero
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=0.5 if is_scale else 0.0, std=0.3)
    with torch.no_grad():  # else tied embeddings predict the last token again, whatever follows
        model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(directory, **saving)
    return directory


def load(directory: Path) -> Any:
    auto: Any = hf.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def generate(model: Any) -> list[list[int]]:
    prompts = torch.arange(3, 93).reshape(5, 18)
    return list(
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).tolist()
    )


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    scores: torch.Tensor = model(torch.arange(3, 93).reshape(5, 18), use_cache=False).logits
    return scores


def without_layers(model: Any, container: str, removed: tuple[int, ...]) -> Any:
    """Let layers pass on what they get. Nothing is renumbered, so nothing can be misnumbered."""

    def pass_on(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple | list) else before

    layers = model.get_submodule(container)
    for layer in removed:
        layers[layer].register_forward_hook(pass_on, with_kwargs=True)
    return model


@pytest.mark.filterwarnings("ignore:Could not load the custom kernel")
@pytest.mark.parametrize("family", FAMILIES)
def test_family_generates_what_the_model_without_these_layers_does(
    family: str, tmp_path: Path
) -> None:
    make_config, container, implicit = FAMILIES[family]
    model = random_model(make_config(), tmp_path / "model")
    config = read(model / "config.json")
    for name in implicit:
        assert config.pop(name)
    (model / "config.json").write_text(json.dumps(config))
    results: list[list[list[int]]] = []
    # RWKV's first layer norms the embeddings: to pass on what it gets would skip that.
    for removed in [(2, 3), (1, 2, 5), *([(0, 4)] if family != "rwkv" else [])]:
        out = export(model, tmp_path / f"out-{len(results)}", removed)
        exported, expected = load(out), without_layers(load(model), container, removed)
        results.append(generate(exported))
        assert results[-1] == generate(expected), removed
        torch.testing.assert_close(logits(exported), logits(expected))
    results.append(generate(load(model)))
    assert all(a != b for a, b in itertools.pairwise(results))


def test_real_model_at_every_depth(stories_model: Path, tmp_path: Path) -> None:
    plan = plan_of(stories_model, (2, 3, 1, 4, 0))
    for depth in range(1, 6):
        out = tmp_path / str(depth)
        export_checkpoint(stories_model, out, plan, depth)
        expected = without_layers(load(stories_model), "model.layers", plan.skipped(depth))
        assert generate(load(out)) == generate(expected)


def test_layers_for_drafting_move_up(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.w" for i in range(5)]
    model = made_up(tmp_path / "model", {name: torch.full((2,), i) for i, name in enumerate(names)})
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    out = export(model, tmp_path / "out", (1, 2))
    values = {name: int(tensor[0]) for name, tensor in tensors(out).items()}
    assert values == {"model.layers.0.w": 0, "model.layers.1.w": 3, "model.layers.2.w": 4}


# Files


def made_up(directory: Path, content: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 4}')
    save_file(content, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four layers of every kind of tensor, in three shards, with all that lies beside them."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = {
        "num_hidden_layers": 4,
        "auto_map": {"AutoModel": "modeling.Model"},
        "quantization_config": {"bits": 4, "dynamic": {r"-:.*\.layers\.3\..*": {}}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    rules: Any = {"dynamic": {r"-:.*\.layers\.2\..*": {}}}
    (directory / "quantize_config.json").write_text(json.dumps(rules))
    generator = torch.Generator().manual_seed(0)
    content = {"model.embed_tokens.weight": torch.randn(16, 8, generator=generator)}
    for layer in range(4):
        name = f"model.layers.{layer}.mlp"
        content |= {
            f"{name}.qweight": torch.randint(-(2**31), 2**31 - 1, (4, 8), dtype=torch.int32),
            f"{name}.g_idx": torch.arange(layer, layer + 5, dtype=torch.int64),
            f"{name}.scales": torch.randn(3, 8, generator=generator).half(),
            f"{name}.fp8": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
            f"{name}.bias": torch.randn(7, generator=generator).bfloat16(),
            f"{name}.empty": torch.zeros(0, 3),
            f"{name}.flag": torch.tensor([bool(layer % 2)]),
            f"{name}.scalar": torch.tensor(float(layer)),
        }
    weight_map: dict[str, str] = {}
    for number, keep in enumerate([(0, 1), (2,), (3,)], start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        shard = {k: v for k, v in content.items() if (number == 1 and "embed" in k) or
                 any(f"layers.{layer}." in k for layer in keep)}  # fmt: skip
        save_file(shard, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE",
                 "generation_config.json", "modeling.py", "pytorch_model.bin", ".gitattributes",
                 "pytorch_model.bin.index.json"):  # fmt: skip
        (directory / name).write_text(name)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\nOld card")
    return directory


@pytest.mark.parametrize("removed", [(), (1,), (2,), (0, 3), (1, 2, 3)])
def test_every_tensor_is_the_old_one(model: Path, tmp_path: Path, removed: tuple[int, ...]) -> None:
    out = export(model, tmp_path / "out", removed)
    kept = [layer for layer in range(4) if layer not in removed]
    old, new = tensors(model), tensors(out)
    expected = {
        re.sub(r"layers\.(\d)", lambda m: f"layers.{kept.index(int(m[1]))}", name): tensor
        for name, tensor in old.items()
        if not any(f"layers.{layer}." in name for layer in removed)
    }
    assert new.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (new[name].dtype, new[name].shape) == (tensor.dtype, tensor.shape)
        assert (
            new[name]
            .view(torch.uint8 if tensor.ndim else tensor.dtype)
            .equal(tensor.view(torch.uint8 if tensor.ndim else tensor.dtype))
        )


def test_shards_stay_shards(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (2,))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    index = read(out / INDEX)
    shards = {name: Shard.read(out / name) for name in files}
    assert index["weight_map"] == {t.name: f for f, shard in shards.items() for t in shard.tensors}
    size = sum(t.end - t.start for shard in shards.values() for t in shard.tensors)
    assert index["metadata"] == {"total_size": size}
    assert {json.dumps(shard.metadata) for shard in shards.values()} == {'{"format": "pt"}'}


def test_real_model_in_shards(stories_model: Path, tmp_path: Path) -> None:
    load(stories_model).save_pretrained(tmp_path / "model", max_shard_size="200KB")
    out = export(tmp_path / "model", tmp_path / "out", (1, 2))
    assert len(list(out.glob("*.safetensors"))) > 3
    assert generate(load(out)) == generate(load(export(stories_model, tmp_path / "one", (1, 2))))


def test_what_lies_beside_the_weights(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (1,), base_model="somebody/model")
    copied = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE"}
    copied |= {"generation_config.json", "additional_chat_templates/tools.jinja"}
    for name in copied:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    written = {"config.json", "quantize_config.json", "README.md", PLAN_FILE, INDEX}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".safetensors")} == copied | written
    config = read(out / "config.json")
    assert "auto_map" not in config
    assert config["quantization_config"] == {"bits": 4, "dynamic": {r"-:.*\.layers\.2\..*": {}}}
    assert read(out / "quantize_config.json") == {"dynamic": {r"-:.*\.layers\.1\..*": {}}}
    assert Plan.load(out / PLAN_FILE) == plan_of(model, (1,))
    _, metadata, card = (out / "README.md").read_text().split("---\n", 2)
    for line in ("base_model: somebody/model", "license: apache-2.0", "depth: 3", "- en"):
        assert line in metadata.splitlines()
    assert "removed_layers:\n- 1\n" in metadata
    assert "| 1 | 0.250000 | 0.500000 | removed |\n| 2 | 0.250000 | 0.500000 | 1 |" in card
    assert "arxiv.org/abs/2403.03853" in card
    assert "Old card" not in card


def test_code_is_copied_where_it_is_trusted(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (1,), with_code=True)
    assert (out / "modeling.py").read_text() == "modeling.py"
    assert read(out / "config.json")["auto_map"] == {"AutoModel": "modeling.Model"}


@pytest.mark.parametrize(
    ("container", "output", "stored"),
    [
        ("model.layers", "lm_head.weight", "model.embed_tokens.weight"),
        ("transformer.h", "lm_head.weight", "transformer.wte.weight"),
        ("gpt_neox.layers", "embed_out.weight", "gpt_neox.embed_in.weight"),
    ],
)
def test_tied_embeddings_are_stored_as_those_of_the_input(
    tmp_path: Path, container: str, output: str, stored: str
) -> None:
    content = {f"{container}.{i}.w": torch.full((2,), i) for i in range(4)}
    source = made_up(tmp_path / "model", {**content, output: torch.arange(6)})
    config = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    new = tensors(export(source, tmp_path / "tied", (1,)))
    assert output not in new
    assert new[stored].equal(torch.arange(6))
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert output in tensors(export(source, tmp_path / "untied", (1,)))


def test_weights_in_another_layout_are_left_out(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"layers.0.w": torch.zeros(4)}, model / "consolidated.safetensors")
    out = export(model, tmp_path / "out", (1,))
    assert "layers.0.w" not in tensors(out)
    assert "consolidated.safetensors: left out" in caplog.text


# What is refused


def refused(model: Path, out: Path, error: type[Exception], message: str, **options: Any) -> None:
    existed = out.exists()
    with pytest.raises(error, match=re.escape(message)):
        export_checkpoint(model, out, options.pop("plan", plan_of(model)), 3, **options)
    assert siblings(out) == ([out.name] if existed else [])


def test_plan_of_another_model(model: Path, stories_model: Path, tmp_path: Path) -> None:
    plan = plan_of(stories_model)
    refused(model, tmp_path / "out", PlanError, "removal_order: the plan is of a model", plan=plan)
    plan = plan_of(model)
    (model / "model-00002-of-00003.safetensors").write_bytes(
        (model / "model-00002-of-00003.safetensors").read_bytes()[:-1] + b"?"
    )
    refused(model, tmp_path / "out", PlanError, "model_fingerprint: the plan is of", plan=plan)


def test_depth_that_the_model_does_not_have(model: Path, tmp_path: Path) -> None:
    for depth in (0, 5):
        with pytest.raises(ValueError, match=f"^depth: got {depth}, allowed: 1 to 4$"):
            export_checkpoint(model, tmp_path / "out", plan_of(model), depth)


def test_damaged_source(model: Path, tmp_path: Path) -> None:
    plan, out = plan_of(model), tmp_path / "out"
    shard = model / "model-00003-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-3])
    refused(model, out, CheckpointError, f"{shard}: truncated: {len(data) - 3} bytes", plan=plan)
    shard.unlink()
    refused(model, out, CheckpointError, f"{shard}: missing, though {INDEX}", plan=plan)
    save_file({"model.layers.3.other": torch.zeros(1)}, shard)
    plan = plan_of(model)
    refused(model, out, CheckpointError, "model.layers.3.mlp.bias: no shard has it", plan=plan)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    refused(model, out, CheckpointError, "holds no weights, allowed:", plan=plan)


def test_disk_that_is_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(model, tmp_path / "out", SurgeryError, "bytes (0.0 GiB), but 1000 bytes (0.0 GiB) are")


def test_directory_that_exists(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (1,))
    refused(model, out, SurgeryError, f"{out}: exists, allowed: a new directory")
    assert count_layers(out) == 3
    export(model, out, (1, 2), overwrite=True)
    assert count_layers(out) == 2
    assert siblings(out) == ["out"]
    refused(model, model, SurgeryError, f"{model}: exists and holds no {PLAN_FILE}", overwrite=True)
    shutil.copy(out / PLAN_FILE, model)
    refused(model, model, SurgeryError, f"{model}: holds the model itself", overwrite=True)
    absent = tmp_path / "absent" / "out"
    refused(model, absent, SurgeryError, f"{absent}: no directory {absent.parent}, allowed:")
    file = tmp_path / "file"
    file.touch()
    refused(model, file, SurgeryError, f"{file}: exists and holds no", overwrite=True)
    with pytest.raises(SurgeryError, match="exists, allowed: a new directory"):
        check_output(out)
    check_output(out, overwrite=True)


# Ends in the middle


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_of_an_export_that_fails(
    model: Path, tmp_path: Path, error: type[BaseException], overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        export(model, out, (1,))
    calls: list[tuple[int, int]] = []
    export(model, tmp_path / "other", (1, 2), on_progress=lambda *c: calls.append(c))
    assert calls[-1][0] == calls[-1][1]
    for fatal in range(1, len(calls) + 1):

        def fail(done: int, total: int, last: int = calls[fatal - 1][0]) -> None:
            if done >= last:
                raise error

        with pytest.raises(error):
            export(model, out, (1, 2), overwrite=overwrite, on_progress=fail)
        assert siblings(out) == (["out"] if overwrite else [])
    if overwrite:
        assert count_layers(out) == 3


def test_leftovers_of_killed_exports_are_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o[u]t"
    (tmp_path / "o[u]t.partial-1").mkdir()
    (tmp_path / "o[u]t.partial-1" / "config.json").touch()
    export(model, out, (1,))
    assert siblings(out.parent / "o") == ["o[u]t"]
    # Killed between the renames of a replacement, and after them.
    out.rename(tmp_path / "o[u]t.replaced-1")
    with pytest.raises(SurgeryError, match="exists, allowed"):
        export(model, out, (1, 2))
    assert count_layers(out) == 3
    shutil.copytree(out, tmp_path / "o[u]t.replaced-1")
    export(model, out, (1, 2), overwrite=True)
    assert siblings(out.parent / "o") == ["o[u]t"]
    assert count_layers(out) == 2


def test_two_exports_to_one_directory(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refusals = []

    def another(done: int, total: int) -> None:
        with pytest.raises(SurgeryError, match="another process writes it") as caught:
            export(model, out, (1, 2))
        refusals.append(caught.value)

    export(model, out, (1,), on_progress=another)
    assert refusals
    assert count_layers(out) == 3
    assert siblings(out) == ["out"]


ENDLESS_EXPORT = """
import sys
from pathlib import Path
from pruning.plan import Plan
from pruning.surgery import export_checkpoint
model, out, plan = sys.argv[1:]
plan = Plan.load(plan)
print("ready", flush=True)
while True:
    for depth in (1, 2, 3):
        export_checkpoint(model, out, plan, depth, overwrite=True)
"""


def large_model(directory: Path, layer_bytes: int, num_layers: int = 4) -> Path:
    """A checkpoint of one file that takes no room on the disk: a hole after the header."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": num_layers}))
    header = {
        f"model.layers.{i}.w": {
            "dtype": "U8",
            "shape": [layer_bytes],
            "data_offsets": [i * layer_bytes, (i + 1) * layer_bytes],
        }
        for i in range(num_layers)
    }
    head = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + num_layers * layer_bytes)
    return directory


@pytest.fixture
def killed_exports(tmp_path: Path) -> Iterator[Path]:
    """Kill exports to one directory at random moments; yields that directory each time."""
    source = large_model(tmp_path / "model", 3 << 20)
    plan_of(source).save(tmp_path / "plan.json")
    return _killed_exports(source, tmp_path / "out", tmp_path / "plan.json")


def _killed_exports(source: Path, out: Path, plan: Path) -> Iterator[Path]:
    rng = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_EXPORT, source, out, plan],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.5))
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        yield out


def test_kill_at_any_moment_leaves_a_whole_directory_or_none(
    killed_exports: Iterator[Path], tmp_path: Path
) -> None:
    for out in killed_exports:
        if out.exists():
            check_checkpoint(out)
            assert len(tensors(out)) == count_layers(out)
    export(tmp_path / "model", out, (2,), overwrite=True)
    assert siblings(out) == ["out"]
    assert len(tensors(out)) == 3


MEASURED_EXPORT = """
import resource, sys
from pruning.plan import Plan
from pruning.surgery import export_checkpoint
small, large, out, small_plan, large_plan = sys.argv[1:]
export_checkpoint(small, out + "-small", Plan.load(small_plan), 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
written = export_checkpoint(large, out, Plan.load(large_plan), 1)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(written.num_bytes, 1024 * after, 1024 * (after - before))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """One tensor of 400 MiB is copied: more than the limit, so that it cannot be held."""
    arguments: list[str | Path] = [sys.executable, "-c", MEASURED_EXPORT]
    models = [large_model(tmp_path / "small", 1), large_model(tmp_path / "large", 400 << 20)]
    plans = []
    for model in models:
        plans.append(tmp_path / f"{model.name}.json")
        plan_of(model).save(plans[-1])
    result = subprocess.run(
        [*arguments, *models, tmp_path / "out", *plans], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    num_bytes, peak, growth = map(int, result.stdout.split())
    assert num_bytes > 400 << 20
    assert growth < 50 << 20
    assert peak < 1 << 30
    (tmp_path / "out" / "model.safetensors").unlink()  # pytest keeps the directory


def test_surgery_needs_no_torch() -> None:
    code = (
        "import sys, pruning.surgery\n"
        "heavy = {'vllm', 'grpc', 'server', 'torch', 'transformers', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
