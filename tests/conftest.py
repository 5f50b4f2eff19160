"""Where real data for tests lies, and the tests that need it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from server.errors import InvalidArgument
from server.model.smollm2 import smollm2_checkpoint
from server.model.source import DEMO_MODEL

# Engines and references of these sizes are fastest on one thread, and a busy machine does not
# make them crawl: OpenMP's threads wait for each other after every operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where transformers copies the code that checkpoints bring along.
MODULES = tempfile.TemporaryDirectory(prefix="fathom-modules-")
os.environ.setdefault("HF_MODULES_CACHE", MODULES.name)

# How long an example takes says nothing on a busy machine.
settings.register_profile("fathom", deadline=None)
settings.load_profile("fathom")

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def data_path(relative: str) -> Path:
    """Return a path below the data directory beside the repository, or skip the test."""
    path = DATA / relative
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.smollm2)


@pytest.fixture(scope="session")
def smollm2_model() -> Path:
    """A real pretrained Llama of 30 layers and 135 million parameters, kept between sessions."""
    try:
        return smollm2_checkpoint()
    except InvalidArgument as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """A real pretrained Llama of 5 layers and 260,000 parameters."""
    return data_path("models/stories260K")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The model that is served when none is named."""
    return DEMO_MODEL
