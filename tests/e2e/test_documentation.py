"""What the documents say is tried out.

Commands are the lines of indented blocks and of fences marked ``sh``, and in fences marked
``console`` the lines that begin with ``$``. Those that talk to a server are run against a live
one; what they printed goes into fences marked ``text``. Fences marked ``python`` are run as well,
and those marked ``yaml`` are files of settings.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main
from markdown_it import MarkdownIt
from markdown_it.token import Token

from bench.cli import app as bench_app
from server.cli import app
from server.config import (
    CLIENT_VARIABLES,
    ENV_PREFIX,
    OTHER_VARIABLES,
    Settings,
    load_settings,
)
from tests.e2e.running_server import PATIENCE, RunningServer
from tests.fathom_command import FATHOM, environment

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    "deploy/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
# By the words that follow ``fathom``.
FATHOM_COMMANDS = {
    **typer.main.get_group(app).commands,
    **{f"bench {name}": each for name, each in typer.main.get_group(bench_app).commands.items()},
}
# Commands of a client are run, those that begin something lasting are only checked.
CLIENT_COMMANDS = {"generate", "model", "calibrate", "health"}
OTHER_PROGRAMS = {"curl", "grpcurl"}
SHELLS = {"sh", "bash", "shell"}
SUFFIXES = {".py", ".md", ".toml", ".proto", ".yaml", ".yml", ".json", ".jinja", ".mjs"}
# Stand for something of the reader's own.
PLACEHOLDER = re.compile(r"path/to/|organization/|localhost/|^NAME\.|^[A-Z_/=]+$")
# Made by what the documents tell of.
PRODUCTS = (".venv", "bench-results/", "report/")


def parsed(document: str) -> list[Token]:
    text = (ROOT / document).read_text("utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def inline_codes(document: str) -> Iterator[str]:
    for token in parsed(document):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def links(document: str) -> Iterator[str]:
    for token in parsed(document):
        for child in token.children or ():
            for attribute in ("href", "src"):
                if attribute in child.attrs:
                    yield str(child.attrs[attribute])


def fences(language: str) -> list[tuple[str, str]]:
    """Return the documents' blocks of that language, each with where it begins."""
    return [
        (f"{document}:{(token.map or [0])[0] + 1}", token.content)
        for document in DOCUMENTS
        for token in parsed(document)
        if token.type == "fence" and token.info.strip() == language
    ]


def command_lines() -> list[tuple[str, str]]:
    """Return the commands, each with the block that it is in."""
    commands = []
    for document in DOCUMENTS:
        for token in parsed(document):
            prompt = ""
            if token.type == "fence" and token.info.strip() == "console":
                prompt = "$ "
            elif not (
                token.type == "code_block"
                or (token.type == "fence" and token.info.strip() in SHELLS)
            ):
                continue
            place = f"{document}:{(token.map or [0])[0] + 1}"
            for line in token.content.replace("\\\n", " ").splitlines():
                if line.strip() and line.startswith(prompt) and not line.startswith("#"):
                    commands.append((place, line.removeprefix(prompt).strip()))
    return commands


def at(server: RunningServer, text: str) -> str:
    """Return the text with the default addresses turned into those of the server."""
    for host in ("127.0.0.1", "localhost"):
        text = text.replace(f"{host}:50051", server.address)
        text = text.replace(f"{host}:9090", f"127.0.0.1:{server.metrics_port}")
        text = text.replace(f"{host}:8000", f"127.0.0.1:{server.http_port}")
    return text


