"""A small report of the demo model, whose numbers transformers gives too."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from markupsafe import escape

from server.engine.elastic.engine import ElasticEngine
from server.report.report import OUT_OF_TIME
from server.report.sections import SECTIONS
from tests.e2e.browser import browser
from tests.fathom_command import fathom, fathom_in_process
from tests.server.report.reference import Reference

CALIBRATION_TOKENS, QUALITY_TOKENS = 1024, 512
SETTINGS: tuple[str, ...] = (
    *("--dtype", "float32", "--search-tokens", "12000"),
    *("--calibration-tokens", str(CALIBRATION_TOKENS), "--quality-tokens", str(QUALITY_TOKENS)),
)


# Quantization takes minutes, and tasks and healing have to be asked for.
MEASURED = ("importance", "single-removal", "depth", "metrics", "surface", "sublayers", "recurrent")
CHOSEN = [word for name in MEASURED for word in ("--section", name)]


@dataclass(frozen=True)
class Reported:
    out: Path
    state: Path

    @cached_property
    def numbers(self) -> dict[str, Any]:
        return numbers_of(self.out)

    def again(self, out: Path | None = None, *arguments: str) -> Any:
        """Make the report once more, in this process and without an engine."""
        with patch.object(ElasticEngine, "start", side_effect=AssertionError("it measures")):
            return fathom_in_process(
                "report",
                "demo",
                out or self.out,
                *SETTINGS,
                *(arguments if "--section" in arguments else (*CHOSEN, *arguments)),
                FATHOM_STATE_DIR=str(self.state),
            )


def numbers_of(out: Path) -> dict[str, Any]:
    document = json.loads((out / "report.json").read_text("utf-8"))
    return {section["name"]: section for section in document["sections"]}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A report that had no time at first, and was then brought to its end."""
    made = Reported(tmp_path_factory.mktemp("report") / "out", tmp_path_factory.mktemp("state"))
    result = made.again(None, "--budget-seconds", "0")
    assert result.returncode == 0, result.stderr
    page = (made.out / "index.html").read_text("utf-8")
    assert page.count(f"Incomplete: {OUT_OF_TIME}") == len(
        [each for each in numbers_of(made.out).values() if each["status"] == "partial"]
    )
    assert numbers_of(made.out)["importance"]["status"] == "partial"
    result = fathom(
        "report",
        "demo",
        made.out,
        *SETTINGS,
        *CHOSEN,
        FATHOM_STATE_DIR=str(made.state),
        FATHOM_COMPILE_LAYERS="false",
    )
    assert result.returncode == 0, result.stderr
    assert str(made.out / "index.html") in result.stdout
    return made


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return Reference(demo_model)


def test_block_influence_is_that_of_transformers(reported: Reported, reference: Reference) -> None:
    numbers = reported.numbers["importance"]["numbers"]
    expected = reference.influence(CALIBRATION_TOKENS)
    assert [row["score"] for row in numbers["layers"]] == pytest.approx(expected, rel=1e-4)
    assert numbers["removal_order"] == sorted(range(16), key=lambda layer: expected[layer])


def test_perplexities_are_those_of_transformers(reported: Reported, reference: Reference) -> None:
    singles = reported.numbers["single-removal"]["numbers"]
    depths = reported.numbers["depth"]["numbers"]
    assert singles["dense_perplexity"] == pytest.approx(
        reference.perplexity([], QUALITY_TOKENS), rel=1e-4
    )
    assert [row["layer"] for row in singles["layers"]] == list(range(16))
    for layer in (0, 7, 15):
        row = singles["layers"][layer]
        assert row["perplexity"] == pytest.approx(
            reference.perplexity([layer], QUALITY_TOKENS), rel=1e-4
        )
    rows = [row for row in depths["rows"] if not row["repair"] and row["depth"] == 8]
    assert {row["metric"] for row in rows} >= {"block_influence", "greedy_kl", "angular_distance"}
    for row in rows:
        assert len(row["skipped"]) == 8
        assert row["perplexity"] == pytest.approx(
            reference.perplexity(row["skipped"], QUALITY_TOKENS), rel=1e-4
        )


