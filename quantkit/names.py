"""From the names of tensors in a model's files to the names that the model gives them.

Files on the hub keep the names of the code that trained them. transformers renames and stacks as it loads;
`quantkit quantize` reads single tensors, and takes the renaming from transformers' own table. What it stacks
(experts) is left apart, what it would convert otherwise is refused.
"""

import re
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.experts import UnfusedExperts

STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def model_names(tensors: dict[str, StoredTensor], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """The tensors of a model's files by the names of the model's state_dict, its experts unfused.

    Tensors that the model does not have keep a name that it does not have.

    Raises:
        QuantKitError: transformers would compute a tensor of the model from several in the files.
    """
    own = set(model.state_dict())
    stacks = {
        f"{name}.{stack}"
        for name, module in model.named_modules()
        if isinstance(module, UnfusedExperts)
        for stack in STACKED
    }
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    sources = {pattern: entry.source_patterns for entry in converters for pattern in entry.source_patterns}
    known = dict.fromkeys(own | stacks, True)
    named = {name: tensor for name, tensor in tensors.items() if name in own}
    for name, tensor in tensors.items():
        if name in own:
            continue
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        experts, _, stack = target.rpartition(".")
        if pattern is None and target in stacks and len(tensor.shape) == 3:
            named.update(unstack(experts, STACKED[stack], tensor))
        elif pattern is None:
            named.setdefault(target, tensor)
        elif target in stacks and (expert := re.search(r"\.experts\.(\d+)\.", name)):
            part = STACKED[stack][sources[pattern].index(pattern)]
            named[f"{experts}.{expert[1]}.{part}.weight"] = tensor
        elif target in own:
            raise QuantKitError(
                f"{tensor.file}: {name} is stored in another form than {type(model).__name__} has it; load the model "
                "with transformers, and quantize it in memory"
            )
    return named


def unstack(experts: str, parts: tuple[str, ...], tensor: StoredTensor) -> dict[str, StoredTensor]:
    """The rows of a stack [E, rows, columns] that belong to each part of each expert."""
    E, rows = tensor.shape[0], tensor.shape[1] // len(parts)
    size = (tensor.stop - tensor.start) // (E * len(parts))  # bytes of one part
    return {
        f"{experts}.{e}.{part}.weight": replace(
            tensor,
            shape=(rows, *tensor.shape[2:]),
            start=tensor.start + (e * len(parts) + p) * size,
            stop=tensor.start + (e * len(parts) + p + 1) * size,
            index=(e, slice(p * rows, (p + 1) * rows)),
        )
        for e in range(E)
        for p, part in enumerate(parts)
    }
