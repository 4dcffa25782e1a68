"""The forms of a router, by name."""

from __future__ import annotations

from chainwax.router.policies.adaptive import Adaptive
from chainwax.router.policies.base import Learning, Plan, Policy, PolicyMaker, Remembering, Watching
from chainwax.router.policies.direct import Direct
from chainwax.router.policies.parallel import Parallel
from chainwax.router.policies.switched import Switched
from chainwax.router.types import Form

__all__ = [
    "POLICIES",
    "Adaptive",
    "Direct",
    "Learning",
    "Parallel",
    "Plan",
    "Policy",
    "PolicyMaker",
    "Remembering",
    "Switched",
    "Watching",
]

POLICIES: dict[Form, PolicyMaker] = {
    Form.direct: Direct,
    Form.parallel: Parallel,
    Form.switched: Switched,
    Form.adaptive: Adaptive,
}
