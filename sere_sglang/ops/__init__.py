"""``reroute()`` and ``apply_rule()``. Nothing here imports SGLang.

Here: their arguments, what they act on and how an implementation is chosen. The implementations
are folders, ``reference``, ``cpu``, ``triton`` and ``cuda``, each with a ``reroute.py`` and a
``rules.py``. A new one is two modules as `dispatch` and `rules` describe them, plus a line in the
registry of each; the tests of ``tests/ops`` then run over it wherever it is available.
"""

from __future__ import annotations

from sere_sglang.ops.control import (
    CONTROL_WORDS,
    MAX_CLASSES,
    Control,
    decode_control,
    encode_control,
)
from sere_sglang.ops.counters import COUNTER_FIELDS, new_counters
from sere_sglang.ops.dispatch import available_impls, select_impl
from sere_sglang.ops.jit import BuildError
from sere_sglang.ops.reroute import reroute, reroute_
from sere_sglang.ops.rules import apply_rule
from sere_sglang.ops.rules_call import Routed
from sere_sglang.ops.table import LayerTable

__all__ = [
    "CONTROL_WORDS",
    "COUNTER_FIELDS",
    "MAX_CLASSES",
    "BuildError",
    "Control",
    "LayerTable",
    "Routed",
    "apply_rule",
    "available_impls",
    "decode_control",
    "encode_control",
    "new_counters",
    "reroute",
    "reroute_",
    "select_impl",
]
