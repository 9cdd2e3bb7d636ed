"""Formats of other tools: every weight that both sides can say comes back bit for bit, and the rest is refused."""

from dataclasses import replace
from itertools import permutations, product
from random import Random

import pytest
import torch

from packed_weights import packed_weight, same, stored
from quantkit import QuantKitError
from quantkit.formats import gguf_blocks
from quantkit.formats.affine import Affine, affine_of
from quantkit.formats.awq import AWQ
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.fp8 import FP8
from quantkit.formats.gptq import GPTQ
from quantkit.formats.writers import WRITERS
from quantkit.packing import unpack_codes
from quantkit.scheme import PRESETS

LABELS = [
    f"w{bits}a16-{group}{zeros}"
    for bits, group, zeros in product((2, 3, 4), ("g32", "g64", "g128", "channel"), ("", "-asym"))
]
SHAPES = [(32, 128), (64, 256), (96, 384)]  # whole words of every number of bits
ODD = [(8, 96), (40, 160), (33, 65)]  # not so


def read_back(target, weight, name="m"):
    """A weight written in a format and read again, by the config that the writer makes."""
    writer = WRITERS[target]
    tensors = writer.tensors(weight)
    if target == "gguf":
        ((kind, raw),) = tensors.items()
        return gguf_blocks.linear_of(kind, raw)
    config = writer.config({name: weight.scheme}, [], weight.input_order is not None)
    seen = stored(tensors, name)
    layout = {
        "gptq": lambda: GPTQ(config, seen),
        "gptq_v2": lambda: GPTQ(config, seen),
        "awq": lambda: AWQ(config, seen),
        "compressed-tensors": lambda: CompressedTensors(
            config, seen, lambda names: {n: tensors[n.removeprefix(f"{name}.")] for n in names}
        ),
    }[target]()
    packed = layout.modules[name]
    assert packed.shape == weight.shape
    return layout.linear(name, {suffix: tensors[suffix] for suffix in packed.suffixes})


# round trips


@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("label", LABELS)
def test_few_bits_come_back_bit_for_bit(label, target):
    for seed, (N, K) in enumerate(SHAPES):
        weight = packed_weight(label, N, K, seed, negative=seed == 1)
        assert WRITERS[target].misfit(weight) == ""
        assert same(read_back(target, weight).quantized, weight)


@pytest.mark.parametrize("label", [label for label in LABELS if label.startswith("w4")])
def test_awq_gives_four_bits_back_bit_for_bit(label):
    for seed, (N, K) in enumerate(SHAPES):
        weight = packed_weight(label, N, K, seed)
        assert same(read_back("awq", weight).quantized, weight)


@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "compressed-tensors", "gguf"])
def test_int8_rows_come_back_bit_for_bit(target):
    for seed, (N, K) in enumerate(SHAPES):
        weight = packed_weight("w8a16", N, K, seed)
        assert same(read_back(target, weight).quantized, weight)


@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g128", "w4a16-channel"])
def test_q4_0_holds_the_same_numbers(label):
    """Its groups are of 32, whatever they were."""
    for seed, (N, K) in enumerate(SHAPES):
        weight = packed_weight(label, N, K, seed, negative=True)
        back = read_back("gguf", weight).quantized
        assert back.scheme.label == "w4a16-g32"
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.dequantize(torch.float64), weight.dequantize(torch.float64))


def test_q4_1_holds_zeros_whose_products_are_halves():
    weight = packed_weight("w4a16-g32-asym", 32, 128)
    assert "products" in WRITERS["gguf"].misfit(weight)
    coarse = replace(weight, scales=torch.exp2(torch.randint(-9, -3, weight.scales.shape)).half())
    assert WRITERS["gguf"].misfit(coarse) == ""
    assert same(read_back("gguf", coarse).quantized, coarse)


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name].bits == 8])
def test_compressed_tensors_has_every_scheme_of_eight_bits(preset):
    for seed, (N, K) in enumerate([*SHAPES, *ODD]):
        weight = packed_weight(preset, N, K, seed)
        assert same(read_back("compressed-tensors", weight).quantized, weight)


@pytest.mark.parametrize("label", ["w4a8-g128", "w4a8-channel", "w4a8-g32-asym", "w3a16-channel"])
def test_compressed_tensors_has_int8_activations_and_rows_of_any_length(label):
    for seed, (N, K) in enumerate(ODD if "channel" in label else SHAPES):
        weight = packed_weight(label, N, K, seed, torch.bfloat16)
        assert same(read_back("compressed-tensors", weight).quantized, weight)


