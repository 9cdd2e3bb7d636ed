import pytest
import torch

from quantkit.packing import QuantizedTensor, expand_groups, pack_int4, unpack_int4
from quantkit.scheme import parse_scheme


def test_the_first_code_is_in_the_lowest_bits_and_the_file_is_little_endian():
    words = pack_int4(torch.arange(8)[None])
    assert words.dtype == torch.int32
    assert words.item() == 0x76543210
    assert words.numpy().astype("<i4").tobytes() == bytes([0x10, 0x32, 0x54, 0x76])


def test_a_large_last_code_reaches_the_sign_bit():
    words = pack_int4(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15], [15] * 8]))
    assert words.flatten().tolist() == [0xF0000000 - 2**32, -1]
    assert unpack_int4(words, 8).tolist() == [[0] * 7 + [15], [15] * 8]


def test_columns_past_the_last_hold_the_code_0():
    assert pack_int4(torch.tensor([[1, 2, 3]])).tolist() == [[0x321]]


# one word, less than one, a word and a bit, no multiple of anything, a row of several groups
@pytest.mark.parametrize("K", [8, 1, 9, 77, 192])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_int4_codes_come_back(K, dtype):
    codes = torch.randint(0, 16, (5, K), generator=torch.Generator().manual_seed(K)).to(dtype)
    packed = pack_int4(codes)
    assert packed.shape == (5, -(-K // 8))
    unpacked = unpack_int4(packed, K)
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
        pack_int4(codes),
        torch.tensor([[0.5, 2.0], [1.0, 4.0]], dtype=torch.bfloat16),
        torch.tensor([[1, 2], [0, 8]], dtype=torch.uint8),
    )
    w = quantized.dequantize()
    assert w.dtype == torch.float32
    assert (w[0, 0], w[0, 33], w[1, 39]) == (7.0, 2.0, 4.0)
    assert (w[0, 1], w[0, 34], w[1, 0], w[1, 38]) == (-0.5, -4.0, 0.0, -32.0)
    assert torch.equal(quantized.dequantize(torch.float64), w.double())


def test_symmetric_int4_has_the_zero_8():
    codes = torch.tensor([[0, 8, 15, 7]])
    scales = torch.tensor([[0.25]], dtype=torch.bfloat16)
    quantized = QuantizedTensor(parse_scheme("w4a16-channel"), (1, 4), pack_int4(codes), scales)
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
