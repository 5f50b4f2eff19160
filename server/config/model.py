"""Settings of the model that is served."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from server.config.errors import conflict
from server.config.values import number_from

_OF_QUANTIZE = ("quantize_group_size", "quantize_act_order", "order")


class ModelSettings(BaseModel):
    model: str | None = Field(
        None,
        description="Checkpoint directory, `demo`, `smollm2` or Hugging Face Hub id; none: `demo`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = Field(
        False, description="Whether code that comes with the model may run."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights and activations; auto: the checkpoint's, but float32 on "
        "processors that are slow in bfloat16.",
    )
    max_context: Annotated[int, Ge(2)] | None = Field(
        None, description="Longest prompt and generation together, in tokens; none: the model's."
    )
    quantize: Literal["gptq-4bit", "gptq-8bit"] | None = Field(
        None,
        description="Whether the model is quantized before it is served; it is kept in "
        "`state_dir`. vLLM runs 8 bits on GPUs alone.",
    )
    quantize_group_size: (
        Annotated[Literal[-1, 32, 64, 128], BeforeValidator(number_from)] | None
    ) = Field(
        None,
        description="Weights of a row that share a scale, -1: all of them; none: the largest of "
        "32, 64 and 128 that fits the model.",
    )
    quantize_act_order: bool = Field(
        False, description="Whether the columns with the largest activations are quantized first."
    )
    order: Literal["quantize-then-prune", "prune-then-quantize"] = Field(
        "quantize-then-prune",
        description="What comes first; `prune-then-quantize` makes another model of each depth, "
        "which `fathom export` can write.",
    )

    @model_validator(mode="after")
    def _check_quantization(self) -> ModelSettings:
        if self.quantize is None:
            for name in _OF_QUANTIZE:
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise conflict(name, repr(value), "nothing unless 'quantize' is set")
        return self
