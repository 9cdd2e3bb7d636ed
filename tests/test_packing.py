from dataclasses import replace

import pytest
import torch

from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.linear import QuantLinear
from quantkit.packing import QuantizedTensor, expand_groups, merge_rows, pack_codes, unpack_codes, words_of
from quantkit.scheme import parse_scheme


def test_the_first_code_is_in_the_lowest_bits_and_the_file_is_little_endian():
    words = pack_codes(torch.arange(8)[None], 4)
    assert words.dtype == torch.int32
    assert words.item() == 0x76543210
    assert words.numpy().astype("<i4").tobytes() == bytes([0x10, 0x32, 0x54, 0x76])


def test_the_words_of_3_and_2_bits_are_those_of_the_format():
    words = [word & 0xFFFFFFFF for word in pack_codes(torch.arange(32)[None] % 8, 3)[0].tolist()]
    assert words == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert pack_codes(torch.arange(16)[None] % 4, 2).item() & 0xFFFFFFFF == 0xE4E4E4E4


def test_a_large_last_code_reaches_the_sign_bit():
    words = pack_codes(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15], [15] * 8]), 4)
    assert words.flatten().tolist() == [0xF0000000 - 2**32, -1]
    assert unpack_codes(words, 8, 4).tolist() == [[0] * 7 + [15], [15] * 8]


def test_columns_past_the_last_hold_the_code_0():
    assert pack_codes(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x321]]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_is_one_number_with_the_first_code_in_the_lowest_bits(bits):
    codes = torch.randint(0, 2**bits, (1, 70), generator=torch.Generator().manual_seed(bits))
    row = sum(code << bits * i for i, code in enumerate(codes[0].tolist()))
    packed = pack_codes(codes, bits).numpy().astype("<i4").tobytes()
    assert packed == row.to_bytes(len(packed), "little")


