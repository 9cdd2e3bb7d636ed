"""What quantkit's plug-in for SGLang touches of SGLang 0.5.23, without the rest of it: modules for `sys.modules`.

Written after its `layers/{parameter,linear,vocab_parallel_embedding}.py` and `layers/quantization/`: the same names,
arguments and cuts. Where the package itself can be imported the tests run it instead.
"""

import types
from types import SimpleNamespace

from torch import nn

GROUP = SimpleNamespace(rank_in_group=0, world_size=1)  # of the linears that are made next
V2: list[str] = []


class Parameter(nn.Parameter):
    def __new__(cls, data, **kwargs):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, weight_loader, input_dim=None, output_dim=None):
        self.weight_loader, self.input_dim, self.output_dim = weight_loader, input_dim, output_dim

    def place(self, loaded, dim, rank, offset=0, size=None):
        size = self.data.shape[dim] if size is None else size
        self.data.narrow(dim, offset, size).copy_(loaded.narrow(dim, rank * size, size))

    def load_column_parallel_weight(self, loaded_weight, tp_rank, use_presharded_weights=False):
        self.place(loaded_weight, self.output_dim, tp_rank)

    def load_row_parallel_weight(self, loaded_weight, tp_rank, use_presharded_weights=False):
        self.place(loaded_weight, self.input_dim, tp_rank)

    def load_merged_column_weight(self, loaded_weight, tp_rank, shard_offset, shard_size, **rest):
        self.place(loaded_weight, self.output_dim, tp_rank, shard_offset, shard_size)

    def load_qkv_weight(self, loaded_weight, tp_rank, num_heads, shard_id, shard_offset, shard_size, **rest):
        rank = tp_rank if shard_id == "q" else tp_rank // num_heads
        self.place(loaded_weight, self.output_dim, rank, shard_offset, shard_size)


class Blocks(Parameter):
    pass


class Channels(Parameter):
    def load_row_parallel_weight(self, loaded_weight):
        self.data.copy_(loaded_weight)


class Scalars(Channels):
    load_column_parallel_weight = Channels.load_row_parallel_weight

    def load_merged_column_weight(self, loaded_weight, shard_id, **rest):
        self.data[{"q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)].copy_(loaded_weight[0])

    load_qkv_weight = load_merged_column_weight


class LinearBase(nn.Module):
    def __init__(self, K, rows, params_dtype, quant_config, prefix, cut_K):
        super().__init__()
        self.tp_group, size = SimpleNamespace(**vars(GROUP)), GROUP.world_size
        self.rows = rows
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        v2 = type(self.quant_method).__name__ in V2
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=K // size if cut_K else K,
            output_partition_sizes=rows if cut_K else [n // size for n in rows],
            input_size=K,
            output_size=sum(rows),
            params_dtype=params_dtype,
            skip_block_quant_check=False,
            weight_loader=self.load if v2 else None,
        )
        self.register_parameter("bias", None)

    def place(self, parameter, part):
        """Where a part's rows begin in this process's, and how many they are; in blocks, of scales of such."""
        size = self.tp_group.world_size
        first, count = sum(self.rows[:part]) // size, self.rows[part] // size
        if isinstance(parameter, Blocks):
            block, _ = self.quant_method.quant_config.weight_block_size
            return first // block, -(-count // block)
        return first, count

    def load(self, parameter, loaded, part=None):
        name, rank = self.loads, {"tp_rank": self.tp_group.rank_in_group}
        if part is None:
            try:
                getattr(parameter, name)(loaded, use_presharded_weights=False, **rank)
            except TypeError:
                getattr(parameter, name)(loaded)
            return
        offset, size = self.place(parameter, {"q": 0, "k": 1, "v": 2}.get(part, part))
        where = {"shard_id": part, "shard_offset": offset, "shard_size": size}
        heads = {"num_heads": 1} if name == "load_qkv_weight" else {}
        getattr(parameter, name)(loaded, use_presharded_weights=False, **where, **heads, **rank)


class ColumnParallelLinear(LinearBase):
    loads = "load_column_parallel_weight"

    def __init__(self, K, N, bias, params_dtype, quant_config, prefix):
        super().__init__(K, [N], params_dtype, quant_config, prefix, cut_K=False)


class MergedColumnParallelLinear(LinearBase):
    loads = "load_merged_column_weight"

    def __init__(self, K, rows, bias, params_dtype, quant_config, prefix):
        super().__init__(K, rows, params_dtype, quant_config, prefix, cut_K=False)


class QKVParallelLinear(LinearBase):
    loads = "load_qkv_weight"

    def __init__(self, K, head_size, heads, kv_heads, bias, params_dtype, quant_config, prefix):
        rows = [head_size * n for n in (heads, kv_heads, kv_heads)]
        super().__init__(K, rows, params_dtype, quant_config, prefix, cut_K=False)


class RowParallelLinear(LinearBase):
    loads = "load_row_parallel_weight"

    def __init__(self, K, N, bias, params_dtype, quant_config, prefix):
        super().__init__(K, [N], params_dtype, quant_config, prefix, cut_K=True)


class ParallelLMHead(nn.Module):
    def __init__(self, N, K, *, bias, params_dtype, quant_config, prefix):
        super().__init__()
        self.tp_group, size = SimpleNamespace(**vars(GROUP)), GROUP.world_size
        padded = -(-N // 64) * 64
        here = padded // size
        first = GROUP.rank_in_group * here
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=min(first, N), org_vocab_end_index=min(first + here, N)
        )
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            self, K, [here], K, padded, params_dtype=params_dtype, weight_loader=self.load
        )

    def load(self, parameter, loaded):
        if parameter.output_dim is None:
            parameter.data.copy_(loaded)
            return
        first, last = self.shard_indices.org_vocab_start_index, self.shard_indices.org_vocab_end_index
        parameter.data[: last - first].copy_(loaded[first:last])
        parameter.data[last - first :].fill_(0)


class UnquantizedLinearMethod:
    def create_weights(self, layer, *sizes, **rest):
        pass


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


def modules() -> dict[str, types.ModuleType]:
    """The modules by name, with empty tables."""
    V2.clear()
    content = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.arg_groups": {},
        "sglang.srt.arg_groups.choices": {"QUANTIZATION_CHOICES": ["fp8"]},
        "sglang.srt.layers": {},
        "sglang.srt.layers.parameter": {
            "ModelWeightParameter": Parameter,
            "GroupQuantScaleParameter": Parameter,
            "BlockQuantScaleParameter": Blocks,
            "ChannelQuantScaleParameter": Channels,
            "PerTensorScaleParameter": Scalars,
        },
        "sglang.srt.layers.linear": {
            **{kind.__name__: kind for kind in (LinearBase, ColumnParallelLinear, RowParallelLinear)},
            **{kind.__name__: kind for kind in (MergedColumnParallelLinear, QKVParallelLinear)},
            "WEIGHT_LOADER_V2_SUPPORTED": V2,
        },
        "sglang.srt.layers.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
        "sglang.srt.layers.quantization": {"QUANTIZATION_METHODS": {}},
        "sglang.srt.layers.quantization.unquant": {"UnquantizedLinearMethod": UnquantizedLinearMethod},
        "sglang.srt.layers.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "LinearMethodBase": object,
        },
    }
    made = {name: types.ModuleType(name) for name in content}
    for name, attributes in content.items():
        made[name].__dict__.update(attributes, __path__=[])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made
