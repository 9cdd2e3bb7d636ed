"""Loading a quantized directory, and checking that it is whole."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.checkpoint import CheckpointReader, damage, read_json
from quantkit.errors import QuantKitError
from quantkit.foreign import load_packed
from quantkit.formats import open_source
from quantkit.formats.gguf import gguf_of
from quantkit.hf import METHOD, QuantKitConfig
from quantkit.kernels.dispatch import target_of
from quantkit.linear import QuantLinear, kernel_of, tensor_specs
from quantkit.processes import agree, start
from quantkit.report import REPORT, read_report
from quantkit.scheme import parse_scheme
from quantkit.source import auto_class, auto_config, first_line


def read_quantized_config(folder: Path) -> QuantKitConfig:
    """The `quantization_config` of a quantkit directory.

    Raises:
        QuantKitError: it is no such directory, or of a newer format.
    """
    if is_foreign(folder):
        raise QuantKitError(
            f"{folder}: not a quantkit checkpoint, but one of another tool; make one with quantkit convert {folder} OUT --to quantkit"
        )
    if not folder.is_dir():
        raise QuantKitError(f"{folder}: no such directory")
    content = quantization_of(folder)
    if content.get("quant_method") != METHOD:
        found = content.get("quant_method", "none")
        raise QuantKitError(
            f"{folder}: not a quantkit checkpoint (quant_method: {found}); make one with quantkit quantize"
        )
    try:
        return QuantKitConfig.from_dict(content)
    except QuantKitError as error:
        raise placed(error, folder) from error
    except TypeError as error:
        raise QuantKitError(
            f"{folder / 'config.json'}: quantization_config cannot be read: {error}"
        ) from error


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a quantkit directory, a line each; an empty list means whole.

    Checks that every packed module has its tensors, every tensor's presence, shape, dtype and checksum, and that
    the report, where there is one, is of these modules. The model card is its reader's to edit.
    """
    config = read_quantized_config(folder)
    reader = CheckpointReader(folder)
    stored = reader.tensors
    lines = damage(folder)
    shapes = reader.load([guard for name in config.modules if (guard := f"{name}.weight") in stored])
    for name in config.modules:
        names = [f"{name}.weight", f"{name}.codes", f"{name}.scales"]
        absent = [tensor for tensor in names if tensor not in stored]
        lines += [f"{tensor}: missing, config.json lists the module" for tensor in absent]
        if absent:
            continue
        scheme = config.scheme_of(name)
        N = stored[f"{name}.codes"].shape[0]
        shape = shapes[f"{name}.weight"].tolist()
        if len(shape) != 2 or shape[0] != N:
            lines.append(f"{name}.weight: holds {shape}, expected [N, K] with N = {N} as codes has it")
            continue
        beside = config.has_channel_scales(name), config.has_input_order(name)
        specs = tensor_specs(scheme, N, shape[1], torch.bfloat16, *beside)
        for suffix, (expected, _) in specs.items():
            tensor = stored.get(f"{name}.{suffix}")
            if tensor is None or tensor.shape != expected:
                found = "missing" if tensor is None else list(tensor.shape)
                lines.append(f"{name}.{suffix}: {found}, scheme {scheme.label} expects {list(expected)}")
    report = read_report(folder)
    if report is not None and {m.name: m.scheme for m in report.modules} != {
        name: config.scheme_of(name).label for name in config.modules
    }:
        lines.append(
            f"{REPORT}: lists other modules or schemes than config.json; delete it, it is of another run"
        )
    return lines


