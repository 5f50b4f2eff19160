"""Llama models of any size with random weights, so that measuring speed needs no download."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
END_OF_TEXT = "<|endoftext|>"
_SPEC_FILE = "random_model.json"
_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class RandomModel:
    """The size and seed of a model; equal ones make equal models.

    Raises :class:`ValueError` for sizes that are not possible. Every vocabulary holds all bytes
    and the end of the text, so it has at least 257 tokens.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_context: int = 4096
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed: 1 or more")
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size: got {self.vocab_size}, allowed: 257 or more")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, allowed: a multiple of twice the "
                f"{self.num_heads} heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: got {self.num_kv_heads}, allowed: a divisor of {self.num_heads}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, allowed: {', '.join(DTYPES)}")

    @property
    def name(self) -> str:
        return (
            f"random-{self.num_layers}x{self.hidden_size}-{self.intermediate_size}"
            f"-{self.num_heads}-{self.num_kv_heads}-{self.vocab_size}-{self.dtype}-{self.seed}"
        )

    def save(self, directory: Path) -> Path:
        """Write the checkpoint below ``directory`` unless it is there, and return its path."""
        path = directory / self.name
        spec = json.dumps(asdict(self), indent=2)
        if (path / _SPEC_FILE).is_file() and (path / _SPEC_FILE).read_text() == spec:
            return path
        unfinished = directory / f".{self.name}-{os.getpid()}"
        unfinished.mkdir(parents=True)
        try:
            self._write(unfinished)
            (unfinished / _SPEC_FILE).write_text(spec)
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return path

    def _write(self, directory: Path) -> None:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(self.seed)
        weight_map: dict[str, str] = {}
        total_size = 0
        # One file for each layer, so that only one layer is in memory at a time.
        for number, shapes in enumerate(self._shards()):
            file = f"model-{number + 1:05d}-of-{self.num_layers + 1:05d}.safetensors"
            tensors = {
                name: _random_tensor(shape, self.dtype, generator) for name, shape in shapes.items()
            }
            save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        (directory / "config.json").write_text(json.dumps(self._config(), indent=2))
        self._tokenizer().save_pretrained(directory)

    def _shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        hidden, head = self.hidden_size, self.hidden_size // self.num_heads
        embedding = (self.vocab_size, hidden)
        yield {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": (hidden,),
            "lm_head.weight": embedding,
        }
        for layer in range(self.num_layers):
            shapes: dict[str, tuple[int, ...]] = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (self.num_kv_heads * head, hidden),
                "self_attn.v_proj": (self.num_kv_heads * head, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (self.intermediate_size, hidden),
                "mlp.up_proj": (self.intermediate_size, hidden),
                "mlp.down_proj": (hidden, self.intermediate_size),
            }
            yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "max_position_embeddings": self.max_context,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "use_cache": True,
        }

    def _tokenizer(self) -> Any:
        """Return a tokenizer of bytes, with its vocabulary filled up with words it never makes.

        These words make detokenizing cost as much as with a real vocabulary.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokens = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokens += [f"Ġ{_word(number)}" for number in range(self.vocab_size - len(tokens))]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            model_max_length=self.max_context,
            clean_up_tokenization_spaces=False,
        )


def _random_tensor(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> torch.Tensor:
    import torch

    if len(shape) == 1:  # the weight of a norm
        return torch.ones(shape, dtype=getattr(torch, dtype))
    values = torch.empty(shape).normal_(0.0, _STANDARD_DEVIATION, generator=generator)
    return values.to(getattr(torch, dtype))


def _word(number: int) -> str:
    """Return words of two letters and more, each number's its own."""
    letters = ""
    number += 26
    while True:
        letters = chr(ord("a") + number % 26) + letters
        number = number // 26 - 1
        if number < 0:
            return letters
