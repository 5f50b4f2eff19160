"""Settings that are read again: what is applied, what is reported, what is left alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server.config import load_settings
from server.reload import Reload, access_files
from server.rpc.client_tls import ClientTls
from server.rpc.generated.fathom.v1 import control_pb2
from tests.server.access.authority import Authority
from tests.server.rpc.credentials import ALICE, CLIENTS, NOBODY, code_of, generate, until, written
from tests.server.rpc.secured import Secured, secured

LEVELS = "levels: {dense: 8, fast: 4, generative: {depth: 8, prefill_depth: 4}}\n"


@dataclass
class Reloadable:
    """A server, and the file of its settings."""

    server: Secured
    reload: Reload
    path: Path
    log_levels: list[str] = field(default_factory=list)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        policy = self.server.service.policy
        return {level.name: (level.prefill_layers, level.decode_layers) for level in policy.levels}

    async def with_settings(self, text: str) -> None:
        self.path.write_text(text)
        await self.reload.run()


@asynccontextmanager
async def reloadable(directory: Path, text: str) -> AsyncIterator[Reloadable]:
    path = directory / "fathom.yaml"
    path.write_text(text)
    flags = {"config": str(path), "port": "0"}
    settings = load_settings(flags)
    log_levels: list[str] = []
    async with secured(access_files(settings)) as server:
        reload = Reload(
            settings,
            lambda: load_settings(flags),
            access=server.access,
            service=server.service,
            set_log_level=log_levels.append,
        )
        yield Reloadable(server, reload, path, log_levels)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "server.reload")
    return caplog


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == "server.reload"]
    caplog.clear()
    return found


async def test_what_is_applied(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    clients = written(tmp_path / "clients", CLIENTS)
    base = f"clients: {clients}\n"
    async with reloadable(tmp_path, base + LEVELS) as each:
        server = each.server
        await each.with_settings(base + LEVELS)
        assert reports(log) == ["settings read again; changed: nothing"]

        written(clients, f"bob inference {NOBODY}\n")
        await each.with_settings(
            f"{base}levels: {{dense: 8, thin: 0.75}}\ndefault_level: thin\nlog_level: debug\n"
        )
        assert reports(log) == [
            "settings read again; changed: default_level, levels, log_level",
        ]
        assert each.levels == {"dense": (8, 8), "thin": (2, 2)}
        assert server.service.policy.default_level == "thin"
        assert each.log_levels[-1] == "debug"
        assert await server.use(generate, token=NOBODY)
        assert (await server.use(code_of(generate), token=ALICE))[0] == "UNAUTHENTICATED"

        # No levels are the default ones.
        await each.with_settings(base)
        assert each.levels == {"dense": (8, 8), "fast": (6, 6), "turbo": (2, 2)}
        assert server.service.policy.default_level == "dense"


async def test_what_takes_a_restart(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    async with reloadable(tmp_path, LEVELS) as each:
        for _ in range(2):
            await each.with_settings(f"{LEVELS}max_context: 1024\nhost: 127.0.0.2\n")
            assert reports(log) == [
                "settings read again; changed: nothing",
                "settings that take a restart to change: host, max_context",
            ]
        await each.with_settings(LEVELS)
        assert reports(log) == ["settings read again; changed: nothing"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("levels: {dense: 9}\n", "levels.dense.depth: got 9, allowed: 1 to 8"),
        ("levles: {dense: 8}\n", "unknown setting 'levles'; did you mean levels?"),
        ("levels: {dense: 8\n", "config: no valid YAML"),
        ("default_level: fsat\n", "default_level: got 'fsat', allowed: one of dense"),
        ("clients: /no/such/file\n", "clients: got '/no/such/file', allowed: an existing file"),
        ("tls_key: fathom.yaml\n", "tls_key: got "),
    ],
)
async def test_what_is_broken_changes_nothing(
    tmp_path: Path,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    async with reloadable(tmp_path, LEVELS) as each:
        policy = each.server.service.policy
        await each.with_settings(f"log_level: debug\n{text}")
        (report,) = reports(log)
        assert report.startswith(problem)
        assert report.endswith("; the settings have not been changed")
        assert each.server.service.policy is policy
        assert each.log_levels == []


async def test_broken_files_change_nothing(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    authority = Authority()
    pair = authority.issue("server").write(tmp_path, "server")
    other = authority.issue("other").write(tmp_path, "other")
    clients = written(tmp_path / "clients", CLIENTS)
    others = written(tmp_path / "others", f"bob inference {NOBODY}\n")

    def settings(certificate: Path, key: Path, clients: Path) -> str:
        return f"{LEVELS}tls_certificate: {certificate}\ntls_key: {key}\nclients: {clients}\n"

    async with reloadable(tmp_path, settings(*pair, clients)) as each:
        tls = ClientTls(ca=authority.pem, server_name="server")
        await each.with_settings(settings(pair[0], other[1], others))
        assert reports(log)[0].startswith("tls_key: got ")
        assert await each.server.use(generate, tls=tls, token=ALICE)
        await each.with_settings(settings(*other, others))
        assert reports(log) == ["settings read again; changed: clients, tls_certificate, tls_key"]
        tls = ClientTls(ca=authority.pem, server_name="other")
        assert await each.server.use(generate, tls=tls, token=NOBODY)


async def test_levels_that_a_client_has_set_stay(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    async with reloadable(tmp_path, LEVELS) as each:
        spec = control_pb2.LevelSpec(name="thin")
        spec.depth.layers = 2
        await each.server.use(
            lambda client: client.set_levels(control_pb2.SetLevelsRequest(levels=[spec]))
        )
        await each.with_settings(f"{LEVELS}log_level: debug\n")
        assert each.levels == {"thin": (2, 2)}
        await each.with_settings("levels: {dense: 8}\nlog_level: debug\n")
        assert each.levels == {"dense": (8, 8)}


async def test_levels_that_cannot_be_set_now_are_tried_again(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    changed = "levels: {dense: 8, thin: 2}\nlog_level: debug\n"
    async with reloadable(tmp_path, LEVELS) as each:
        each.server.engine.gate.clear()
        calibration = each.server.client.control.Calibrate(control_pb2.CalibrateRequest())
        reading = calibration.read()
        running = asyncio.ensure_future(reading)
        while each.server.engine.num_steps < 1:
            await asyncio.sleep(0.01)
        await each.with_settings(changed)
        assert reports(log) == [
            "another Calibrate or SetLevels is running; the levels have not been changed",
            "settings read again; changed: log_level",
        ]
        calibration.cancel()
        await asyncio.gather(running, return_exceptions=True)
        each.server.engine.gate.set()
        while "changed: levels" not in "".join(reports(log)):
            await asyncio.sleep(0.01)
            await each.with_settings(changed)
        assert each.levels == {"dense": (8, 8), "thin": (2, 2)}


async def test_the_rules_of_depth_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reloadable(tmp_path, LEVELS) as running:
        await running.with_settings(f"{LEVELS}auto_levels: [fast]\nauto_hold_seconds: 5\n")
        service = running.server.service
        assert service.auto_rules.hold_seconds == 5
        assert service.policy.auto_level == "fast"
        await running.with_settings(f"{LEVELS}auto_levels: [slow]\n")
        assert "auto_levels: got 'slow', allowed: some of dense, fast, generative" in caplog.text
        assert service.policy.auto_level == "fast"


async def test_settings_that_are_half_written_are_read_until_they_are_whole(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    asked = asyncio.Event()
    async with reloadable(tmp_path, LEVELS) as each:
        following = asyncio.create_task(each.reload.follow(asked))
        each.path.write_text("levels: {dense: 8, th")
        asked.set()
        while not log.messages:
            await asyncio.sleep(0.01)
        await until(lambda: each.reload.problem.startswith("config: no valid YAML"))
        each.path.write_text("levels: {dense: 8, thin: 2}\n")
        while "settings read again; changed: levels" not in log.messages:
            await asyncio.sleep(0.01)
        first, *others = reports(log)
        assert first.startswith("config: no valid YAML")
        assert others == ["settings read again; changed: levels"]
        assert each.levels == {"dense": (8, 8), "thin": (2, 2)}
        await until(lambda: not each.reload.problem)
        following.cancel()


async def test_a_problem_is_told_once_for_each_time_it_is_asked(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    async with reloadable(tmp_path, LEVELS) as each:
        each.path.write_text("prot: 1\n")
        problem = await each.reload.run()
        assert problem == "unknown setting 'prot'; did you mean port?"
        assert await each.reload.run(known_problem=problem) == problem
        assert len(reports(log)) == 1
        assert await each.reload.run() == problem
        assert len(reports(log)) == 1


async def test_a_file_that_stays_and_breaks_does_not_hold_back_the_settings(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    clients = written(tmp_path / "clients", CLIENTS)
    base = f"clients: {clients}\n"
    async with reloadable(tmp_path, base + LEVELS) as each:
        written(clients, "alice infer")
        await each.with_settings(f"{base}levels: {{dense: 8, thin: 2}}\n")
        assert reports(log) == ["settings read again; changed: levels"]
        assert each.levels == {"dense": (8, 8), "thin": (2, 2)}
        await until(lambda: bool(each.server.access.problems))
        assert each.server.access.problems[0].startswith(f"clients: {clients}, line 1: got ")
        assert await each.server.use(generate, token=ALICE)
