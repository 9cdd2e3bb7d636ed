"""What the ranks hold, side by side, is the weight: for every scheme, both ways of cutting, any number of ranks."""

from types import SimpleNamespace

import pytest
import torch

from packed_weights import packed_weight
from quantkit.packing import QuantizedTensor
from quantkit.scheme import PRESETS, parse_scheme
from quantkit.sharding import Shape, cut_dimensions, fault, faults, local_part, refusal, working_ranks

LABELS = [*PRESETS, "w4a16-g32-asym", "w4a16-channel", "w3a16-g64-asym", "w2a16-channel-asym", "w4a8-g64"]
CUTS = [("colwise", 2), ("colwise", 4), ("rowwise", 2), ("rowwise", 3), ("rowwise", 6), ("rowwise", 12)]


def read(whole: QuantizedTensor, along: str, rank: int, ranks: int) -> QuantizedTensor:
    """What transformers' loader gives a rank: equal pieces along the dimensions that are cut."""
    shape = Shape("m", whole.scheme, *whole.shape)
    cut = cut_dimensions(shape, along, ranks)
    parts = whole.tensors()
    pieces = {n: t.chunk(ranks, cut[n])[rank] if n in cut else t for n, t in parts.items()}
    return QuantizedTensor(whole.scheme, whole.shape, **pieces)


@pytest.mark.parametrize(("along", "ranks"), CUTS)
@pytest.mark.parametrize("label", LABELS)
def test_parts_side_by_side_are_the_weight(label, along, ranks):
    whole = packed_weight(label, 256, 768)
    why = fault(Shape("m", whole.scheme, 256, 768), along, ranks)
    if why:
        assert (label, along, ranks) == ("fp8-block", "rowwise", 12)
        return
    parts = [local_part(read(whole, along, rank, ranks), along, rank, ranks) for rank in range(ranks)]
    side = 0 if along == "colwise" else 1
    assert torch.equal(torch.cat([part.dequantize() for part in parts], side), whole.dequantize())
    size = 256 // ranks if along == "colwise" else 768 // ranks
    assert {part.shape[side] for part in parts} == {size}
    assert all(part.codes.numel() * ranks == whole.codes.numel() for part in parts)


@pytest.mark.parametrize(
    ("label", "N", "K", "along", "ranks", "words"),
    [
        ("w8a16", 100, 64, "colwise", 3, "N = 100 is no multiple of 3"),
        ("w8a16", 100, 64, "rowwise", 3, "K = 64 is no multiple of 3"),
        ("w4a16-g32", 64, 96, "rowwise", 2, "K / 2 = 48 columns, in groups of 32: expected a multiple of 32"),
        ("w4a16-channel", 64, 72, "rowwise", 2, "K / 2 = 36 columns, of which 8 are packed together"),
        ("w3a16-channel", 64, 96, "rowwise", 2, "K / 2 = 48 columns, of which 32 are packed together"),
        ("w2a16-channel", 64, 48, "rowwise", 2, "K / 2 = 24 columns, of which 16 are packed together"),
        ("fp8-block", 256, 384, "rowwise", 2, "K / 2 = 192 columns, of which 128 share a scale"),
        ("fp8-block", 384, 256, "colwise", 2, "N / 2 = 192 rows, of which 128 share a scale"),
    ],
)
def test_what_cannot_be_cut_is_said_with_its_numbers(label, N, K, along, ranks, words):
    assert fault(Shape("m", parse_scheme(label), N, K), along, ranks) == words


@pytest.mark.parametrize(
    ("K", "ranks", "size"), [(11008, 4, 64), (11008, 8, 32), (14336, 8, 128), (18944, 8, 64)], ids=str
)
def test_groups_of_128_are_made_shorter_where_real_models_are_cut_through_them(K, ranks, size):
    """Llama 2 7B, Llama 3 8B and Qwen 2.5 7B."""
    shape = Shape("m", parse_scheme("w4a16-g128"), 8, K)
    assert fault(shape, "rowwise", ranks) == ""
    whole = packed_weight("w4a16-g128", 8, K)
    part = local_part(read(whole, "rowwise", ranks - 1, ranks), "rowwise", ranks - 1, ranks)
    assert part.scheme.group_size == size
    assert torch.equal(part.dequantize(), whole.dequantize()[:, -K // ranks :])


def test_a_refusal_names_what_would_do():
    config = SimpleNamespace(num_attention_heads=6, num_key_value_heads=3)
    config.get_text_config = lambda: config
    cuts = [(Shape("m", parse_scheme("w8a16"), 48, 48), "rowwise")]
    assert working_ranks(config, cuts) == [3]
    assert working_ranks(config, cuts, heads_are_cut=False)[:5] == [2, 3, 4, 6, 8]
    line = refusal(faults(config, cuts, 5), 5, working_ranks(config, cuts))
    assert line == (
        "cannot be cut over 5 processes: num_attention_heads = 6 is no multiple of 5; m: K = 48 is no multiple of 5; "
        "use 3 processes"
    )
