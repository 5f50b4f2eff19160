"""The service ``fathom.v1.Control``."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import Any

import grpc

from server.calibration.calibrator import Progress
from server.calls.caller import current_caller
from server.rpc import replies, requests
from server.rpc.generated.fathom.v1 import control_pb2 as pb
from server.rpc.generated.fathom.v1 import control_pb2_grpc
from server.serving.service import Service

logger = logging.getLogger(__name__)


class ControlServicer(control_pb2_grpc.ControlServicer):
    """Operation of the server; exceptions are left to the interceptor."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def GetPlan(
        self, request: pb.GetPlanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetPlanResponse:
        return pb.GetPlanResponse(plan=replies.plan_message(self._service.policy.plan))

    async def Calibrate(
        self, request: pb.CalibrateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        max_tokens = request.max_tokens if request.HasField("max_tokens") else None
        metric = request.metric if request.HasField("metric") else None
        with self._service.updating() as updates:
            async with aclosing(updates.calibrate(request.texts, max_tokens, metric)) as events:
                async for event in events:
                    response = pb.CalibrateResponse()
                    if isinstance(event, Progress):
                        response.progress.CopyFrom(replies.progress_message(event))
                    else:
                        response.plan.CopyFrom(replies.plan_message(event))
                    await context.write(response)

    async def SetLevels(
        self, request: pb.SetLevelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetLevelsResponse:
        specs = requests.level_specs(request)
        default_level = request.default_level if request.HasField("default_level") else None
        with self._service.updating() as updates:
            policy = await updates.set_levels(specs, default_level)
        levels = ", ".join(map(str, policy.levels))
        _log_until_the_end(f"levels: {levels}; the default is {policy.default_level}")
        return pb.SetLevelsResponse(
            levels=[replies.level_message(level, policy) for level in policy.levels]
        )

    async def SetPolicy(
        self, request: pb.SetPolicyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetPolicyResponse:
        service = self._service
        level, rules = requests.auto_rules(request.policy, service.auto_rules)
        service.set_auto_rules(rules, level)
        _log_until_the_end(f"automatic depth: {service.policy.auto_level} without load, {rules}")
        return pb.SetPolicyResponse(
            policy=replies.policy_message(service.policy, service.auto_rules)
        )

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        service = self._service
        policy = None
        if service.is_open:
            policy = replies.policy_message(service.policy, service.auto_rules)
        return replies.status_message(service.status(), policy)

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DrainResponse:
        num_unfinished = await self._service.drain(requests.grace_seconds(request))
        return pb.DrainResponse(num_unfinished=num_unfinished)

    async def Resume(
        self, request: pb.ResumeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ResumeResponse:
        state = self._service.resume()
        logger.info("resumed by %s", current_caller().client or "a client")
        return pb.ResumeResponse(state=replies.state_message(state))


def _log_until_the_end(what: str) -> None:
    """Log a change that the next start will undo, because it is not in the settings."""
    client = current_caller().client
    logger.info("%s; set by %s, until this server ends", what, client or "a client")
