"""Options that the commands which work on a model without a server have in common."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str | None, typer.Option(help="YAML file with settings.")]
Dtype = Annotated[str | None, typer.Option(help="As for 'fathom serve'.")]
Model = Annotated[str | None, typer.Option(help="As for 'fathom serve'; none: the demo model.")]
ModelArgument = Annotated[
    str, typer.Argument(help="As for 'fathom serve': a directory, demo, smollm2 or a Hub id.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Let code that comes with the model run."),
]
