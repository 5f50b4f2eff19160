"""Plain vLLM on exported checkpoints of every architecture, and the table that says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.architectures import ARCHITECTURES, Architecture, architecture_table, make_checkpoint
from tests.pruning.models import PROMPTS, generate, load
from tests.pruning.surgery.exporting import export
from tests.server.engine.vllm_in_turn import generate_in_turn

NUM_TOKENS = 12
REMOVED = (2, 3)


@dataclass(frozen=True)
class Outcome:
    """``by_vllm`` is vLLM's message where it runs no such model."""

    dense: list[list[int]]
    exported: list[list[int]]
    by_vllm: list[list[int]] | str


def new_tokens(directory: Path) -> list[list[int]]:
    length = PROMPTS.shape[1]
    return [tokens[length:] for tokens in generate(load(directory), NUM_TOKENS)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    if torch.cuda.is_available():
        pytest.skip("says what vLLM for CPU runs")
    directory = tmp_path_factory.mktemp("architectures")
    dense, exports = {}, {}
    for number, architecture in enumerate(ARCHITECTURES):
        dense[architecture.name] = make_checkpoint(architecture, directory / f"dense-{number}")
        exports[architecture.name] = export(
            dense[architecture.name],
            directory / f"exported-{number}",
            REMOVED,
            with_code=architecture.has_code,
        )
    by_vllm = generate_in_turn(exports, PROMPTS.tolist(), NUM_TOKENS, directory)
    return {
        name: Outcome(new_tokens(dense[name]), new_tokens(exports[name]), by_vllm[name])
        for name in exports
    }


@pytest.mark.filterwarnings("ignore:Could not load the custom kernel")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_vllm_equals_transformers_on_the_export(
    architecture: Architecture, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[architecture.name]
    assert outcome.exported != outcome.dense
    if architecture.refusal is None:
        assert outcome.by_vllm == outcome.exported
    else:
        assert isinstance(outcome.by_vllm, str), "vLLM has learned it: change the table"
        assert architecture.refusal in outcome.by_vllm


def test_the_table_of_architectures_is_current() -> None:
    document = Path(__file__).parents[3] / "docs" / "architectures.md"
    assert architecture_table() in document.read_text("utf-8")