@pytest.mark.parametrize("target", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("label", ["w4a16-g32", "w3a16-g64-asym", "w2a16-g128"])
def test_an_order_of_columns_comes_back(label, target):
    weight = packed_weight(label, 32, 256, order=True)
    tensors = WRITERS[target].tensors(weight)
    assert not torch.equal(tensors["g_idx"], torch.arange(256) // weight.scheme.group_size)
    back = read_back(target, weight).quantized
    # columns of one group may stand in another order within it
    assert torch.equal(back.effective_weight(torch.float64), weight.effective_weight(torch.float64))
    assert same(read_back(target, back).quantized, back)


def test_bfloat16_scales_come_back_as_the_same_numbers_in_float16():
    weight = packed_weight("w4a16-g64", 32, 128, scale_dtype=torch.bfloat16)
    back = read_back("gptq", weight).quantized
    assert back.scales.dtype == torch.float16
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales.double(), weight.scales.double())
    assert read_back("compressed-tensors", weight).quantized.scales.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(40))
def test_any_weight_goes_through_any_two_formats_that_can_say_it(seed):
    """Random bits, groups, zeros and shapes; what a format cannot say, it says that it cannot."""
    source = Random(seed)
    bits = source.choice((2, 3, 4, 8))
    label = f"w{bits}a16"
    if bits < 8:
        label += source.choice(("-g32", "-g64", "-g128", "-channel")) + source.choice(("", "-asym"))
    N, K = source.randint(1, 80), source.choice((32, 64, 96, 128, 160, 256, source.randint(1, 200)))
    N = 32 * -(-N // 32) if source.random() < 0.6 else N
    weight = packed_weight(label, N, K, seed, negative=source.random() < 0.5)
    expected = weight.dequantize(torch.float64)
    for first, second in permutations(["gptq", "gptq_v2", "awq", "compressed-tensors", "gguf"], 2):
        if WRITERS[first].misfit(weight):
            continue
        once = read_back(first, weight).quantized
        assert torch.equal(once.dequantize(torch.float64), expected)
        assert first == "gguf" or same(once, weight)
        if not WRITERS[second].misfit(once):
            assert torch.equal(read_back(second, once).quantized.dequantize(torch.float64), expected)


# the bits


def test_gptq_words_are_as_specified():
    codes = torch.arange(8).repeat(8, 1)
    weight = Affine(4, codes.to(torch.uint8), torch.ones(8, 1).half(), None, None).packed()
    assert WRITERS["gptq"].tensors(weight)["qweight"].tolist() == [[0x76543210] * 8]
    assert WRITERS["gptq"].tensors(weight)["qzeros"].tolist() == [[0x77777777]]  # zero 8, less one
    assert WRITERS["gptq_v2"].tensors(weight)["qzeros"].tolist() == [[-0x77777778]]  # 0x88888888
    rows = Affine(4, codes.T.to(torch.uint8), torch.ones(8, 1).half(), None, None).packed()
    assert WRITERS["awq"].tensors(rows)["qweight"].tolist() == [[0x75316420]] * 8
    assert torch.equal(
        WRITERS["compressed-tensors"].tensors(weight)["weight_packed"],
        WRITERS["gptq"].tensors(weight)["qweight"].T,
    )


def test_q4_0_blocks_are_as_specified():
    codes = torch.arange(32)[None] % 16
    weight = Affine(4, codes.to(torch.uint8), torch.tensor([[0.5]]).half(), None, 32).packed()
    kind, raw = gguf_blocks.encode(weight)
    assert kind == "Q4_0"
    assert bytes(raw[0].tolist()).hex() == "0038" + "".join(f"{i:x}{i:x}" for i in range(16))


# what cannot be held


def misfits(target, weight, *words):
    reason = WRITERS[target].misfit(weight)
    assert all(word in reason for word in words), reason


def test_every_misfit_says_why():
    four = packed_weight("w4a16-g32-asym", 32, 128)
    tiny = replace(four, scales=torch.full_like(four.scales, 1e-30, dtype=torch.bfloat16))
    zero = replace(four, zeros=four.zeros * 0)
    scaled = replace(four, channel_scales=torch.ones(128).bfloat16())
    for target in ("gptq", "gptq_v2", "awq", "gguf"):
        misfits(target, tiny, "scales of bfloat16", "float16")
        misfits(target, packed_weight("fp8", 32, 128), "scheme fp8")
        misfits(target, packed_weight("w4a8-g32", 32, 128), "w4a8")
    for target in ("gptq", "awq", "gguf", "compressed-tensors"):
        misfits(target, scaled, "channel")
    misfits("gptq", zero, "zeros of 0", "gptq_v2")
    assert same(read_back("gptq_v2", zero).quantized, zero)
    misfits("gptq", packed_weight("w4a16-channel", 33, 128), "[33, 128]", "whole words")
    misfits("gptq", packed_weight("w4a16-g64", 32, 96), "last group", "64")
    misfits("awq", packed_weight("w4a16-channel", 12, 128), "12 rows")
    misfits("awq", packed_weight("w4a16-g32", 32, 128, order=True), "order")
    misfits("compressed-tensors", packed_weight("w4a16-g32", 32, 128, order=True), "order")
    misfits("gguf", packed_weight("w4a16-channel", 32, 80), "80 columns")
    misfits("gguf", packed_weight("w3a16-g32", 32, 128), "w3a16")


def affine(bits=4, K=128, size=32, **changes):
    codes = torch.randint(0, 2**bits, (16, K), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales = torch.rand(16, -(-K // size), generator=torch.Generator().manual_seed(1)).half()
    return replace(Affine(bits, codes, scales, None, size), **changes)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (affine(bits=5), "5 bits"),
        (affine(bits=8), "8-bit codes in groups of 32"),
        (affine(bits=8, size=128, zeros=torch.full((16, 1), 7)), "8-bit codes with zeros"),
        (affine(zeros=torch.full((16, 4), 7.5)), "whole numbers"),
        (affine(zeros=torch.full((16, 4), 16)), "0 to 15"),
        (affine(size=16), "groups of 16"),
        (affine(scales=torch.full((16, 4), 1 / 3)), "float32"),
        (affine(group_of=torch.tensor([0] * 40 + [1] * 24 + [2] * 32 + [3] * 32)), "differ in size"),
        (affine(bits=2, activation="int8"), "2 bits beside int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_quantkit_cannot_hold_are_read_by_their_weights(given, reason):
    linear = given.linear()
    assert linear.quantized is None
    assert reason in linear.reason
    middle = 2 ** (given.bits - 1) if given.zeros is None else given.zeros.double()[:, given.columns]
    expected = (given.codes.double() - middle) * given.scales.double()[:, given.columns]
    assert torch.allclose(linear.weight.double(), expected, rtol=1e-6, atol=0)


def test_groups_of_a_multiple_of_128_become_smaller_ones_of_the_same_numbers():
    for size, expected in ((256, 128), (96, 32), (192, 64)):
        given = affine(K=768, size=size)
        q = given.linear().quantized
        assert q.scheme.group_size == expected
        assert torch.equal(q.dequantize(), given.dequantize())


def test_a_scale_of_zero_becomes_one_with_codes_that_mean_zero():
    given = affine(zeros=torch.full((16, 4), 3))
    given.scales[3, 1] = 0
    q = given.linear().quantized
    assert torch.equal(q.dequantize(), given.dequantize())
    assert (q.scales != 0).all()
    blocks = torch.zeros(2, 18, dtype=torch.uint8)
    assert not gguf_blocks.linear_of("Q4_0", blocks).quantized.dequantize().any()


def test_eight_bit_groups_that_share_their_scale_are_rows():
    given = affine(bits=8, scales=torch.full((16, 4), 0.5).half())
    q = given.linear().quantized
    assert q.scheme.label == "w8a16"
    assert torch.equal(q.dequantize(), given.dequantize())


def test_unpacking_undoes_packing_with_an_order():
    weight = packed_weight("w4a16-g32-asym", 16, 128, order=True)
    given = affine_of(weight)
    assert torch.equal(given.codes[:, weight.input_order.long()], unpack_codes(weight.codes, 128, 4))
    assert torch.equal(given.dequantize(), weight.effective_weight())


def test_version_1_of_gptq_with_ambiguous_zeros_is_refused():
    weight = packed_weight("w4a16-g32-asym", 32, 128)
    tensors = WRITERS["gptq_v2"].tensors(replace(weight, zeros=torch.full_like(weight.zeros, 15)))
    config = WRITERS["gptq"].config({"m": weight.scheme}, [], False)
    layout = GPTQ(config, stored(tensors))
    with pytest.raises(QuantKitError, match=r"m\.qzeros: a field of 15.*gptq_v2"):
        layout.linear("m", tensors)


def test_gptq_exceptions_by_regular_expression():
    four, three = packed_weight("w4a16-g32", 32, 128), packed_weight("w3a16-g64", 32, 128)
    tensors = {
        "a.down": WRITERS["gptq_v2"].tensors(four),
        "b.down": WRITERS["gptq_v2"].tensors(three),
    }
    config = WRITERS["gptq_v2"].config({"a.down": four.scheme}, ["c.up"], False)
    config["dynamic"] |= {r"+:b\..*": {"bits": 3, "group_size": 64}}
    seen = stored(tensors["a.down"], "a.down") | stored(tensors["b.down"], "b.down")
    layout = GPTQ(config, seen)
    assert same(layout.linear("a.down", tensors["a.down"]).quantized, four)
    assert same(layout.linear("b.down", tensors["b.down"]).quantized, three)


def test_one_scheme_for_all_where_the_format_has_one():
    schemes = {"a": packed_weight("w4a16-g32", 8, 32).scheme, "b": packed_weight("w4a16-g64", 8, 64).scheme}
    for target in ("gptq", "awq"):
        with pytest.raises(QuantKitError, match=r"w4a16-g32, w4a16-g64.*compressed-tensors"):
            WRITERS[target].config(schemes, [], False)
    groups = WRITERS["compressed-tensors"].config(schemes, ["c"], False)["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a"], ["b"]]


def test_a_target_without_a_dot_is_a_name_and_no_class():
    four, eight = packed_weight("w4a16-g32", 32, 128), packed_weight("w8a16", 32, 128)
    writer = WRITERS["compressed-tensors"]
    config = writer.config({"lm_head": eight.scheme, "a.up": four.scheme}, [], False)
    config["config_groups"]["group_1"]["targets"] = ["Linear"]
    parts = {"lm_head": writer.tensors(eight), "a.up": writer.tensors(four)}
    seen = stored(parts["lm_head"], "lm_head") | stored(parts["a.up"], "a.up")
    shapes = {f"{name}.weight_shape": tensors["weight_shape"] for name, tensors in parts.items()}
    layout = CompressedTensors(config, seen, lambda names: {name: shapes[name] for name in names})
    assert same(layout.linear("lm_head", parts["lm_head"]).quantized, eight)
    assert same(layout.linear("a.up", parts["a.up"]).quantized, four)
    config["config_groups"]["group_1"]["targets"] = ["RowParallel"]
    with pytest.raises(QuantKitError, match=r"no group of config_groups has a\.up"):
        CompressedTensors(config, seen, lambda names: {name: shapes[name] for name in names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_face_fp8_blocks_are_quantkits(dtype):
    weight = packed_weight("fp8-block", 200, 300)
    tensors = {"weight": weight.codes, "weight_scale_inv": weight.scales.to(dtype)}
    layout = FP8({"weight_block_size": [128, 128]}, stored(tensors))
    expected = replace(weight, scales=weight.scales.to(dtype).float())
    assert same(layout.linear("m", tensors).quantized, expected)
    with pytest.raises(QuantKitError, match=r"weight_block_size \[64, 64\]"):
        FP8({"weight_block_size": [64, 64]}, stored(tensors))
    with pytest.raises(QuantKitError, match="activation_scheme 'static'"):
        FP8({"weight_block_size": [128, 128], "activation_scheme": "static"}, stored(tensors))
    again = WRITERS["fp8"].tensors(expected)
    layout = FP8(WRITERS["fp8"].config({"m": expected.scheme}, ["lm_head"], False), stored(again))
    assert same(layout.linear("m", again).quantized, expected)
    misfits("fp8", packed_weight("fp8", 8, 32), "scheme fp8")
    misfits("fp8", replace(weight, channel_scales=torch.ones(300).bfloat16()), "input channels")


def test_hugging_face_fp8_with_one_scale_is_fp8_with_a_scale_a_row():
    codes = torch.randn(8, 24).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale_inv": torch.tensor(0.25)}
    q = FP8({"weight_block_size": None}, stored(tensors)).linear("m", tensors).quantized
    assert q.scheme.name == "fp8"
    assert torch.equal(q.dequantize(), codes.float() * 0.25)


# K-quants: encoded here, decoded by the same description; the oracles' tests compare with gguf


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K"])
def test_rounding_to_a_block_type_errs_by_half_a_step_at_most(kind):
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    raw = gguf_blocks.quantize(kind, weight)
    assert raw.shape == (6, 512 // gguf_blocks.TYPES[kind].block * gguf_blocks.TYPES[kind].bytes)
    error = float((gguf_blocks.dequantize(kind, raw) - weight).norm() / weight.norm())
    assert error < {"Q4_0": 0.11, "Q8_0": 0.006, "Q4_K": 0.085}[kind], error


def test_q4_k_takes_zeros_and_blocks_of_one_sign():
    weight = torch.zeros(3, 256)
    weight[1] = torch.rand(256) + 3
    weight[2, :32] = -torch.rand(32)
    back = gguf_blocks.dequantize("Q4_K", gguf_blocks.quantize("Q4_K", weight))
    assert not back[0].any()
    assert (back - weight).abs().max() < 0.2


def test_scales_of_six_bits_pack_and_unpack():
    s, t = (torch.randint(0, 64, (50, 8), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    packed = gguf_blocks.pack_scales(s.to(torch.uint8), t.to(torch.uint8))
    assert all(
        torch.equal(a, b.float()) for a, b in zip(gguf_blocks.unpack_scales(packed), (s, t), strict=True)
    )
