"""Real data for tests, shared fixtures, and the division of tests among workers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from hypothesis import settings

from server.errors import InvalidArgument
from server.model.smollm2 import smollm2_checkpoint
from server.model.source import DEMO_MODEL

# Engines and references of these sizes are fastest on one thread, and a busy machine does not
# make them crawl: OpenMP's threads wait for each other after every operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where transformers copies the code that checkpoints bring along; each worker has its own.
MODULES = tempfile.TemporaryDirectory(prefix="fathom-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name

# A worker with the engines and servers of the tests that need most.
WORKER_BYTES = 6 << 30

# How long an example takes says nothing on a busy machine.
settings.register_profile("fathom", deadline=None)
settings.load_profile("fathom")

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return as many as memory allows, at most one more than there are processors.

    Tests wait about half of their time for engines and servers. None where a single file is asked
    for.
    """
    if len(config.args) == 1 and ".py" in config.args[0]:
        return 0
    by_memory = psutil.virtual_memory().available // WORKER_BYTES
    num_workers = min(len(os.sched_getaffinity(0)) + 1, by_memory)
    return num_workers if num_workers > 1 else 0


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


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all workers of this run have in common."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def small(shared_directory: Path) -> Path:
    """Three real layers."""
    # Imported here because it imports torch, which reads the environment set above.
    from tests.pruning.quantization.small_model import small_model

    directory = shared_directory / "small" / "model"
    with FileLock(shared_directory / "small.lock"):
        directory.parent.mkdir(exist_ok=True)
        return directory if directory.exists() else small_model(directory)


@pytest.fixture(scope="session")
def small_quantized(small: Path, shared_directory: Path) -> Path:
    """The same in 4 bits."""
    from tests.pruning.quantization.small_model import quantize

    directory = shared_directory / "quantized" / "model"
    with FileLock(shared_directory / "quantized.lock"):
        directory.parent.mkdir(exist_ok=True)
        return directory if directory.exists() else quantize(small, directory).directory
