"""Makes the Auto classes of transformers know this package, without importing transformers before its user does.

`import dasheng_tokenizer` promises that plain `AutoModel.from_pretrained(…)` loads a tokenizer. Keeping that promise at
once would cost seconds at each start, `--help` too: registering a class means importing it, and with it transformers
and PyTorch. So each class registers itself where it is defined, and the modules of transformers that hold the three
registers import the module of that class as soon as they themselves have been imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "dasheng_tokenizer.configuration",
    "transformers.models.auto.feature_extraction_auto": "dasheng_tokenizer.feature_extraction",
    "transformers.models.auto.modeling_auto": "dasheng_tokenizer.tokenizer",
}
"""Module of transformers with a register → our module that enters its class there."""


class _RegisterAfterImport:
    """An entry of `sys.meta_path` that finds what the usual one finds, with the registration as its last step."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The specification of one of the three modules; None, that is "ask the next", for all others."""
        if name not in REGISTERED_BY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(REGISTERED_BY[name])  # where it is being imported just now, its end registers

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Called once, by the package: registers at once where transformers' registers are there, else when they come."""
    sys.meta_path.insert(0, _RegisterAfterImport)
    for register, ours in REGISTERED_BY.items():
        if register in sys.modules:
            importlib.import_module(ours)
