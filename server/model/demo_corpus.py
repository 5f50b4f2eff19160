"""The text of the demo model: the documentation that every Python installation carries.

Documents are the help topics of :mod:`pydoc_data.topics` and, one document for each module,
the signatures and docstrings of the standard library. Which part a document belongs to
depends on a digest of its name alone, so the parts stay apart across Python versions, and a
part is read without parsing the modules of the others.
"""

from __future__ import annotations

import ast
import enum
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

# Tests are no documentation, and site-packages holds no part of the standard library.
_EXCLUDED_DIRECTORIES = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__"})
_NUM_BUCKETS = 24
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Part(enum.Enum):
    """A part of the corpus. The demo model never saw a document of ``HELD_OUT``."""

    TRAINING = "training"
    CALIBRATION = "calibration"
    HELD_OUT = "held-out"


def part_of(name: str) -> Part:
    """Return the part that the document of this name belongs to."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % _NUM_BUCKETS
    return {0: Part.HELD_OUT, 1: Part.CALIBRATION}.get(bucket, Part.TRAINING)


def documents(parts: Iterable[Part]) -> Iterator[str]:
    """Yield the documents of ``parts`` in a fixed order.

    Documents of compiled modules belong to ``TRAINING`` whatever their name, since reading
    them imports the module.
    """
    wanted = frozenset(parts)
    for name, text in _topics():
        if part_of(name) in wanted:
            yield text
    for name, path in _source_modules():
        if part_of(name) in wanted:
            text = _module_text(path.read_text(encoding="utf-8", errors="replace"))
            if text:
                yield text
    if Part.TRAINING in wanted:
        yield from _compiled_modules()


def _topics() -> Iterator[tuple[str, str]]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from sorted(topics.items())


def _source_modules() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED_DIRECTORIES.isdisjoint(relative.parts) and relative.parts[0] != "pydoc_data":
            yield relative.as_posix(), path


def _module_text(source: str) -> str:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates that only look like modules
        return ""
    return "\n\n".join(_documented(tree, prefix=""))


def _documented(node: _Documented, prefix: str) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"{_heading(node, prefix)}{docstring.strip()}"
    scope = "" if isinstance(node, ast.Module) else f"{prefix}{node.name}."
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, scope)


def _heading(node: _Documented, prefix: str) -> str:
    match node:
        case ast.Module():
            return ""
        case ast.ClassDef():
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            return f"class {prefix}{node.name}({bases})\n\n"
        case _:
            return f"{prefix}{node.name}({ast.unparse(node.args)})\n\n"


def _compiled_modules() -> Iterator[str]:
    for name in sorted(sys.stdlib_module_names):
        spec = importlib.util.find_spec(name) if name != "__main__" else None
        if spec is None or (spec.origin or "").endswith((".py", "frozen")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = importlib.import_module(name)
        except ImportError:  # built without an optional library, or for another system
            continue
        text = "\n\n".join(_compiled_docstrings(module))
        if text:
            yield text


def _compiled_docstrings(module: ModuleType) -> Iterator[str]:
    seen: set[str] = set()

    def entry(name: str, item: object) -> Iterator[str]:
        docstring = getattr(item, "__doc__", None)
        if isinstance(docstring, str) and docstring not in seen:
            seen.add(docstring)
            signature = getattr(item, "__text_signature__", None) or ""
            yield f"{name}{signature}\n\n{inspect.cleandoc(docstring)}"

    for name, item in sorted(vars(module).items()):
        yield from entry(name, item)
        if inspect.isclass(item):
            for attribute, member in sorted(vars(item).items()):
                yield from entry(f"{name}.{attribute}", member)
