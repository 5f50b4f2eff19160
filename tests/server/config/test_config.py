"""Settings: precedence, what is refused and how, and the table of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import (
    ConfigError,
    Settings,
    load_settings,
    settings_table,
    warn_of_old_names,
)
from server.depth.levels import LevelSpec
from server.engine.elastic.compatibility import UNTESTED_VARIABLE

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("FATHOM_"):
            monkeypatch.delenv(name)


def yaml_file(directory: Path, text: str) -> Path:
    path = directory / "fathom.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(**flags: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def test_defaults() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port) == ("127.0.0.1", 50051)
    assert (settings.metrics_host, settings.metrics_port) == ("127.0.0.1", 9090)
    assert settings.model is None
    assert settings.levels == {}


def test_flags_over_variables_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml_file(tmp_path, "port: 1001\nmetrics_port: 1002\nmax_waiting: 3\n")
    monkeypatch.setenv("FATHOM_PORT", "2001")
    monkeypatch.setenv("FATHOM_METRICS_PORT", "2002")
    settings = load_settings({"config": str(config), "port": "3001", "metrics_port": None})
    assert (settings.port, settings.metrics_port, settings.max_waiting) == (3001, 2002, 3)


def test_file_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_CONFIG", str(yaml_file(tmp_path, "max_waiting: 7\n")))
    assert load_settings({}).max_waiting == 7


def test_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_PORT", "")
    assert load_settings({}).port == 50051


def test_empty_file(tmp_path: Path) -> None:
    assert load_settings({"config": yaml_file(tmp_path, "# nothing yet\n")}).port == 50051


def test_levels_of_a_flag_replace_those_of_the_file(tmp_path: Path) -> None:
    config = yaml_file(tmp_path, "levels: {full: 16, half: 0.5}\n")
    settings = load_settings({"config": config, "levels": "quick=4"})
    assert settings.levels == {"quick": LevelSpec("quick", 4)}


def test_state_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert load_settings({}).state_dir == Path("/somewhere/cache/fathom")


def test_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/home")
    assert load_settings({"state_dir": "~/state"}).state_dir == Path("/somewhere/home/state")


LEVELS = {
    "full": LevelSpec("full", 16),
    "half": LevelSpec("half", 0.5),
    "generous": LevelSpec("generous", 16, prefill_depth=0.25),
}


@pytest.mark.parametrize(
    "text",
    [
        "full=16,half=0.5,generous=0.25/16",
        " full=16, half=0.5 ,generous=0.25/16",
        '{"full": 16, "half": 0.5, "generous": {"depth": 16, "prefill_depth": 0.25}}',
    ],
)
def test_levels_as_text(text: str) -> None:
    assert load_settings({"levels": text}).levels == LEVELS


BY_QUALITY = {
    "full": LevelSpec("full", 16),
    "fast": LevelSpec("fast", max_quality_loss=0.25),
    "prompt": LevelSpec("prompt", max_quality_loss=1.0, prompt_only=True),
    "chat": LevelSpec("chat", max_quality_loss=0.5, max_writing_loss=0.25),
    "choose": LevelSpec("choose", max_choosing_loss=0.125, prompt_only=True),
}


def test_levels_by_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        '{"full": 16, "fast": {"max_quality_loss": 0.25}, '
        '"prompt": {"max_quality_loss": 1, "prompt_only": true}, '
        '"chat": {"max_quality_loss": 0.5, "max_writing_loss": 0.25}, '
        '"choose": {"max_choosing_loss": 0.125, "prompt_only": true}}'
    )
    assert load_settings({"levels": text}).levels == BY_QUALITY
    config = yaml_file(tmp_path, f"levels: {text}\n")
    assert load_settings({"config": config}).levels == BY_QUALITY
    monkeypatch.setenv("FATHOM_LEVELS", text)
    assert load_settings({}).levels == BY_QUALITY


@pytest.mark.parametrize(
    "level",
    [
        '{"max_quality_loss": -0.1}',
        '{"max_quality_loss": NaN}',
        '{"max_quality_loss": Infinity}',
        '{"max_quality_loss": "0.1"}',
        '{"max_quality_loss": true}',
        '{"max_quality_loss": null}',
        '{"max_quality_loss": 0.1, "prompt_only": 1}',
        '{"max_quality_loss": 0.1, "depth": 8}',
        '{"prompt_only": true}',
        '{"max_writing_loss": -1}',
        '{"max_writing_loss": Infinity}',
        '{"max_choosing_loss": 1.5}',
        '{"max_choosing_loss": 0.1, "max_quality_loss": null}',
        '{"max_writing_loss": 0.1, "prefill_depth": 8}',
    ],
)
def test_levels_by_quality_that_cannot_be(level: str) -> None:
    (problem,) = problems(levels=f'{{"fast": {level}}}')
    assert problem.startswith("levels.fast: got ")
    assert problem.endswith(
        "or {max_quality_loss: ..., prompt_only: ...}, a number of 0 or more and true or false"
    )


def test_a_start_may_measure_for_ever() -> None:
    assert load_settings({"startup_seconds": "inf"}).startup_seconds == math.inf
    (problem,) = problems(startup_seconds="nan")
    assert problem == "startup_seconds: got 'nan', allowed: 0 or more"


def test_levels_in_the_file(tmp_path: Path) -> None:
    config = yaml_file(
        tmp_path,
        "levels:\n  full: 16\n  half: 0.5\n  generous: {depth: 16, prefill_depth: 0.25}\n",
    )
    settings = load_settings({"config": config})
    assert settings.levels == LEVELS
    # An integer is a number of layers, a float a prune ratio: 1 and 1.0 are not the same.
    assert [type(level.depth) for level in settings.levels.values()] == [int, float, int]


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True),
        st.tuples(
            st.integers(1, 200) | st.floats(0, 1, exclude_max=True),
            st.none() | st.integers(1, 200) | st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
    )
)
def test_levels_survive_the_trip_through_text(
    levels: dict[str, tuple[int | float, int | float | None]],
) -> None:
    text = ",".join(
        f"{name}={depth!r}" if prefill is None else f"{name}={prefill!r}/{depth!r}"
        for name, (depth, prefill) in levels.items()
    )
    expected = {name: LevelSpec(name, depth, prefill) for name, (depth, prefill) in levels.items()}
    assert load_settings({"levels": text}).levels == expected


def test_engine_args_as_json() -> None:
    assert load_settings({"engine_args": '{"block_size": 16}'}).engine_args == {"block_size": 16}


def test_settings_cannot_be_changed() -> None:
    settings = load_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]  # what is tested


def test_unknown_key_of_the_file(tmp_path: Path) -> None:
    config = yaml_file(tmp_path, "prot: 1\n")
    assert problems(config=config) == ["unknown setting 'prot'; did you mean port?"]


def test_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_MODLE", "x")
    assert problems() == ["unknown variable FATHOM_MODLE; did you mean FATHOM_MODEL?"]


def test_variable_of_the_client_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_ADDRESS", "127.0.0.1:1")
    load_settings({})


def test_variable_of_the_elastic_engine_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNTESTED_VARIABLE, "1")
    load_settings({})


def test_service_links_of_kubernetes_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("FATHOM_SERVICE_HOST", "10.0.0.1")
    found = problems()
    assert len(found) == 2
    assert all("enableServiceLinks" in problem for problem in found)


@pytest.mark.parametrize("given", ["flag", "variable", "key"])
def test_old_names_are_accepted_with_a_warning(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags: dict[str, object] = {}
    if given == "flag":
        flags["max_unread"] = "7"
    elif given == "variable":
        monkeypatch.setenv("FATHOM_MAX_UNREAD", "7")
    else:
        flags["config"] = yaml_file(tmp_path, "max_unread: 7\n")
    settings = load_settings(flags)
    assert settings.max_buffered_tokens == 7
    warn_of_old_names(settings.old_names)
    (warning,) = caplog.messages
    assert warning.startswith("the setting max_unread is called max_buffered_tokens now; ")


def test_old_names_keep_the_order_of_flags_variables_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"config": yaml_file(tmp_path, "max_unread: 1\n")}
    monkeypatch.setenv("FATHOM_MAX_BUFFERED_TOKENS", "2")
    assert load_settings(old).max_buffered_tokens == 2
    assert load_settings({**old, "max_unread": "3"}).max_buffered_tokens == 3
    new = {"config": yaml_file(tmp_path, "max_buffered_tokens: 1\nmax_unread: 4\n")}
    monkeypatch.setenv("FATHOM_MAX_UNREAD", "5")
    assert load_settings(new).max_buffered_tokens == 2
    monkeypatch.setenv("FATHOM_MAX_BUFFERED_TOKENS", "")
    assert load_settings(new).max_buffered_tokens == 5
    monkeypatch.delenv("FATHOM_MAX_UNREAD")
    assert load_settings(new).max_buffered_tokens == 1


def test_the_error_of_an_old_name_has_the_present_one() -> None:
    assert problems(max_unread="0") == ["max_buffered_tokens: got '0', allowed: 1 or more"]


def test_every_problem_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml_file(tmp_path, "prot: 1\nport: 70000\ngrace_seconds: .nan\n")
    monkeypatch.setenv("FATHOM_DTYPE", "float64")
    assert problems(config=config) == [
        "dtype: got 'float64', allowed: auto, float32, bfloat16, float16",
        "port: got 70000, allowed: 0 to 65535",
        "grace_seconds: got nan, allowed: 0 or more",
        "unknown setting 'prot'; did you mean port?",
    ]


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("port", "-1", "0 to 65535"),
        ("port", "fifty", "0 to 65535"),
        ("port", "50051.5", "0 to 65535"),
        ("host", "", "text, not empty"),
        ("plan", "/no/such/plan.json", "an existing file"),
        ("config", "/no/such/file.yaml", "an existing file"),
        ("engine", "jet", "elastic, dedicated"),
        ("quality_depths", "some", "all, levels"),
        ("calibration_tokens", "0", "64 or more"),
        ("max_context", "1", "2 or more"),
        ("max_num_seqs", "0", "1 to 65536"),
        ("grace_seconds", "-0.5", "0 or more"),
        ("grace_seconds", "inf", "0 or more"),
        ("kv_cache_gib", "0", "more than 0"),
        ("kv_cache_gib", math.nan, "more than 0"),
        ("max_message_bytes", str(2**31), "1024 to 2147483647"),
        ("trust_remote_code", "perhaps", "true, false"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("engine_args", "{", "a JSON object"),
    ],
)
def test_impossible_value(setting: str, value: object, allowed: str) -> None:
    assert problems(**{setting: value}) == [f"{setting}: got {value!r}, allowed: {allowed}"]


@pytest.mark.parametrize(
    "depth", ["0", "-1", "1.0", "nan", "-0.1", "most", "", "8/", "/8", "1/2/3"]
)
def test_impossible_depth_of_a_level(depth: str) -> None:
    (problem,) = problems(levels=f"full=16,odd={depth}")
    assert problem.startswith(f"levels.odd: got {depth!r}, allowed: a number of layers (1 or more)")


@pytest.mark.parametrize("value", ["true", "null", "[1]", "{depth: 4, width: 2}", "{}", "'x'"])
def test_impossible_level_of_the_file(tmp_path: Path, value: str) -> None:
    (problem,) = problems(config=yaml_file(tmp_path, f"levels: {{odd: {value}}}\n"))
    assert problem.startswith("levels.odd: got ")


@pytest.mark.parametrize("text", ["full", "full=16,,", "full=16,full=8"])
def test_levels_that_cannot_be_read(text: str) -> None:
    (problem,) = problems(levels=text)
    assert problem.startswith(f"levels: got {text!r}, allowed: NAME=DEPTH")


def test_default_level_is_one_of_the_levels() -> None:
    assert problems(levels="full=16,half=8", default_level="hafl") == [
        "default_level: got 'hafl', allowed: one of the levels: full, half"
    ]


def test_ports_differ() -> None:
    assert problems(port=9090) == ["metrics_port: got 9090, allowed: another port than 'port' has"]
    load_settings({"port": 0, "metrics_port": 0})  # any two free ones
    load_settings({"port": 9090, "metrics_host": "0.0.0.0"})


@pytest.mark.parametrize("text", ["- 1\n", "port\n", "a: [\n", "\x00", "port: 1\n  host: x\n"])
def test_file_that_is_no_settings(tmp_path: Path, text: str) -> None:
    (problem,) = problems(config=yaml_file(tmp_path, text))
    assert problem.startswith("config: ")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "fathom.yaml"
    path.write_bytes(b"model: \xff\n")
    (problem,) = problems(config=path)
    assert problem.startswith("config: ")


def test_long_values_are_shortened() -> None:
    (problem,) = problems(port="9" * 10_000_000)
    assert len(problem) < 200


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_table_of_the_documentation_is_current() -> None:
    assert settings_table() in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_module_prints_the_table() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "server.config"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == settings_table()
    assert printed.stderr == ""


def test_repair_needs_an_engine_that_skips_layers() -> None:
    assert load_settings({}).repair == "auto"
    assert load_settings({"engine": "dedicated"}).repair == "auto"
    assert load_settings({"repair": "closed-form"}).repair == "closed-form"
    assert problems(repair="closed-form", engine="dedicated") == [
        "repair: got 'closed-form', allowed: auto or none with the engine 'dedicated', which "
        "serves layers that are cut out"
    ]


def test_healing_needs_repair_and_weights_that_pass_gradients_on() -> None:
    settings = load_settings({"repair": "healed", "heal": "true", "heal_steps": "60"})
    assert (settings.heal, settings.heal_steps, settings.heal_seed) == (True, 60, 0)
    for repair in ("none", "closed-form"):
        assert problems(repair=repair, heal=True) == [
            "heal: got True, allowed: false unless 'repair' is healed"
        ]
    assert problems(repair="healed", heal=True, quantize="gptq-4bit") == [
        "heal: got True, allowed: false with 'quantize': quantized weights pass no gradients on"
    ]
    gated = load_settings(
        {"repair": "healed", "heal_kind": "gated-mlp", "heal_intermediate_size": "2048"}
    )
    assert (settings.heal_kind, settings.heal_intermediate_size) == ("maps", None)
    assert (gated.heal_kind, gated.heal_intermediate_size) == ("gated-mlp", 2048)
    assert problems(heal_intermediate_size=64) == [
        "heal_intermediate_size: got 64, allowed: none unless 'heal_kind' is gated-mlp: maps have "
        "no intermediate size"
    ]
    (problem,) = problems(heal_kind="mlp")
    assert problem == "heal_kind: got 'mlp', allowed: maps, gated-mlp"
    (problem,) = problems(heal_kind="gated-mlp", heal_intermediate_size=0)
    assert problem.startswith("heal_intermediate_size: got 0, allowed: ")
    (problem,) = problems(repair="healed", heal_steps=0)
    assert problem.startswith("heal_steps: got 0, allowed: ")


def test_memory_shares() -> None:
    given = {"engine": "dedicated", "memory_shares": "full=0.75,half=0.25"}
    assert load_settings(given).memory_shares == {"full": 0.75, "half": 0.25}
    as_json = load_settings({**given, "memory_shares": '{"full": 0.5}'})
    assert as_json.memory_shares == {"full": 0.5}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            {"engine": "dedicated", "memory_shares": "a=0.75,b=0.5"},
            "memory_shares: got 1.25 in all, allowed: at most 1",
        ),
        (
            {"memory_shares": "a=0.5"},
            "memory_shares: got a, allowed: none with the engine 'elastic', which has one memory "
            "for all levels",
        ),
        (
            {"engine": "dedicated", "memory_shares": "a"},
            "memory_shares: got 'a', allowed: NAME=SHARE, separated by commas, or a JSON object",
        ),
        (
            {"engine": "dedicated", "memory_shares": "a=0"},
            "memory_shares.a: got '0', allowed: names with values",
        ),
    ],
)
def test_memory_shares_that_cannot_be(flags: dict[str, object], problem: str) -> None:
    assert problems(**flags) == [problem]
