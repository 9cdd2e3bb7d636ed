"""kernels/ must stay without __init__.py: with one, it would hide Hugging Face's `kernels` package."""

import builtins
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "calibration", "eval")


def test_top_level_directories_are_not_packages():
    for name in ROOMS:
        assert not (ROOT / name / "__init__.py").exists(), (
            f"{name}/__init__.py would make `import {name}` find this repository"
        )


def test_transformers_imports_from_the_repository_root():
    code = "import transformers.integrations.hub_kernels; from transformers.utils import is_kernels_available as k; k()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("name", [*ROOMS, "examples"])
def test_the_symlinks_lead_to_the_top_level_directories(name):
    link = ROOT / "quantkit" / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ROOMS)
def test_every_file_of_a_room_is_found_under_quantkit(name):
    for file in (ROOT / name).glob("*.py"):
        assert find_spec(f"quantkit.{name}.{file.stem}"), f"quantkit.{name}.{file.stem} cannot be imported"


def test_nothing_is_shadowed():
    import quantkit

    assert not {*dir(builtins)} & {*quantkit.__all__}
    assert eval("1 + 1") == 2  # quantkit.eval is a submodule, never a name to import
    for (
        name
    ) in ROOMS:  # a regular `kernels` or `calibration` on a later path entry would win over the directory
        spec = find_spec(name)
        assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
