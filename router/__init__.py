"""The router: plain asyncio that knows neither Bytewax nor Kafka.

Four layers can be pointed at: the API (:func:`get_model`), the LLM SDK (:class:`LLMInterface`), the runtime
(:class:`LLMManager`, :class:`LLMRouter` and its policies), and the abstraction layer (:class:`LLMInstance`
and the backends).
"""

from __future__ import annotations

from chainwax.router.answers import AnswerForm, Choice, FreeText, Structured
from chainwax.router.clock import SYSTEM_CLOCK, Clock, SystemClock
from chainwax.router.config import ModelConfig, NodeConfig, RunConfig, Settings, Simulation, load_settings
from chainwax.router.default import default_manager, get_model
from chainwax.router.errors import (
    AnswerInvalid,
    BackendBusy,
    BackendDown,
    BackendError,
    BackendGarbled,
    BackendRefused,
    BackendTimeout,
    BudgetSpent,
    CallError,
    Cancelled,
    ChainwaxError,
    ConfigError,
    NoModelAllowed,
    PriceUnknown,
    PromptFieldMissing,
    RecordingError,
    UnknownModelType,
    UnknownName,
)
from chainwax.router.feedback import FeedbackBus
from chainwax.router.instance import LLMInstance
from chainwax.router.interface import LLMInterface
from chainwax.router.manager import LLMManager
from chainwax.router.model_types import MODEL_TYPES, parse_model_type
from chainwax.router.prompt import Prompt
from chainwax.router.router import LLMRouter
from chainwax.router.types import (
    Arm,
    Attempt,
    CallRef,
    CallResult,
    Decision,
    Feedback,
    FeedbackKind,
    Form,
    Mode,
    NodeSpec,
    Params,
    Query,
    Rules,
    Tier,
    Usage,
)

__all__ = [
    "MODEL_TYPES",
    "SYSTEM_CLOCK",
    "AnswerForm",
    "AnswerInvalid",
    "Arm",
    "Attempt",
    "BackendBusy",
    "BackendDown",
    "BackendError",
    "BackendGarbled",
    "BackendRefused",
    "BackendTimeout",
    "BudgetSpent",
    "CallError",
    "CallRef",
    "CallResult",
    "Cancelled",
    "ChainwaxError",
    "Choice",
    "Clock",
    "ConfigError",
    "Decision",
    "Feedback",
    "FeedbackBus",
    "FeedbackKind",
    "Form",
    "FreeText",
    "LLMInstance",
    "LLMInterface",
    "LLMManager",
    "LLMRouter",
    "Mode",
    "ModelConfig",
    "NoModelAllowed",
    "NodeConfig",
    "NodeSpec",
    "Params",
    "PriceUnknown",
    "Prompt",
    "PromptFieldMissing",
    "Query",
    "RecordingError",
    "Rules",
    "RunConfig",
    "Settings",
    "Simulation",
    "Structured",
    "SystemClock",
    "Tier",
    "UnknownModelType",
    "UnknownName",
    "Usage",
    "default_manager",
    "get_model",
    "load_settings",
    "parse_model_type",
]
