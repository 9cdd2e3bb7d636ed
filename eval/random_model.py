"""A model of a real one's shape with random weights, packed from the start: speed does not depend on their values."""

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from quantkit.errors import QuantKitError
from quantkit.eval.random_weights import STD, random_quantized
from quantkit.linear import QuantLinear, replace_module
from quantkit.rank_linear import GatheredPlain, RankEmbedding, RowLinear
from quantkit.scheme import Scheme
from quantkit.sharding import Shape, faults, refusal, shared, working_ranks
from quantkit.tensor_parallel import ALONG, style_of

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
CONFIGS["llama-3-70b"] = CONFIGS["llama-3-8b"] | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)


def random_model(
    config: "str | LlamaConfig",
    scheme: Scheme | None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    seed: int = 0,
    group: Any = None,
) -> "LlamaForCausalLM":
    """A Llama whose decoder linears are packed random codes, made on the device without floating-point weights.

    Args:
        config: a name in `CONFIGS`, or a config.
        scheme: of the decoder linears; None leaves them in `dtype`. Embedding and head always stay in `dtype`.
        layers: number of decoder blocks instead of the config's.
        group: of the processes that it is cut over as transformers' plan says, each of which makes its own part alone.

    Raises:
        QuantKitError: the name is unknown, or the model cannot be cut.
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
    rank = 0 if group is None else dist.get_rank(group)
    generator = torch.Generator(device).manual_seed(seed + rank)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if group is not None:
        check_cut(model, scheme, dist.get_world_size(group))
        cut_ends(model, group)
    if scheme is not None:
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                packed = random_linear(model, f"model.layers.{name}", scheme, generator, group)
                packed.repack(dtype)  # as a model that was loaded is
                replace_module(model.model.layers, name, packed)
    common = generator if group is None else torch.Generator(device).manual_seed(seed)
    materialize(model, dtype, common)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    return model.eval()


def check_cut(model: Any, scheme: Scheme | None, ranks: int) -> None:
    """Refuses a model that cannot be cut over so many processes."""
    if scheme is None:
        raise QuantKitError("a random model that is cut over processes has packed linears; give a scheme")
    cuts = [
        (Shape(name, scheme, module.out_features, module.in_features), ALONG[style])
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, nn.Linear) and (style := style_of(model, f"{name}.weight")) in ALONG
    ]
    if found := faults(model.config, cuts, ranks):
        raise QuantKitError(
            f"{model.config.name_or_path}: {refusal(found, ranks, working_ranks(model.config, cuts))}"
        )


def random_linear(
    model: Any, name: str, scheme: Scheme, generator: torch.Generator, group: Any
) -> QuantLinear:
    """A packed linear in the place of a plain one, or this process's part of it."""
    plain = model.get_submodule(name)
    N, K = plain.out_features, plain.in_features
    along = None if group is None else ALONG.get(style_of(model, f"{name}.weight"))
    if along is None:
        return QuantLinear.from_quantized(random_quantized(scheme, N, K, generator.device, generator))
    ranks = dist.get_world_size(group)
    if along == "colwise":
        packed = QuantLinear.from_quantized(
            random_quantized(scheme, N // ranks, K, generator.device, generator)
        )
    else:
        k = K // ranks
        if scheme.group_size and k % scheme.group_size:
            scheme = replace(scheme, group_size=shared(k, scheme.group_size))
        packed = RowLinear.from_quantized(random_quantized(scheme, N, k, generator.device, generator))
        packed.register_parameter("late_bias", None)
    packed.group = group
    return packed


def cut_ends(model: Any, group: Any) -> None:
    """Leaves of the embedding and the LM head, which have no numbers yet, this process's rows and outputs."""
    ranks, (V, H) = dist.get_world_size(group), model.lm_head.weight.shape
    if not model.config.tie_word_embeddings and V % ranks == 0:
        model.lm_head = GatheredPlain(H, V // ranks, bias=False, device="meta")
        model.lm_head.group = group
        model.model.embed_tokens = embedding = RankEmbedding(V // ranks, H, device="meta")
        embedding.group, embedding.first_row = group, dist.get_rank(group) * (V // ranks)


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