def test_the_dearest_step_is_among_the_critical_layers(reported: Reported) -> None:
    numbers = reported.numbers["depth"]["numbers"]
    line = [
        row for row in numbers["rows"] if row["metric"] == "block_influence" and not row["repair"]
    ]
    before = [numbers["dense"], *line]
    costs = [
        math.log(row["perplexity"] / previous["perplexity"])
        for previous, row in zip(before, line, strict=False)
    ]
    steps = numbers["critical"]
    assert [step["cost"] for step in steps] == pytest.approx(costs)
    order = reported.numbers["importance"]["numbers"]["removal_order"]
    assert [step["layers"] for step in steps] == [[layer] for layer in order[: len(steps)]]


def test_all_sections_are_there_or_say_why_not(reported: Reported) -> None:
    page = (reported.out / "index.html").read_text("utf-8")
    assert list(reported.numbers) == [section.name for section in SECTIONS]
    for section in reported.numbers.values():
        assert f'<section id="{section["name"]}">' in page
        assert section["status"] == "done" or escape(section["reason"]) in page
    assert all(
        reported.numbers[name]["status"] == "done"
        for name in MEASURED
        if name != "recurrent"  # the model is none
    )


def test_the_page_needs_nothing_else_and_has_its_plots(reported: Reported) -> None:
    page = (reported.out / "index.html").read_text("utf-8")
    assert not re.search(r'(src|url)\s*[=(]\s*["\']?https?:|<script|<link rel="stylesheet"', page)
    plots = {path.stem for path in (reported.out / "plots").glob("*.svg")}
    assert plots == {path.stem for path in (reported.out / "plots").glob("*.png")}
    assert page.count("<svg ") == len(plots) >= 6
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_another_run_measures_nothing_again(reported: Reported, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(reported.out, out)
    (out / "report.json").unlink()
    result = reported.again(out)
    assert result.returncode == 0, result.stderr
    measured = {
        name: section["numbers"]
        for name, section in numbers_of(out).items()
        if section["status"] == "done"
    }
    assert measured == {name: reported.numbers[name]["numbers"] for name in measured}
    assert set(measured) == set(MEASURED) - {"recurrent"}


def test_what_is_damaged_is_reported_and_measured_anew(reported: Reported, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(reported.out, out)
    [kept] = (out / "measurements").glob("dense-pass-*.json")
    kept.write_text(kept.read_text("utf-8").replace("0.", "1.", 1))
    result = reported.again(out, "--budget-seconds", "0", "--section", "importance")
    assert result.returncode == 0, result.stderr
    assert "is not used and will be made anew" in result.stderr
    assert numbers_of(out)["importance"]["status"] == "partial"


def test_another_models_report_is_refused(reported: Reported, stories_model: Path) -> None:
    result = fathom_in_process("report", stories_model, reported.out)
    assert result.returncode == 2
    assert "OUT: got" in result.stderr
    assert "the report of another model" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    for out, problem in (
        (file, "this is a file"),
        (file / "out", "a directory to write"),
        (Path("/proc/report"), "a directory to write"),
        (foreign, "this one holds thesis.txt"),
    ):
        result = fathom_in_process("report", "demo", out)
        assert result.returncode == 2, out
        assert problem in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"query": "Which?"}\n')
    for arguments, problem in (
        (("--section", "figures"), "section: got 'figures', allowed: importance, "),
        (("--questions", str(questions)), "line 1 is none"),
        (("--questions", str(tmp_path / "absent")), "No such file"),
        (("--budget-seconds", "-1"), "--budget-seconds"),
        (("--dtype", "int3"), "dtype"),
    ):
        result = fathom_in_process("report", "demo", tmp_path / "out", *arguments)
        assert result.returncode == 2, arguments
        assert problem in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    result = fathom_in_process("report", tmp_path / "absent", tmp_path / "out")
    assert result.returncode == 2
    assert "model: got" in result.stderr


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    with patch("server.report.matplotlib_check.importlib.util.find_spec", return_value=None):
        result = fathom_in_process("report", "demo", tmp_path / "out")
    assert result.returncode == 1
    assert "fathom-server[bench]" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_is_as_wide_as_the_window(reported: Reported, tmp_path: Path, width: int) -> None:
    with browser(tmp_path) as page:
        page.show(width)
        page.open((reported.out / "index.html").as_uri())
        page.wait_for("document.readyState == 'complete'")
        assert page.value("document.documentElement.scrollWidth") == width
        assert page.value("document.querySelectorAll('svg').length") > 6
        # No plot is cut off or so small that it cannot be read.
        assert page.value(
            "[...document.querySelectorAll('svg')].every("
            "(svg) => svg.getBoundingClientRect().width >= Math.min(300, innerWidth - 40))"
        )
