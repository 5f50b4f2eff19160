from server.rpc.generated.fathom.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetPlanRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPlanResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: _common_pb2.Plan
    def __init__(self, plan: _Optional[_Union[_common_pb2.Plan, _Mapping]] = ...) -> None: ...

class CalibrateRequest(_message.Message):
    __slots__ = ("texts", "max_tokens", "metric")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    max_tokens: int
    metric: str
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., max_tokens: _Optional[int] = ..., metric: _Optional[str] = ...) -> None: ...

class CalibrateResponse(_message.Message):
    __slots__ = ("progress", "plan")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    plan: _common_pb2.Plan
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., plan: _Optional[_Union[_common_pb2.Plan, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("phase", "done", "total")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    phase: str
    done: int
    total: int
    def __init__(self, phase: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class LevelSpec(_message.Message):
    __slots__ = ("name", "depth", "prefill_depth", "max_quality_loss", "prompt_only", "max_writing_loss", "max_choosing_loss")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DEPTH_FIELD_NUMBER: _ClassVar[int]
    MAX_QUALITY_LOSS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ONLY_FIELD_NUMBER: _ClassVar[int]
    MAX_WRITING_LOSS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOOSING_LOSS_FIELD_NUMBER: _ClassVar[int]
    name: str
    depth: _common_pb2.Depth
    prefill_depth: _common_pb2.Depth
    max_quality_loss: float
    prompt_only: bool
    max_writing_loss: float
    max_choosing_loss: float
    def __init__(self, name: _Optional[str] = ..., depth: _Optional[_Union[_common_pb2.Depth, _Mapping]] = ..., prefill_depth: _Optional[_Union[_common_pb2.Depth, _Mapping]] = ..., max_quality_loss: _Optional[float] = ..., prompt_only: _Optional[bool] = ..., max_writing_loss: _Optional[float] = ..., max_choosing_loss: _Optional[float] = ...) -> None: ...

class SetLevelsRequest(_message.Message):
    __slots__ = ("levels", "default_level")
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_LEVEL_FIELD_NUMBER: _ClassVar[int]
    levels: _containers.RepeatedCompositeFieldContainer[LevelSpec]
    default_level: str
    def __init__(self, levels: _Optional[_Iterable[_Union[LevelSpec, _Mapping]]] = ..., default_level: _Optional[str] = ...) -> None: ...

class SetLevelsResponse(_message.Message):
    __slots__ = ("levels",)
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    levels: _containers.RepeatedCompositeFieldContainer[_common_pb2.Level]
    def __init__(self, levels: _Optional[_Iterable[_Union[_common_pb2.Level, _Mapping]]] = ...) -> None: ...

class SetPolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class SetPolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("level", "ladder", "time_to_first_token_seconds", "inter_token_latency_seconds", "hold_seconds", "max_quality_loss", "min_agreement", "by_default", "score_ladder", "max_writing_loss", "max_repetition", "max_choosing_loss")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    LADDER_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_LATENCY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HOLD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUALITY_LOSS_FIELD_NUMBER: _ClassVar[int]
    MIN_AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    BY_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    SCORE_LADDER_FIELD_NUMBER: _ClassVar[int]
    MAX_WRITING_LOSS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPETITION_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOOSING_LOSS_FIELD_NUMBER: _ClassVar[int]
    level: str
    ladder: _containers.RepeatedScalarFieldContainer[str]
    time_to_first_token_seconds: float
    inter_token_latency_seconds: float
    hold_seconds: float
    max_quality_loss: float
    min_agreement: float
    by_default: bool
    score_ladder: _containers.RepeatedScalarFieldContainer[str]
    max_writing_loss: float
    max_repetition: float
    max_choosing_loss: float
    def __init__(self, level: _Optional[str] = ..., ladder: _Optional[_Iterable[str]] = ..., time_to_first_token_seconds: _Optional[float] = ..., inter_token_latency_seconds: _Optional[float] = ..., hold_seconds: _Optional[float] = ..., max_quality_loss: _Optional[float] = ..., min_agreement: _Optional[float] = ..., by_default: _Optional[bool] = ..., score_ladder: _Optional[_Iterable[str]] = ..., max_writing_loss: _Optional[float] = ..., max_repetition: _Optional[float] = ..., max_choosing_loss: _Optional[float] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "num_running", "num_waiting", "uptime_seconds", "startup_seconds", "num_engine_restarts", "version", "startup_phase", "auto_level", "problems", "repair_wanted", "repair_in_force", "repair_problem", "auto_score_level", "policy", "level_problems", "unmeasured")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[GetStatusResponse.State]
        STATE_STARTING: _ClassVar[GetStatusResponse.State]
        STATE_SERVING: _ClassVar[GetStatusResponse.State]
        STATE_DRAINING: _ClassVar[GetStatusResponse.State]
        STATE_ENGINE_DOWN: _ClassVar[GetStatusResponse.State]
    STATE_UNSPECIFIED: GetStatusResponse.State
    STATE_STARTING: GetStatusResponse.State
    STATE_SERVING: GetStatusResponse.State
    STATE_DRAINING: GetStatusResponse.State
    STATE_ENGINE_DOWN: GetStatusResponse.State
    class StartupSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STARTUP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STARTUP_PHASE_FIELD_NUMBER: _ClassVar[int]
    AUTO_LEVEL_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    REPAIR_WANTED_FIELD_NUMBER: _ClassVar[int]
    REPAIR_IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    REPAIR_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    AUTO_SCORE_LEVEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LEVEL_PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    UNMEASURED_FIELD_NUMBER: _ClassVar[int]
    state: GetStatusResponse.State
    num_running: int
    num_waiting: int
    uptime_seconds: float
    startup_seconds: _containers.ScalarMap[str, float]
    num_engine_restarts: int
    version: str
    startup_phase: str
    auto_level: str
    problems: _containers.RepeatedScalarFieldContainer[str]
    repair_wanted: _common_pb2.StandIn
    repair_in_force: _common_pb2.StandIn
    repair_problem: str
    auto_score_level: str
    policy: Policy
    level_problems: _containers.RepeatedScalarFieldContainer[str]
    unmeasured: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, state: _Optional[_Union[GetStatusResponse.State, str]] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., startup_seconds: _Optional[_Mapping[str, float]] = ..., num_engine_restarts: _Optional[int] = ..., version: _Optional[str] = ..., startup_phase: _Optional[str] = ..., auto_level: _Optional[str] = ..., problems: _Optional[_Iterable[str]] = ..., repair_wanted: _Optional[_Union[_common_pb2.StandIn, str]] = ..., repair_in_force: _Optional[_Union[_common_pb2.StandIn, str]] = ..., repair_problem: _Optional[str] = ..., auto_score_level: _Optional[str] = ..., policy: _Optional[_Union[Policy, _Mapping]] = ..., level_problems: _Optional[_Iterable[str]] = ..., unmeasured: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_unfinished",)
    NUM_UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    num_unfinished: int
    def __init__(self, num_unfinished: _Optional[int] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: GetStatusResponse.State
    def __init__(self, state: _Optional[_Union[GetStatusResponse.State, str]] = ...) -> None: ...
