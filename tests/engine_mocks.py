"""Mocks of the compiled packages that SGLang imports, for a machine without a GPU: `PYTHONPATH=tests pytest -p engine_mocks`.

With them SGLang's own linears, heads and models can be made and loaded where `sglang` was installed with `--no-deps`.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

MOCKED = "torchvision sgl_kernel flashinfer deep_gemm quack cutlass cuda flash_attn humming tvm_ffi".split()


def mock_of(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)


class AnyClass(type):
    """Of a mocked class, which `isinstance` takes; it has every attribute."""

    def __getattr__(cls, name: str):
        return mock_of(name)


class Mocked(types.ModuleType):
    __path__ = ()
    __version__ = "0.28.0"

    def __getattr__(self, name: str):
        is_class = name[0].isupper() or name == "constexpr"
        return AnyClass(name, (), {"__init__": lambda self, *a, **k: None}) if is_class else mock_of(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MOCKED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Mocked(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
