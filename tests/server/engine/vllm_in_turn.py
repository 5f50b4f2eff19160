"""Unmodified vLLM, run on one checkpoint after the other in one process.

``python -m tests.server.engine.vllm_in_turn TASK RESULTS``: both are JSON files. What does not run
is reported with vLLM's message.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.engine.arguments import IN_PROCESS_EXECUTOR, prepare_environment

# For the longest of the prompts and what follows, with vLLM's blocks of 128 tokens.
_KV_CACHE_BYTES = 8 << 20
_MAX_TOKENS = 128


def generate_in_turn(
    checkpoints: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    directory: Path,
) -> dict[str, list[list[int]] | str]:
    """Return the greedy tokens for all prompts, or vLLM's message, of each checkpoint.

    The code that comes with checkpoints is trusted. Two files are written to ``directory``.
    """
    task, results = directory / "task.json", directory / "results.json"
    paths = {name: str(path) for name, path in checkpoints.items()}
    task.write_text(
        json.dumps({"checkpoints": paths, "prompts": prompts, "num_tokens": num_tokens})
    )
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name, task, results],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outcomes: dict[str, list[list[int]] | str] = json.loads(results.read_bytes())
    return outcomes


def _generate(checkpoint: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    _inspect_here(checkpoint)
    llm = LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=_KV_CACHE_BYTES,
        max_model_len=64,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=_MAX_TOKENS,
        use_tqdm_on_load=False,
        distributed_executor_backend=IN_PROCESS_EXECUTOR,
    )
    try:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.llm_engine.engine_core.shutdown()


def _inspect_here(checkpoint: str) -> None:
    """Register vLLM's class itself: else vLLM looks at it in a process of its own, for seconds."""
    from vllm import ModelRegistry

    for name in json.loads((Path(checkpoint) / "config.json").read_bytes())["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _collect_nothing(generation: int = 2) -> int:
    return 0


def main(task: Path, results: Path) -> None:
    prepare_environment()
    given = json.loads(task.read_bytes())
    # vLLM collects garbage seven times for each model, a second or two in all.
    gc.collect = _collect_nothing
    outcomes: dict[str, list[list[int]] | str] = {}
    for name, checkpoint in given["checkpoints"].items():
        try:
            outcomes[name] = _generate(checkpoint, given["prompts"], given["num_tokens"])
        except Exception as error:
            outcomes[name] = str(error)
    results.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
