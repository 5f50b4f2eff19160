"""What the elastic engine checks of vLLM and torch before it relies on it."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from server.engine.elastic import compatibility
from server.engine.elastic.compatibility import IncompatibleVllm, check_model, check_vllm
from server.engine.elastic.metadata_fields import FIELD_KINDS

PACKAGE = Path(compatibility.__file__).parent


def imported(package: str) -> set[tuple[str, str]]:
    """Return (module, name) of everything that the elastic engine imports from a package."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def test_every_name_that_is_imported_from_vllm_is_checked() -> None:
    checked = {(module, name) for module, names in compatibility._NAMES.items() for name in names}
    assert imported("vllm") - {("vllm.sampling_params", "SamplingParams")} <= checked


def test_every_private_name_that_is_imported_from_torch_is_checked() -> None:
    private = {(module, name) for module, name in imported("torch") if "._" in module}
    assert private, "none is imported any more"
    for module, name in private:
        names = compatibility._TORCH_NAMES
        assert f"{module}.{name}" in names or name in names[module]


@pytest.mark.parametrize("missing", ["vllm.v1.attention.backend", "vllm.inputs.engine"])
def test_missing_names_of_vllm_are_listed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compatibility._NAMES, missing, ("no_such_name",))
    with pytest.raises(IncompatibleVllm, match=f"vLLM .*{missing}.no_such_name"):
        check_vllm()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._inductor.compile_fx", "no_such_name"),
        ("torch._inductor.output_code", "CompiledFxGraph.no_such_field"),
        ("torch._inductor.config.no_such_options", "any"),
    ],
)
def test_missing_names_of_torch_are_listed(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compatibility._TORCH_NAMES, module, (name,))
    with pytest.raises(IncompatibleVllm, match=r"torch 2\S+ lacks .*no_such"):
        check_vllm()


def test_other_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "vllm_version", lambda: "0.99.1")
    with pytest.raises(IncompatibleVllm, match=r"vLLM 0\.99\.1.*tested on 0\.32"):
        check_vllm()
    monkeypatch.setenv(compatibility.UNTESTED_VARIABLE, "1")
    check_vllm()


def test_other_version_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def other(name: str) -> str:
        return "2.99.0+cpu" if name == "torch" else version(name)

    monkeypatch.setattr(metadata, "version", other)
    with pytest.raises(IncompatibleVllm, match=r"torch 2\.99\.0\+cpu.*tested on 2\.13"):
        check_vllm()
    monkeypatch.setenv(compatibility.UNTESTED_VARIABLE, "1")
    check_vllm()


def test_field_of_the_attention_metadata_that_is_not_known_refuses_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(FIELD_KINDS, "req_idx")
    monkeypatch.setenv(compatibility.UNTESTED_VARIABLE, "1")
    with pytest.raises(IncompatibleVllm, match=r"CommonAttentionMetadata.*: req_idx"):
        check_vllm()


def test_field_of_the_attention_metadata_that_is_gone_refuses_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FIELD_KINDS, "gone", FIELD_KINDS["req_idx"])
    with pytest.raises(IncompatibleVllm, match=r"lacks .*: CommonAttentionMetadata\.gone"):
        check_vllm()


class Kernel:
    """The part of vLLM's attention that is used."""

    def __init__(self) -> None:
        self.attn_backend = self.impl = None
        self.layer_name = "attn"


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.rotary_emb = nn.Linear(2, 2), nn.Identity()
        self.attn = Kernel()
        self.q_size = self.kv_size = self.num_kv_heads = self.head_dim = 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.Identity(), SelfAttention()

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> None:
        """Take the arguments of vLLM's layers."""


class OtherLayer(Layer):
    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> None:  # type: ignore[override]
        """Take them in another order."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def embed_input_ids(self) -> None:
        """A method that is looked up, but never called."""


def test_model_with_everything_is_accepted() -> None:
    check_model(Model(), [Layer(), Layer()])


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("", "norm"),
        ("layer", "input_layernorm"),
        ("layer", "self_attn"),
        ("attention", "qkv_proj"),
        ("attention", "head_dim"),
        ("attention", "rotary_emb"),
        ("kernel", "attn_backend"),
        ("kernel", "layer_name"),
    ],
)
def test_what_a_model_lacks_is_named(owner: str, name: str) -> None:
    model, layer = Model(), Layer()
    owners = {
        "": model,
        "layer": layer,
        "attention": layer.self_attn,
        "kernel": layer.self_attn.attn,
    }
    delattr(owners[owner], name)
    with pytest.raises(IncompatibleVllm, match=f"builds Model otherwise .*{name}"):
        check_model(model, [Layer(), layer])


def test_layer_that_is_called_otherwise_is_named() -> None:
    with pytest.raises(IncompatibleVllm, match=r"OtherLayer\.forward takes hidden_states"):
        check_model(Model(), [OtherLayer()])


def test_part_of_attention_that_is_not_known_is_named() -> None:
    layer = Layer()
    layer.self_attn.v_norm = nn.Identity()
    with pytest.raises(IncompatibleVllm, match=r"Layer\.self_attn has v_norm"):
        check_model(Model(), [layer])