# one word, less than one, a word and a bit, three words of 3 bits and a code, no multiple of anything, several groups
@pytest.mark.parametrize("K", [8, 1, 9, 33, 77, 192])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_codes_come_back(K, bits, dtype):
    codes = torch.randint(0, 2**bits, (5, K), generator=torch.Generator().manual_seed(K)).to(dtype)
    packed = pack_codes(codes, bits)
    words = {4: -(-K // 8), 3: 3 * -(-K // 32), 2: -(-K // 16)}[bits]
    assert packed.shape == (5, words)
    assert words_of(K, bits) == words
    unpacked = unpack_codes(packed, K, bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes.to(torch.uint8))


def test_the_last_group_may_be_shorter():
    assert expand_groups(torch.tensor([[1, 2]]), 3, 5).tolist() == [[1, 1, 1, 2, 2]]
    assert expand_groups(torch.tensor([[7]]), None, 3).tolist() == [[7, 7, 7]]


def test_int4_dequantizes_by_the_formula():
    codes = torch.zeros(2, 40, dtype=torch.uint8)
    codes[0, 0], codes[0, 33], codes[1, 39] = 15, 3, 9
    quantized = QuantizedTensor(
        parse_scheme("w4a16-g32-asym"),
        (2, 40),
        pack_codes(codes, 4),
        torch.tensor([[0.5, 2.0], [1.0, 4.0]], dtype=torch.bfloat16),
        torch.tensor([[1, 2], [0, 8]], dtype=torch.uint8),
    )
    w = quantized.dequantize()
    assert w.dtype == torch.float32
    assert (w[0, 0], w[0, 33], w[1, 39]) == (7.0, 2.0, 4.0)
    assert (w[0, 1], w[0, 34], w[1, 0], w[1, 38]) == (-0.5, -4.0, 0.0, -32.0)
    assert torch.equal(quantized.dequantize(torch.float64), w.double())


@pytest.mark.parametrize(("bits", "values"), [(3, [-1.0, 0.0, 0.75, -0.25]), (2, [-0.5, 0.0, 0.25, -0.25])])
def test_symmetric_codes_of_3_and_2_bits_have_the_zeros_4_and_2(bits, values):
    zero = 2 ** (bits - 1)
    codes = torch.tensor([[0, zero, 2 * zero - 1, zero - 1]])
    scales = torch.tensor([[0.25]], dtype=torch.bfloat16)
    scheme = parse_scheme(f"w{bits}a16-channel")
    quantized = QuantizedTensor(scheme, (1, 4), pack_codes(codes, bits), scales)
    assert quantized.dequantize().tolist() == [values]


def test_symmetric_int4_has_the_zero_8():
    codes = torch.tensor([[0, 8, 15, 7]])
    scales = torch.tensor([[0.25]], dtype=torch.bfloat16)
    quantized = QuantizedTensor(parse_scheme("w4a16-channel"), (1, 4), pack_codes(codes, 4), scales)
    assert quantized.dequantize().tolist() == [[-2.0, 0.0, 1.75, -0.25]]


def test_int8_and_fp8_rows_have_one_scale():
    scales = torch.tensor([[0.5], [2.0]])
    int8 = QuantizedTensor(
        parse_scheme("w8a8"), (2, 2), torch.tensor([[-127, 3], [1, 0]], dtype=torch.int8), scales
    )
    assert int8.dequantize().tolist() == [[-63.5, 1.5], [2.0, 0.0]]
    fp8 = QuantizedTensor(
        parse_scheme("fp8"), (2, 2), torch.tensor([[448.0, -0.5], [1.0, 0.0]]).to(torch.float8_e4m3fn), scales
    )
    assert fp8.dequantize().tolist() == [[224.0, -0.25], [2.0, 0.0]]


def test_fp8_blocks_share_a_scale_over_128_rows_and_columns():
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    codes = torch.ones(130, 200).to(torch.float8_e4m3fn)
    w = QuantizedTensor(parse_scheme("fp8-block"), (130, 200), codes, scales).dequantize()
    assert (w[127, 127], w[127, 128], w[128, 127], w[129, 199]) == (1, 2, 3, 4)


def test_tensors_lists_what_is_stored_and_its_bytes():
    scale = torch.ones(3, 1)
    codes = torch.zeros(3, 5, dtype=torch.int8)
    plain = QuantizedTensor(parse_scheme("w8a16"), (3, 5), codes, scale)
    assert (list(plain.tensors()), plain.nbytes) == (["codes", "scales"], 15 + 12)
    static = QuantizedTensor(parse_scheme("fp8-static"), (3, 5), codes, scale, input_scale=torch.ones(1))
    assert (list(static.tensors()), static.nbytes) == (["codes", "scales", "input_scale"], 15 + 12 + 4)


def quantized(
    label: str, N: int, K: int = 200, seed: int = 0, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    part = rtn(weight, parse_scheme(label), scale_dtype=scale_dtype)
    return replace(part, input_scale=torch.tensor([0.5])) if label == "fp8-static" else part


MERGED = ["w4a16-g32", "w4a16-g128-asym", "w4a16-channel", "w8a16", "w8a8", "fp8", "fp8-static", "fp8-w8a16"]


@pytest.mark.parametrize("label", MERGED)
def test_merged_rows_are_the_parts_rows_one_part_after_the_other(label):
    parts = [quantized(label, N, seed=N) for N in (24, 8, 10)]
    merged = merge_rows(parts)
    assert merged.shape == (42, 200)
    assert merged.scheme == parts[0].scheme
    assert merged.codes.dtype == parts[0].codes.dtype
    assert torch.equal(merged.dequantize(), torch.cat([part.dequantize() for part in parts]))
    # what one linear would store
    whole = QuantLinear(merged.scheme, 200, 42, scale_dtype=merged.scales.dtype)
    assert {k: t.shape for k, t in merged.tensors().items()} == {
        k: t.shape for k, t in whole.quantized().tensors().items()
    }


@pytest.mark.parametrize("label", MERGED)
def test_a_merged_product_is_the_parts_products_side_by_side(label):
    parts = [quantized(label, N, seed=N) for N in (32, 16, 16)]
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(9))
    apart = torch.cat([QuantLinear.from_quantized(part)(x) for part in parts], 1)
    merged = merge_rows(parts)
    magnitude = x.abs() @ merged.dequantize().abs().T
    error = (QuantLinear.from_quantized(merged)(x) - apart).abs()
    assert (error <= 208 * 2**-23 * magnitude).all()  # K float32 additions in another order


@pytest.mark.parametrize("label", MERGED)
def test_interleaved_rows_stand_in_turns_of_eight(label):
    gate, up = quantized(label, 24), quantized(label, 24, seed=1)
    w = merge_rows([gate, up], interleave=True).dequantize()
    assert w.shape == (48, 200)
    assert torch.equal(w.view(3, 2, 8, 200)[:, 0].flatten(0, 1), gate.dequantize())
    assert torch.equal(w.view(3, 2, 8, 200)[:, 1].flatten(0, 1), up.dequantize())


def test_merged_blocks_of_fp8_stay_whole():
    parts = [
        quantized("fp8-block", 256),
        quantized("fp8-block", 128, seed=1),
        quantized("fp8-block", 40, seed=2),
    ]
    merged = merge_rows(parts)
    assert merged.scales.shape == (4, 2)
    assert torch.equal(merged.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_one_part_alone_is_itself():
    part = quantized("w4a16-g32-asym", 24)
    for name, tensor in merge_rows([part]).tensors().items():
        assert torch.equal(tensor, part.tensors()[name])


REFUSED = [  # parts, interleave, what the message must say
    ((), False, "found no parts, expected at least one weight"),
    (("w4a16-g32", "w4a16-g64"), False, "part 1 has scheme w4a16-g64, expected w4a16-g32 as part 0"),
    (("w4a16-g32", "w4a16-g32-asym"), False, "part 1 has scheme w4a16-g32-asym, expected w4a16-g32"),
    (("w8a16", ("w8a16", 16, 100)), False, "part 1 has K 100, expected 200 as part 0"),
    (
        ("w4a16-g32", ("w4a16-g32", 16, 200, 0, torch.float16)),
        False,
        "part 1 has dtype of scales torch.float16, expected torch.bfloat16 as part 0",
    ),
    (
        ("fp8-block", "fp8-block"),
        False,
        "fp8-block parts have N 16, 16, expected multiples of 128 before the last",
    ),
    ((("fp8-block", 128), ("fp8-block", 128)), True, "fp8-block has one scale for 128 rows"),
    (("w8a16", "w8a16", "w8a16"), True, "interleaved parts have N 16, 16, 16, expected two"),
    (
        ("w8a16", ("w8a16", 24)),
        True,
        "interleaved parts have N 16, 24, expected two of the same multiple of 8",
    ),
    (
        (("w8a16", 12), ("w8a16", 12)),
        True,
        "interleaved parts have N 12, 12, expected two of the same multiple of 8",
    ),
]


@pytest.mark.parametrize(("parts", "interleave", "message"), REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_parts_that_cannot_be_merged_say_what_differs(parts, interleave, message):
    weights = [quantized(p, 16) if isinstance(p, str) else quantized(*p) for p in parts]
    with pytest.raises(QuantKitError, match=r"^merge_rows: ") as error:
        merge_rows(weights, interleave)
    assert message in str(error.value)


def test_parts_with_other_activation_scales_stay_apart():
    part = quantized("fp8-static", 16)
    other = replace(part, input_scale=torch.tensor([0.25]))
    with pytest.raises(QuantKitError, match=r"part 1 has input_scale 0\.25, expected 0\.5 as part 0"):
        merge_rows([part, other])
