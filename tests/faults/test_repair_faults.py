"""A real server whose engine is killed, and whose repair maps are damaged meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.rpc.generated.fathom.v1 import common_pb2
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import running_server, until

CLOSED_FORM = common_pb2.STAND_IN_CLOSED_FORM


@pytest.mark.parametrize("is_deleted", [False, True])
def test_an_engine_that_cannot_load_its_maps_again(tmp_path: Path, is_deleted: bool) -> None:
    with (
        running_server(tmp_path, repair="closed-form", quality_depths="levels") as server,
        server.client() as client,
    ):
        asked = greedy_request("The list of", 16, depth=8)
        assert client.generate(asked).served.stand_in == CLOSED_FORM
        before = client.get_model()
        [maps] = server.state_directory.glob("repair-*.safetensors")
        if is_deleted:
            maps.unlink()
        else:
            maps.write_bytes(maps.read_bytes()[:-1] + b"?")
        (engine,) = server.engine_processes()
        engine.kill()
        until(lambda: client.get_status().num_engine_restarts == 1, lambda: server.log)
        assert client.generate(asked).finish_info.usage.num_generated_tokens == 16
        assert "the engine was started again, but its repair maps could not be loaded" in server.log
        until(lambda: client.get_status().repair_in_force == CLOSED_FORM, lambda: server.log)
        assert client.get_status().repair_problem == ""
        answer = client.generate(asked)
        assert answer.served.stand_in == CLOSED_FORM
        after = client.get_model()
        assert after.repair.num_tokens == before.repair.num_tokens
        assert after.repair.kl_nats == pytest.approx(before.repair.kl_nats, rel=0.01)
        assert [level.HasField("quality") for level in after.levels] == [True] * 4
        assert server.scrape().value("fathom_repair_up") == 1
        assert not [line for line in server.readiness() if "repair" in line]
