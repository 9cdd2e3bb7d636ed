"""A model of a real one's shape with random weights, packed from the start: speed does not depend on their values."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.errors import QuantKitError
from quantkit.eval.random_weights import STD, random_quantized
from quantkit.linear import QuantLinear, replace_module
from quantkit.scheme import Scheme

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=False,
    ),
}


def random_model(
    config: "str | LlamaConfig",
    scheme: Scheme | None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    seed: int = 0,
) -> "LlamaForCausalLM":
    """A Llama whose decoder linears are packed random codes, made on the device without floating-point weights.

    Args:
        config: a name in `CONFIGS`, or a config.
        scheme: of the decoder linears; None leaves them in `dtype`. Embeddings and head always stay in `dtype`.
        layers: number of decoder blocks instead of the config's.

    Raises:
        QuantKitError: the name is unknown.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if isinstance(config, str):
        if config not in CONFIGS:
            raise QuantKitError(f"unknown model shape {config!r}; known: {', '.join(CONFIGS)}")
        name, config = config, LlamaConfig(**CONFIGS[config])
        config.name_or_path = name
    config = deepcopy(config)
    config.dtype = dtype
    if layers is not None:
        config.num_hidden_layers = layers
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if scheme is not None:
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                q = random_quantized(scheme, module.out_features, module.in_features, device, generator)
                packed = QuantLinear.from_quantized(q)
                packed.repack(dtype)  # as a model that was loaded is
                replace_module(model.model.layers, name, packed)
    materialize(model, dtype, generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    return model.eval()


def materialize(model: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Gives every parameter that is still on 'meta' values: matrices normal with `STD`, vectors (norms) ones."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                value = torch.ones(parameter.shape, dtype=dtype, device=generator.device)
                if parameter.dim() > 1:
                    value.normal_(std=STD, generator=generator)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(module, name, made[id(parameter)])
