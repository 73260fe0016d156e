"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

That module imports Triton, which takes a while and reads TRITON_INTERPRET, so it is not imported here: the
formulas enter its registry when someone else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_MODULE = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register(operator: Any, formula: Callable[..., int]) -> None:
    """FlopCounterMode counts ``formula(*arguments)`` for each call of ``operator``, a packet of torch.ops."""
    _formulas[operator] = formula
    if _MODULE in sys.modules:
        _enter(sys.modules[_MODULE])


def _enter(flop_counter: ModuleType) -> None:
    for operator, formula in _formulas.items():
        if operator not in flop_counter.flop_registry:

            def count(*arguments: Any, out_val: Any = None, formula: Callable[..., int] = formula) -> int:
                return formula(*arguments)

            flop_counter.register_flop_formula(operator, get_raw=True)(count)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the usual finders import the module, and enters the formulas after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            # Only this one loader changes: it executes the module as ever, then enters the formulas.
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _MODULE not in sys.modules:
    sys.meta_path.insert(0, _Finder())