def load(
    folder: str | Path,
    device: str | torch.device | None = None,
    requantize: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A packed model with its linears on quantkit's kernels: `from_pretrained` of a quantkit directory, with clear errors.

    By `AutoModelForCausalLM`, or `AutoModelForImageTextToText` where the config has a vision tower. Checkpoints of
    other tools (docs/formats.md) are taken over as they are read, with the same codes and scales.

    Args:
        folder: what `quantkit quantize` wrote; or a GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes or HQQ directory, or a GGUF
            file.
        device: where to put it; a GPU if there is one, by default.
        requantize: of another tool's checkpoint: a scheme (`w8a16`) for linears that quantkit's format cannot hold as
            they are; None: they are refused.
        kwargs: handed to `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...); for other tools'
            checkpoints `dtype` alone. With tp_plan="auto" it is cut over the processes that torchrun has started.

    Raises:
        QuantKitError: not a packed model, a newer format, a damaged file.
    """
    folder = Path(folder)
    if not is_foreign(folder):
        if requantize is not None:
            raise QuantKitError(
                f"{folder}: requantize is for checkpoints of other tools; use quantkit quantize"
            )
        if is_cut(kwargs):
            if device is not None:
                raise QuantKitError(
                    f"{folder}: device {device} of a model that is cut over processes; leave the device out, each process takes its own"
                )
            join(folder)
        read_quantized_config(folder)
        return load_model(folder, device, **kwargs)
    if strangers := set(kwargs) - {"dtype"}:
        raise QuantKitError(
            f"{folder}: {min(strangers)} is for quantkit's own checkpoints; make one with quantkit convert first"
        )
    scheme = None if requantize is None else parse_scheme(requantize)
    model = load_packed(open_source(folder), device, kwargs.get("dtype"), scheme)
    check_kernels(model)
    return model


def load_model(folder: Path, device: str | torch.device | None = None, **kwargs: Any) -> PreTrainedModel:
    """A model directory, quantized or not, as `load` would load it."""
    CheckpointReader(folder)  # headers and sizes: a truncated file is named here
    if device is None and "device_map" not in kwargs and not is_cut(kwargs):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None:
        kwargs["device_map"] = {"": torch.device(device)}
    try:
        model = auto_class(auto_config(folder)).from_pretrained(folder, **kwargs)
    except QuantKitError as error:
        raise placed(error, folder) from error
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise QuantKitError(f"{folder}: transformers cannot load it: {first_line(error)}") from error
    check_kernels(model)
    return model.eval()


def is_cut(kwargs: dict[str, Any]) -> bool:
    """Whether `from_pretrained` is asked to cut the model over processes."""
    return any(kwargs.get(name) is not None for name in ("tp_plan", "distributed_config"))


def join(folder: Path) -> None:
    """Joins the other processes, and refuses on all of them what one cannot read, or what differs between them."""
    start("cuda" if torch.cuda.is_available() else "cpu")
    headers = wrong = ""
    try:
        read_quantized_config(folder)
        content = [(name, t.dtype, t.shape) for name, t in CheckpointReader(folder).tensors.items()]
        headers = sha256(repr(sorted(content)).encode() + (folder / "config.json").read_bytes()).hexdigest()
    except QuantKitError as error:
        wrong = str(error)
    agree(headers[:16], wrong, "config.json and headers of the checkpoint")


def check_kernels(model: PreTrainedModel) -> None:
    """Refuses a model with a linear that no kernel runs where it is."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.device.type != "meta":
            N, K = module.out_features, module.in_features
            kernel_of(module.scheme, target_of(module.device), 1, N, K, model.dtype)


def is_foreign(folder: Path) -> bool:
    """Whether a path is a checkpoint that another tool packed."""
    if not folder.exists():
        return False
    if gguf_of(folder) is not None:
        return True
    if not (folder / "config.json").is_file():
        return False
    content = read_json(folder / "config.json")
    quantization = content.get("quantization_config") or content.get("compression_config")
    return quantization is not None and quantization_of(folder).get("quant_method") != METHOD


def placed(error: QuantKitError, folder: Path) -> QuantKitError:
    """The error with the folder of the config.json that it names."""
    message = str(error)
    return QuantKitError(f"{folder}/{message}") if message.startswith("config.json") else error


def quantization_of(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "config.json").get("quantization_config")
    return content if isinstance(content, dict) else {}


def is_quantized(folder: Path) -> bool:
    return quantization_of(folder).get("quant_method") == METHOD
