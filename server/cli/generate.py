"""``fathom generate``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from server.cli.connection import Connection, connected, with_connection
from server.cli.stand_in import stand_in_name
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2

_UINT32 = {"min": 0, "max": 2**32 - 1}


@with_connection
def generate(
    connection: Connection,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    depth: Annotated[int | None, typer.Option(help="Layers that run.", **_UINT32)] = None,
    prune_ratio: Annotated[
        float | None, typer.Option(help="Share of the layers that is left out.")
    ] = None,
    level: Annotated[str | None, typer.Option(help="Level of the server to run at.")] = None,
    prefill_depth: Annotated[
        int | None,
        typer.Option(help="Layers that run for the prompt, if not as for --depth.", **_UINT32),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", **_UINT32)] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of the probability to choose from.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes random choices repeatable.", min=-(2**63), max=2**63 - 1),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the generation; may be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")
    ] = False,
    num_completions: Annotated[
        int,
        typer.Option(
            "--num-completions",
            "-n",
            help="Completions of the prompt, which are printed one after the other.",
            min=1,
            max=2**32 - 1,
        ),
    ] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message of a chat.")
    ] = False,
) -> None:
    """Generate text at a depth and print it as it comes; a summary goes to stderr."""
    given = {"--depth": depth, "--prune-ratio": prune_ratio, "--level": level}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise typer.BadParameter(f"{' and '.join(chosen)} exclude each other")
    text = sys.stdin.read() if prompt == "-" else prompt
    for value in (text, level or "", *(stop or [])):
        if not value.isprintable() and any(
            "\ud800" <= character <= "\udfff" for character in value
        ):
            raise typer.BadParameter(f"{value!r} is not UTF-8")
    request = inference_pb2.GenerateRequest(
        prefill_depth=None if prefill_depth is None else common_pb2.Depth(layers=prefill_depth),
        sampling=inference_pb2.SamplingParams(temperature=temperature, top_p=top_p, seed=seed),
        stop=inference_pb2.StopConditions(
            max_tokens=max_tokens, stop=stop or [], ignore_eos=ignore_eos
        ),
        n=num_completions,
    )
    if chosen:
        request.depth.CopyFrom(common_pb2.Depth(layers=depth, prune_ratio=prune_ratio, level=level))
    if chat:
        request.chat.messages.add(role="user", content=text)
    else:
        request.prompt = text
    with connected(connection) as client:
        printed = _Printed()
        for response in client.generate_stream(request):
            printed.take(response)


class _Printed:
    """Completions on stdout, one after the other; what comes out of turn waits."""

    def __init__(self) -> None:
        self._present = 0
        self._waiting: dict[int, list[inference_pb2.GenerateStreamResponse]] = {}

    def take(self, response: inference_pb2.GenerateStreamResponse) -> None:
        self._waiting.setdefault(response.index, []).append(response)
        while self._present in self._waiting:
            for each in self._waiting.pop(self._present):
                self._print(each)

    def _print(self, response: inference_pb2.GenerateStreamResponse) -> None:
        match response.WhichOneof("event"):
            case "delta":
                sys.stdout.write(response.delta.text)
                sys.stdout.flush()
            case "finish_info":
                print(flush=True)
                print(_summary(response.finish_info), file=sys.stderr)
                self._present += 1


def _summary(info: inference_pb2.FinishInfo) -> str:
    served, usage, seconds = info.served, info.usage, info.timings.total
    depth = str(served.decode_layers)
    if served.prefill_layers != served.decode_layers:
        depth = f"{served.decode_layers} (prompt: {served.prefill_layers})"
    if served.stand_in != common_pb2.STAND_IN_NONE:
        depth += f" with {stand_in_name(served.stand_in)} repair"
    why = common_pb2.Served.Reason.Name(served.reason).removeprefix("REASON_").lower()
    end = inference_pb2.FinishInfo.Reason.Name(info.reason).removeprefix("REASON_").lower()
    rate = usage.num_generated_tokens / seconds if seconds else 0.0
    return (
        f"[depth {depth}, {why}; {usage.num_generated_tokens} tokens in {seconds:.2f} s, "
        f"{rate:.1f} tokens/s; end: {end}]"
    )
