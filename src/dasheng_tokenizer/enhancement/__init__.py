"""Speech enhancement in the latent space of a tokenizer.

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasheng_tokenizer.enhancement.denoiser import Denoiser, DenoiserConfig, DenoiserInfo
    from dasheng_tokenizer.enhancement.enhancer import Enhancer
    from dasheng_tokenizer.enhancement.mixture_configuration import MixtureConfig
    from dasheng_tokenizer.enhancement.mixtures import Mixtures, mix

_HOME = {
    "Denoiser": "denoiser",
    "DenoiserConfig": "denoiser",
    "DenoiserInfo": "denoiser",
    "Enhancer": "enhancer",
    "MixtureConfig": "mixture_configuration",
    "Mixtures": "mixtures",
    "mix": "mixtures",
}

__all__ = ["Denoiser", "DenoiserConfig", "DenoiserInfo", "Enhancer", "MixtureConfig", "Mixtures", "mix"]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that has it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Public names too, for completion."""
    return sorted({*globals(), *__all__})
