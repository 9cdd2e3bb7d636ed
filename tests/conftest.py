"""Settings for every test: the Triton interpreter where there is no GPU, and poisoned allocations in the kernels."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rounding import Random

# Triton reads this when a kernel is defined, hence before any test module imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What somebody tuned on this machine does not decide which kernels are tested.
os.environ["QUANTKIT_TUNED"] = os.devnull


def _mend_the_interpreter_of_triton_3_6() -> None:
    """It takes int() of an array of one element for a loop's bound, which NumPy 2.4 refuses (triton issue 9171)."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") and version("triton").startswith("3.6."):
    _mend_the_interpreter_of_triton_3_6()

GARBAGE = 0x7F  # the byte 0x7F is NaN in e4m3, a large code in int8 and in integers of any width


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _poison(allocate):
    """`allocate` with NaN or garbage in what it returns to quantkit.kernels: a forgotten element cannot pass."""

    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("quantkit.kernels") and type(tensor) is torch.Tensor and tensor.numel():
            if tensor.is_floating_point() and tensor.element_size() > 1:
                tensor.fill_(float("nan"))
            else:
                tensor.view(torch.uint8).fill_(GARBAGE)
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


@pytest.fixture
def laid_out_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """W4A16 linears hold the tiles of a GPU, wherever they are."""
    from quantkit import linear  # imports Triton, which was prepared above

    monkeypatch.setattr(linear, "target_of", lambda device: "sm_80")
    monkeypatch.setattr(linear.QuantLinear, "device", property(lambda self: torch.device("cuda")))


@pytest.fixture
def random() -> Random:
    """The same operands in every test."""
    return Random(torch.Generator().manual_seed(0))


# Small models of every supported architecture, with what makes each of them different switched on.
SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"], head_dim=16)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=8)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "gemma2": ("Gemma2Config", SLIDING),
    "gemma3": ("Gemma3TextConfig", SLIDING),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(
            num_experts=4, num_experts_per_tok=3, moe_intermediate_size=32, shared_expert_intermediate_size=96
        ),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    ),
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2)),
}


def _tiny(
    architecture: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Any:
    config_class, special = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**{**SIZES, **special, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start at 1 or 0, which would hide their loss
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny(architecture, dtype, seed, **config changes) -> a small model with random weights."""
    return _tiny


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """source(architecture, **config changes) -> the directory of a tiny model, the same at every call."""

    @cache
    def saved(architecture: str = "llama", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(architecture) / "source"
        _tiny(architecture, **changes).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Calibration tokens for the tiny models, int64 [8, 24]: longer than their sliding windows."""
    return torch.randint(3, SIZES["vocab_size"], (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def packed(
    source: Callable[..., Path], tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """packed(architecture, scheme, method, **config changes) -> a quantized directory; not to be changed."""
    from quantkit import Recipe, Rule, quantize_checkpoint

    @cache
    def quantized(
        architecture: str = "llama",
        scheme: str = "w8a16",
        method: str | None = "rtn",
        rules: tuple[Rule, ...] = (),
        **changes: Any,
    ) -> Path:
        out = tmp_path_factory.mktemp(f"{architecture}-{scheme}") / "packed"
        quantize_checkpoint(
            source(architecture, **changes), out, Recipe(scheme, method, rules), "cpu", tokens
        )
        return out

    return quantized


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*arguments) -> (exit code, stdout, stderr) of the command, in this process."""
    from quantkit import cli

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    verbosity = transformers.utils.logging.get_verbosity()
    with warnings.catch_warnings():
        yield call
    # main() quietens what it calls, for the rest of the process
    logging.disable(logging.NOTSET)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def refused(run: Any, tmp_path: Path) -> Any:
    """refused(*arguments, words=...): exit code 2, one line on stderr with the words, nothing written."""

    def check(*arguments: str | Path, words: tuple[str, ...]) -> None:
        before = _tree(tmp_path)
        code, _, err = run(*arguments)
        assert code == 2
        assert err.endswith("\n")
        assert err.count("\n") == 1, f"more than one line: {err}"
        assert err.startswith("error: ")
        assert "Traceback" not in err
        for word in words:
            assert word in err, f"{word!r} is not in: {err}"
        assert _tree(tmp_path) == before

    return check


@pytest.fixture
def tree() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """tree(folder) -> size and time of all that is in it, by name."""
    return _tree


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    } | {str(path.relative_to(folder)): (0, 0) for path in folder.rglob("*") if path.is_dir()}
