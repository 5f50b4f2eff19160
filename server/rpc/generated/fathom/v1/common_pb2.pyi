from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StandIn(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAND_IN_NONE: _ClassVar[StandIn]
    STAND_IN_CLOSED_FORM: _ClassVar[StandIn]
    STAND_IN_HEALED: _ClassVar[StandIn]
STAND_IN_NONE: StandIn
STAND_IN_CLOSED_FORM: StandIn
STAND_IN_HEALED: StandIn

class Depth(_message.Message):
    __slots__ = ("layers", "prune_ratio", "level", "auto")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PRUNE_RATIO_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    layers: int
    prune_ratio: float
    level: str
    auto: Auto
    def __init__(self, layers: _Optional[int] = ..., prune_ratio: _Optional[float] = ..., level: _Optional[str] = ..., auto: _Optional[_Union[Auto, _Mapping]] = ...) -> None: ...

class Auto(_message.Message):
    __slots__ = ("max_quality_loss",)
    MAX_QUALITY_LOSS_FIELD_NUMBER: _ClassVar[int]
    max_quality_loss: float
    def __init__(self, max_quality_loss: _Optional[float] = ...) -> None: ...

class Served(_message.Message):
    __slots__ = ("prefill_layers", "decode_layers", "reason", "stand_in")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Served.Reason]
        REASON_REQUESTED: _ClassVar[Served.Reason]
        REASON_DEFAULT: _ClassVar[Served.Reason]
        REASON_AUTO: _ClassVar[Served.Reason]
        REASON_DEGRADED: _ClassVar[Served.Reason]
    REASON_UNSPECIFIED: Served.Reason
    REASON_REQUESTED: Served.Reason
    REASON_DEFAULT: Served.Reason
    REASON_AUTO: Served.Reason
    REASON_DEGRADED: Served.Reason
    PREFILL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STAND_IN_FIELD_NUMBER: _ClassVar[int]
    prefill_layers: int
    decode_layers: int
    reason: Served.Reason
    stand_in: StandIn
    def __init__(self, prefill_layers: _Optional[int] = ..., decode_layers: _Optional[int] = ..., reason: _Optional[_Union[Served.Reason, str]] = ..., stand_in: _Optional[_Union[StandIn, str]] = ...) -> None: ...

class Level(_message.Message):
    __slots__ = ("name", "prefill_layers", "decode_layers", "quality", "speed", "is_default", "stand_in", "writing", "choosing", "max_quality_loss", "max_writing_loss", "max_choosing_loss")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    STAND_IN_FIELD_NUMBER: _ClassVar[int]
    WRITING_FIELD_NUMBER: _ClassVar[int]
    CHOOSING_FIELD_NUMBER: _ClassVar[int]
    MAX_QUALITY_LOSS_FIELD_NUMBER: _ClassVar[int]
    MAX_WRITING_LOSS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOOSING_LOSS_FIELD_NUMBER: _ClassVar[int]
    name: str
    prefill_layers: int
    decode_layers: int
    quality: Quality
    speed: Speed
    is_default: bool
    stand_in: StandIn
    writing: Writing
    choosing: Choosing
    max_quality_loss: float
    max_writing_loss: float
    max_choosing_loss: float
    def __init__(self, name: _Optional[str] = ..., prefill_layers: _Optional[int] = ..., decode_layers: _Optional[int] = ..., quality: _Optional[_Union[Quality, _Mapping]] = ..., speed: _Optional[_Union[Speed, _Mapping]] = ..., is_default: _Optional[bool] = ..., stand_in: _Optional[_Union[StandIn, str]] = ..., writing: _Optional[_Union[Writing, _Mapping]] = ..., choosing: _Optional[_Union[Choosing, _Mapping]] = ..., max_quality_loss: _Optional[float] = ..., max_writing_loss: _Optional[float] = ..., max_choosing_loss: _Optional[float] = ...) -> None: ...

