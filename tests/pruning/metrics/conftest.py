from __future__ import annotations

from pathlib import Path

import pytest

from tests.pruning.metrics.subjects import Subject, random_llama, stories


@pytest.fixture(scope="session")
def random_subject() -> Subject:
    return random_llama()


@pytest.fixture(scope="session")
def stories_subject(stories_model: Path) -> Subject:
    return stories(stories_model)


@pytest.fixture(params=["random", "stories260K"])
def subject(request: pytest.FixtureRequest) -> Subject:
    name = {"random": "random_subject", "stories260K": "stories_subject"}[request.param]
    found: Subject = request.getfixturevalue(name)
    return found
