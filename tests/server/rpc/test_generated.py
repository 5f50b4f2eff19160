"""The generated code that is checked in."""

from __future__ import annotations

from pathlib import Path

from server.rpc.generate import GENERATED, generate


def test_generated_code_is_current(tmp_path: Path) -> None:
    fresh = {path.relative_to(tmp_path): path.read_bytes() for path in generate(tmp_path)}
    kept = {
        path.relative_to(GENERATED): path.read_bytes()
        for path in GENERATED.rglob("*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert len(fresh) >= 9
    assert fresh.keys() == kept.keys()
    changed = [path for path in fresh if fresh[path] != kept[path]]
    assert not changed, "run python -m server.rpc.generate"
