"""Settings of the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode

from server.config.errors import conflict
from server.config.values import object_from, pairs_from


def _shares_from(value: object) -> object:
    return pairs_from(value, "NAME=SHARE, separated by commas, or a JSON object")


class EngineSettings(BaseModel):
    engine: Literal["elastic", "dedicated"] = Field(
        "elastic",
        description="What runs the model: one engine for every depth, or for each level an "
        "unmodified vLLM engine of its own.",
    )
    memory_shares: Annotated[
        dict[str, Annotated[float, Gt(0), Le(1)]], NoDecode, BeforeValidator(_shares_from)
    ] = Field(
        {},
        description="Parts of the memory that the dedicated engines get, by level, at most 1 "
        "together: of `kv_cache_gib`, and on GPU of vLLM's `gpu_memory_utilization`; as a flag "
        "or a variable also `NAME=SHARE`, separated by commas. Levels that are not named have "
        "equal parts of the rest.",
    )
    compile_layers: bool | None = Field(
        None,
        description="Whether the elastic engine compiles its layers, once for all of them; none: "
        "on CPU, where there is a C++ compiler.",
    )
    huge_pages: bool = Field(
        True,
        description="Whether engines on CPU move weights of 64 MiB and more into huge pages after "
        "they have loaded them, which takes Linux 6.1.",
    )
    tensor_parallel_size: Annotated[int, Ge(1), Le(1024)] = Field(
        1,
        description="Processes over which every layer of the model is spread, each on a GPU or "
        "on its part of the cores.",
    )
    pipeline_parallel_size: Annotated[int, Ge(1), Le(1024)] = Field(
        1,
        description="Groups of such processes that have a part of the layers each, one after the "
        "other; on GPU alone.",
    )
    distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        None,
        description="What starts these processes: mp on this machine alone, ray on the nodes of "
        "a Ray cluster; none: what vLLM chooses.",
    )
    max_num_seqs: Annotated[int, Ge(1), Le(65536)] = Field(
        256, description="Requests that run in one batch at most."
    )
    kv_cache_gib: Annotated[float, Gt(0)] | None = Field(
        None,
        description="Memory for the KV cache, in GiB; none: on CPU a quarter of what is "
        "available, at most 4, and on GPU what vLLM's `gpu_memory_utilization` leaves.",
    )
    engine_timeout_seconds: Annotated[float, Ge(0)] = Field(
        120.0,
        description="Seconds without an answer after which the engine is killed and started "
        "again; longer than any step takes. 0: never, nor for `engine_stall_seconds`.",
    )
    engine_stall_seconds: Annotated[float, Ge(0)] = Field(
        10.0,
        description="The same for an engine that does nothing at all meanwhile: it neither "
        "computes nor reads pages or files from a disk. 0: no other time than "
        "`engine_timeout_seconds`.",
    )
    tool_parser: str | None = Field(
        None,
        description="vLLM's parser of calls of tools that the model writes, such as `hermes`, for "
        "chats of OpenAI's API; none: chats have no tools.",
    )
    engine_args: Annotated[dict[str, Any], NoDecode, BeforeValidator(object_from)] = Field(
        {},
        description="More arguments of vLLM's `AsyncEngineArgs` by name; as a flag or a variable "
        "a JSON object.",
    )

    @model_validator(mode="after")
    def _check_memory_shares(self) -> EngineSettings:
        if (total := sum(self.memory_shares.values())) > 1 + 1e-9:
            raise conflict("memory_shares", f"{total:g} in all", "at most 1")
        if self.memory_shares and self.engine != "dedicated":
            allowed = f"none with the engine '{self.engine}', which has one memory for all levels"
            raise conflict("memory_shares", ", ".join(self.memory_shares), allowed)
        return self
