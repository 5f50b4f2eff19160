"""``fathom own-text``."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.calibration.own_text_store import LENGTH, SEED
from server.cli.offline import run_offline
from server.cli.offline_options import Config, Dtype, ModelArgument, Revision, TrustRemoteCode
from server.config import Settings, load_settings
from server.telemetry.progress import ProgressReport


def own_text(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="File to write, JSON lines with a text each.")],
    tokens: Annotated[
        int, typer.Option(help="Tokens to write.", min=256, metavar="NUMBER")
    ] = 32768,
    length: Annotated[
        int, typer.Option(help="Tokens of each document, at most.", min=32, metavar="NUMBER")
    ] = LENGTH,
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling.", min=0, metavar="NUMBER")
    ] = SEED,
    config: Config = None,
    revision: Revision = None,
    dtype: Dtype = None,
    state_dir: Annotated[
        str | None, typer.Option(help="Directory that keeps compiled layers.", metavar="PATH")
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Have a model write text, to calibrate on where no text of your users is at hand.

    Half of the documents begin as any text does, half with a user's turn if the model chats.
    Give OUT to 'fathom serve --calibration'.
    """
    settings = load_settings(
        {
            "config": config,
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "state_dir": state_dir,
            "trust_remote_code": trust_remote_code,
        }
    )
    run_offline(settings, lambda: _write(settings, out, tokens, length, seed))


def _write(settings: Settings, out: Path, tokens: int, length: int, seed: int) -> None:
    from pruning.durable import replace_file
    from server.model.inputs import StartError

    if out.is_dir() or not out.parent.is_dir():
        raise StartError(f"OUT: got {str(out)!r}, allowed: a file in a directory that there is")
    with ProgressReport(Console(stderr=True)) as progress:
        texts = asyncio.run(_written(settings, tokens, length, seed, progress))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    replace_file(out, lines.encode())
    print(f"{len(texts)} documents written to {out}")


async def _written(
    settings: Settings, tokens: int, length: int, seed: int, progress: ProgressReport
) -> list[str]:
    # Imported here to keep the other commands quick.
    from pruning.checkpoint import CheckpointError
    from pruning.transformers_model import load_tokenizer
    from server.calibration.own_text import OwnText
    from server.engine.elastic.engine import ElasticEngine
    from server.model.engine_config import elastic_config
    from server.model.inputs import refused_as
    from server.model.source import find_model

    with refused_as("model", CheckpointError):
        source = find_model(settings.model, settings.revision)
        tokenizer = load_tokenizer(source.directory, trust=settings.trust_remote_code)
    engine = ElasticEngine(elastic_config(settings, source.directory, source.name))
    with (
        progress.working("Starting the engine"),
        refused_as("engine", Exception),  # vLLM documents no base class of what it raises
    ):
        await engine.start()
    try:
        with refused_as("model"):

            def report(done: int, total: int) -> None:
                progress.advance("Writing", done, total)

            return await OwnText(engine, tokenizer).documents(tokens, length, seed, report)
    finally:
        await engine.shutdown()
