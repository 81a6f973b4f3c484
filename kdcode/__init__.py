"""Distil a small student from a large code model and use it as the draft model for lossless speculative decoding.

These are the names that most work begins with. Each is loaded when it is first used, so `import kdcode` itself loads no large library. All others are in the modules, such as `kdcode.decode` and `kdcode.train`.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench import bench_decode
    from .config import Config, load_config
    from .data import build_corpus
    from .export import export_llama
    from .decode import complete, load_draft, speculative_generate, stream
    from .student import Student
    from .teacher import load_teacher
    from .train import distill

from .threads import limit_spinning

limit_spinning()  # OpenMP reads its environment when PyTorch is loaded

__version__ = "0.1.0"
__all__ = ["Config", "Student", "bench_decode", "build_corpus", "complete", "distill", "export_llama", "load_config", "load_draft", "load_teacher", "speculative_generate", "stream"]

_MODULES = {
    "Config": "config", "Student": "student", "bench_decode": "bench", "build_corpus": "data", "complete": "decode", "distill": "train", "export_llama": "export",
    "load_config": "config", "load_draft": "decode", "load_teacher": "teacher", "speculative_generate": "decode", "stream": "decode",
}


def __getattr__(name: str) -> Any:
    """Loads a name from its module (PEP 562)."""
    if name not in _MODULES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return found


def __dir__() -> list[str]: return __all__
