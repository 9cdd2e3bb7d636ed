"""LoRA on packed linears, by the package peft: the weights stay packed and frozen, the adapters are trained.

    from quantkit.adapters import on_packed
    model = quantkit.load("llama-w4")
    model = get_peft_model(model, on_packed(LoraConfig(target_modules=["q_proj", "v_proj"])))

and to load what was trained: PeftModel.from_pretrained(model, folder, config=on_packed(LoraConfig.from_pretrained(folder))).
"""

from functools import cache
from typing import Any

from quantkit.errors import QuantKitError
from quantkit.linear import QuantLinear


def on_packed(config: Any) -> Any:
    """The LoraConfig, with what peft is to do where its target modules are QuantLinears.

    Raises:
        QuantKitError: peft is not installed, or the config is of another kind of adapter.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise QuantKitError("adapters need the package peft; pip install peft") from error
    if not isinstance(config, LoraConfig):
        raise QuantKitError(f"adapters: found {type(config).__name__}, expected a LoraConfig")
    config._register_custom_module({QuantLinear: packed_lora()})
    return config


@cache
def packed_lora() -> type:
    """peft's LoRA layer, which would add its product to the packed weight if it were asked to merge."""
    from peft.tuners.lora.layer import Linear

    class PackedLora(Linear):  # type: ignore[misc]
        """y = packed(x) + scaling * B(A(x))."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise QuantKitError(
                "adapters: a packed weight cannot take an adapter into itself; merge into the original model, and quantize that"
            )

        def unmerge(self) -> None:
            """Nothing is ever merged."""

    return PackedLora
