"""Model cards: what is taken from the card of the source, whatever state that is in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pruning.surgery.model_card import front_matter, inherited_metadata, printable
from tests.pruning.surgery.exporting import export

FRONT = "---\n{}\n---\nText"


@pytest.mark.parametrize(
    ("content", "inherited"),
    [
        (
            FRONT.format("license: mit\nlanguage: [en, de]"),
            {"license": "mit", "language": ["en", "de"]},
        ),
        (FRONT.format("license: [mit, other]"), {"license": ["mit", "other"]}),
        (FRONT.format("license: null"), {}),
        ("", {}),
        ("no front matter", {}),
        ("---\n---\n", {}),
        ("---\nlicense: mit", {}),
    ],
)
def test_licence_and_languages_are_inherited(
    tmp_path: Path, content: str, inherited: dict[str, object]
) -> None:
    card = tmp_path / "README.md"
    card.write_text(content)
    assert inherited_metadata(card) == inherited


Damage = Callable[[Path], object]
DAMAGES: dict[str, Damage] = {
    "broken YAML": lambda path: path.write_text(FRONT.format("license: [mit\n  :")),
    "a list": lambda path: path.write_text(FRONT.format("- license: mit")),
    "text": lambda path: path.write_text(FRONT.format("license")),
    "tabs": lambda path: path.write_text(FRONT.format("\tlicense: mit")),
    "an object": lambda path: path.write_text(FRONT.format("license: {name: mit}")),
    "a number": lambda path: path.write_text(FRONT.format("license: 3\nlanguage: [1]")),
    "a date": lambda path: path.write_text(FRONT.format("license: 2024-01-01")),
    "a tag": lambda path: path.write_text(FRONT.format("license: !!python/object:os.system x")),
    "an endless alias": lambda path: path.write_text(FRONT.format("license: &a [*a]")),
    "no UTF-8": lambda path: path.write_bytes(b"---\nlicense: \xff\xfe\n---\n"),
    "NUL": lambda path: path.write_bytes(bytes(100)),
    "results that are none": lambda path: path.write_text(FRONT.format("model-index: 7")),
    "evaluations": lambda path: path.write_text(
        FRONT.format("eval_results: 1\nmodel-index: [{name: 1}]")
    ),
    "a directory": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("absent"),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_no_card_keeps_a_model_from_being_written(
    model: Path, tmp_path: Path, damage: Damage
) -> None:
    (model / "README.md").unlink()
    damage(model / "README.md")
    out = export(model, tmp_path / "out", (1,))
    written = (out / "README.md").read_text("utf-8")
    assert yaml.safe_load(written.split("---\n")[1])["base_model"] == "model"


@given(st.text(st.characters(codec=None)))
def test_any_name_makes_a_card(name: str) -> None:
    written = front_matter(base_model=printable(name), tags=["a"])
    assert yaml.safe_load(written.strip("-\n"))["base_model"] == printable(name)
    assert "\n" not in printable(name)
    printable(name).encode()


def test_a_name_that_is_no_text(model: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"mo\xff del")
    out = export(model.rename(tmp_path / name), tmp_path / "out", (1,))
    assert "# mo? del, 3 of 4 layers" in (out / "README.md").read_text("utf-8")