class Quality(_message.Message):
    __slots__ = ("perplexity", "perplexity_stderr", "agreement", "kl_nats", "num_tokens")
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_STDERR_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    KL_NATS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    perplexity: float
    perplexity_stderr: float
    agreement: float
    kl_nats: float
    num_tokens: int
    def __init__(self, perplexity: _Optional[float] = ..., perplexity_stderr: _Optional[float] = ..., agreement: _Optional[float] = ..., kl_nats: _Optional[float] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Writing(_message.Message):
    __slots__ = ("perplexity", "dense_perplexity", "ratio", "ratio_stderr", "repeated_share", "dense_repeated_share", "first_token_changed", "num_prompts", "num_tokens", "repeated_stderr")
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    DENSE_PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    RATIO_STDERR_FIELD_NUMBER: _ClassVar[int]
    REPEATED_SHARE_FIELD_NUMBER: _ClassVar[int]
    DENSE_REPEATED_SHARE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_CHANGED_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPEATED_STDERR_FIELD_NUMBER: _ClassVar[int]
    perplexity: float
    dense_perplexity: float
    ratio: float
    ratio_stderr: float
    repeated_share: float
    dense_repeated_share: float
    first_token_changed: float
    num_prompts: int
    num_tokens: int
    repeated_stderr: float
    def __init__(self, perplexity: _Optional[float] = ..., dense_perplexity: _Optional[float] = ..., ratio: _Optional[float] = ..., ratio_stderr: _Optional[float] = ..., repeated_share: _Optional[float] = ..., dense_repeated_share: _Optional[float] = ..., first_token_changed: _Optional[float] = ..., num_prompts: _Optional[int] = ..., num_tokens: _Optional[int] = ..., repeated_stderr: _Optional[float] = ...) -> None: ...

class Choosing(_message.Message):
    __slots__ = ("accuracy", "accuracy_stderr", "agreement", "agreement_stderr", "num_items", "chance")
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_STDERR_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_STDERR_FIELD_NUMBER: _ClassVar[int]
    NUM_ITEMS_FIELD_NUMBER: _ClassVar[int]
    CHANCE_FIELD_NUMBER: _ClassVar[int]
    accuracy: float
    accuracy_stderr: float
    agreement: float
    agreement_stderr: float
    num_items: int
    chance: float
    def __init__(self, accuracy: _Optional[float] = ..., accuracy_stderr: _Optional[float] = ..., agreement: _Optional[float] = ..., agreement_stderr: _Optional[float] = ..., num_items: _Optional[int] = ..., chance: _Optional[float] = ...) -> None: ...

class Speed(_message.Message):
    __slots__ = ("tokens_per_second", "speedup", "num_streams")
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    tokens_per_second: float
    speedup: float
    num_streams: int
    def __init__(self, tokens_per_second: _Optional[float] = ..., speedup: _Optional[float] = ..., num_streams: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("removal_order", "layers", "metric", "model_fingerprint", "text_fingerprint", "num_tokens", "created_at", "versions", "other_scores", "settled")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class OtherScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: LayerScores
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[LayerScores, _Mapping]] = ...) -> None: ...
    REMOVAL_ORDER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    OTHER_SCORES_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    removal_order: _containers.RepeatedScalarFieldContainer[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerImportance]
    metric: str
    model_fingerprint: str
    text_fingerprint: str
    num_tokens: int
    created_at: float
    versions: _containers.ScalarMap[str, str]
    other_scores: _containers.MessageMap[str, LayerScores]
    settled: bool
    def __init__(self, removal_order: _Optional[_Iterable[int]] = ..., layers: _Optional[_Iterable[_Union[LayerImportance, _Mapping]]] = ..., metric: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., text_fingerprint: _Optional[str] = ..., num_tokens: _Optional[int] = ..., created_at: _Optional[float] = ..., versions: _Optional[_Mapping[str, str]] = ..., other_scores: _Optional[_Mapping[str, LayerScores]] = ..., settled: _Optional[bool] = ...) -> None: ...

class LayerScores(_message.Message):
    __slots__ = ("scores",)
    SCORES_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, scores: _Optional[_Iterable[float]] = ...) -> None: ...

class LayerImportance(_message.Message):
    __slots__ = ("layer", "score", "stderr")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    layer: int
    score: float
    stderr: float
    def __init__(self, layer: _Optional[int] = ..., score: _Optional[float] = ..., stderr: _Optional[float] = ...) -> None: ...