def run(command: list[str], server: RunningServer, directory: Path) -> str:
    result = subprocess.run(
        command,
        cwd=directory,
        env=environment(FATHOM_ADDRESS=server.address),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


COMMANDS = command_lines()
PYTHON = fences("python")
YAML = fences("yaml")


@pytest.mark.parametrize(
    ("place", "line"), COMMANDS, ids=[f"{place} {line}" for place, line in COMMANDS]
)
def test_commands(place: str, line: str, demo_server: RunningServer, tmp_path: Path) -> None:
    for part in line.split(" && "):
        check_command(shlex.split(at(demo_server, part)), demo_server, tmp_path)


def check_command(words: list[str], server: RunningServer, directory: Path) -> None:
    match words:
        case ["fathom", name, *_] if name in CLIENT_COMMANDS:
            assert run([str(FATHOM), *words[1:]], server, directory).strip()
        case ["fathom", "bench", name, *arguments]:
            FATHOM_COMMANDS[f"bench {name}"].make_context(name, arguments)
        case ["fathom", name, *arguments]:
            context = FATHOM_COMMANDS[name].make_context(name, arguments)
            if name == "serve":
                # Whether the files are there depends on the reader.
                load_settings({**context.params, "config": None, "plan": None})
        case ["kubectl", "apply", "-k", overlay]:
            assert (ROOT / overlay / "kustomization.yaml").is_file()
        case ["docker", "compose", "-f", file, *_]:
            assert (ROOT / file).is_file()
        case ["kubectl", "-n", "fathom", *_]:
            pass
        case ["make", *arguments]:
            targets = [word for word in arguments if "=" not in word]
            assert set(targets) <= make_targets()
        case [("source" | "."), ".venv/bin/activate"]:
            pass
        case [program, *_] if program in OTHER_PROGRAMS:
            if shutil.which(program) is None:
                pytest.skip(f"{program} is absent")
            assert run(words, server, ROOT).strip()
        case _:
            pytest.fail(f"no test knows what to do with {shlex.join(words)!r}")


@pytest.mark.parametrize("code", [code for _, code in PYTHON], ids=[place for place, _ in PYTHON])
def test_python(code: str, demo_server: RunningServer) -> None:
    assert run([sys.executable, "-c", at(demo_server, code)], demo_server, ROOT).strip()


@pytest.mark.parametrize("text", [text for _, text in YAML], ids=[place for place, _ in YAML])
def test_files_of_settings(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    settings = load_settings({"config": str(path)})
    assert settings.model_fields_set > {"config"}


def test_the_readme_has_commands_of_every_kind() -> None:
    """Otherwise the tests above might find nothing, and pass."""
    lines = [line for place, line in COMMANDS if place.startswith("README.md")]
    for beginning in ("make serve", "make test", "fathom generate ", "fathom model"):
        assert any(line.startswith(beginning) for line in lines), beginning
    assert any("--depth" in line for line in lines)
    assert PYTHON
    assert YAML


def test_every_document_is_linked_from_the_readme() -> None:
    assert set(DOCUMENTS) - {"README.md"} <= set(links("README.md"))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_sections_that_are_linked_exist(document: str) -> None:
    here = ROOT / document
    missing = []
    for link in links(document):
        path, _, section = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (here.parent / path).resolve() if path else here
        if not target.exists() or (section and section not in sections(target)):
            missing.append(link)
    assert not missing


def sections(document: Path) -> set[str]:
    """Return the names by which links know the headings of the document."""
    tokens = parsed(document.relative_to(ROOT).as_posix())
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_mentioned_exist(document: str) -> None:
    missing = []
    for code in inline_codes(document):
        for word in code.split():
            is_path = "/" in word.strip("/") or word.endswith("/") or Path(word).suffix in SUFFIXES
            if (
                is_path
                and re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", word)
                and not PLACEHOLDER.search(word)
                and not word.startswith(PRODUCTS)
                and not any(ROOT.glob(word.rstrip("/")))
                and not any(
                    inside(place, word) for place in ("server", "pruning", "deploy", "tests")
                )
            ):
                missing.append(word)
    assert not missing


def inside(place: str, word: str) -> bool:
    """A name alone is one of a folder that the text has just named."""
    return "/" not in word.rstrip("/") and any((ROOT / place).rglob(word.rstrip("/")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_targets_modules_and_variables_that_are_mentioned_exist(document: str) -> None:
    variables = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    missing = []
    for code in inline_codes(document):
        words = code.split()
        match words:
            case ["make", target, *_] if target not in make_targets():
                missing.append(code)
            case ["make", ("serve" | "bench") as name, *_] if not is_known(
                [name, *handed_on(code)]
            ):
                missing.append(code)
            case ["python", "-m", module, *_] if importlib.util.find_spec(module) is None:
                missing.append(code)
            case ["fathom", *rest] if rest and not is_known(rest):
                missing.append(code)
            case [first, *_] if first.startswith("--"):
                if not any(given_flags(words) <= known_flags(name) for name in FATHOM_COMMANDS):
                    missing.append(code)
        for variable in re.findall(rf"\b{ENV_PREFIX}[A-Z_]+\b", code):
            if variable not in variables | CLIENT_VARIABLES | OTHER_VARIABLES:
                missing.append(variable)
    assert not missing


def handed_on(code: str) -> list[str]:
    """Return the arguments that make is told to hand on to the command."""
    given = re.search(r'ARGS="(.*)"', code)
    return given[1].split() if given else []


def is_known(words: list[str]) -> bool:
    """Whether ``fathom`` has that command, and the command those flags."""
    match words:
        case ["bench", benchmark, *_]:
            name = f"bench {benchmark}"
        case _:
            name = words[0]
    return name in FATHOM_COMMANDS and given_flags(words) <= known_flags(name)


def given_flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def known_flags(name: str) -> set[str]:
    return {
        flag
        for parameter in FATHOM_COMMANDS[name].params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("bench peers --rounds 3 --no-compile-layers", True),
        ("bench peers --level fast", False),
        ("bench nothing", False),
        ("generate --level fast", True),
        ("generate --rounds 3", False),
        ("bench", True),
    ],
)
def test_flags_are_compared_with_those_of_their_command(words: str, known: bool) -> None:
    assert is_known(words.split()) is known


def test_metrics_that_are_mentioned_exist(demo_server: RunningServer) -> None:
    families = demo_server.scrape().families
    mentioned = {
        name
        for document in DOCUMENTS
        for code in inline_codes(document)
        for name in re.findall(r"\b(?:fathom_|vllm:)[a-z_]+", code)
    }
    assert mentioned, "the documents tell of no metric"
    assert mentioned <= families
