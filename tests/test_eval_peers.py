"""Peers in the linear benchmark: their packing against stand-ins for the libraries, what is missing, what fails."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from quantkit import cli
from quantkit.eval.linears import (
    ERROR_BOUNDS,
    SHAPES,
    bench_linears,
    of_rounded,
    random_copies,
    relative_error,
)
from quantkit.eval.peers import PEERS, Peer, present
from quantkit.eval.records import read_records
from quantkit.packing import QuantizedTensor
from quantkit.scheme import PRESETS, parse_scheme

W4A16, W8A16, FP8 = PRESETS["w4a16"], PRESETS["w8a16"], PRESETS["fp8"]
CPU = torch.device("cpu")
SMALL = dict(replays=2, working_set=20_000, commit="abc1234")


def dequantized(q: QuantizedTensor):
    return lambda x: x @ q.dequantize(x.dtype).t()


def stand_in(name="stand-in", build=dequantized, **changes) -> Peer:
    return Peer(
        **{"name": name, "module": "torch", "scheme": W4A16, "build": build, "device": "cpu", **changes}
    )


def bench(peers, schemes=(W4A16,), Ms=(1, 17), **more):
    said: list[str] = []
    records = bench_linears(
        [("o", 64, 256)], schemes, Ms, "cpu", peers=peers, say=said.append, **{**SMALL, **more}
    )
    return records, said


# What the libraries compute, from their documented layouts: columns are read one by one.


def gptq_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's qweight int32 [K * bits / 32, N] -> codes [K, N]: the first of a word in its lowest bits."""
    per_word = 32 // bits
    rows = [words[k // per_word] >> bits * (k % per_word) & 2**bits - 1 for k in range(len(words) * per_word)]
    return torch.stack(rows)


def grouped_weight(codes: torch.Tensor, zero: int, scales: torch.Tensor) -> torch.Tensor:
    """Codes [K, N] and scales [K / group_size, N] -> float64 weight [K, N]."""
    return (codes.double() - zero) * scales.double().repeat_interleave(len(codes) // len(scales), 0)


class VllmOps(ModuleType):
    @staticmethod
    def gptq_marlin_repack(words, perm, size_k, size_n, num_bits):
        assert perm.numel() == 0
        assert words.is_contiguous()
        codes = gptq_codes(words, num_bits)
        assert codes.shape == (size_k, size_n)
        return codes

    @staticmethod
    def marlin_gemm(
        a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, g_idx, perm, workspace, b_q_type,
        size_m, size_n, size_k, is_k_full=True, use_atomic_add=False, use_fp32_reduce=False,
    ):  # fmt: skip
        assert all(x is None for x in (c, b_bias, a_scales, global_scale, b_zeros, g_idx, perm))
        assert (size_m, size_k) == a.shape
        assert b_scales.dtype == a.dtype
        return (a.double() @ grouped_weight(b_q_weight, b_q_type, b_scales)).to(a.dtype)

    @staticmethod
    def machete_prepack_B(words, a_type, b_type, group_scales_type):
        assert words.t().is_contiguous()  # column-major
        return gptq_codes(words, 4)

    @staticmethod
    def machete_mm(a, b_q, b_type, b_group_scales, b_group_size):
        assert len(b_q) // b_group_size == len(b_group_scales)
        return (a.double() @ grouped_weight(b_q, b_type, b_group_scales)).to(a.dtype)

    @staticmethod
    def scaled_int8_quant(x):
        scales = x.float().abs().amax(1, keepdim=True) / 127
        return (x / scales).round().to(torch.int8), scales, None

    @staticmethod
    def scaled_fp8_quant(x, use_per_token_if_dynamic):
        assert use_per_token_if_dynamic
        scales = x.float().abs().amax(1, keepdim=True) / 448
        return (x / scales).to(torch.float8_e4m3fn), scales

    @staticmethod
    def cutlass_scaled_mm(a, b, scale_a, scale_b, out_dtype):
        return (a.double() * scale_a @ b.double() * scale_b.t()).to(out_dtype)


class A16Wn:
    def __init__(self, device, dtype):
        self.dtype = dtype

    def from_weights(self, W_q, scales, zeros, W_nbits, group_size):
        groups = W_q.to(self.dtype).view(*scales.shape, group_size)
        w = ((groups - zeros[..., None]) * scales[..., None]).view(W_q.shape)

        def product(x):
            assert x.dtype == self.dtype
            return x @ w.t()

        return product


def int4pack(pairs, inner_k_tiles):
    """torch's tests: the even column is in the high half of a byte."""
    return torch.stack([pairs >> 4, pairs & 0xF], -1).flatten(1)


def int4pack_mm(x, codes, group_size, scales_and_zeros):
    scales, zeros = scales_and_zeros.double().repeat_interleave(group_size, 0).unbind(-1)
    return (x.double() @ ((codes.t().double() - 8) * scales + zeros)).to(x.dtype)


@pytest.fixture
def libraries(monkeypatch):
    """The modules that the peers import, in the place of the real ones, if any."""
    ops = VllmOps("vllm._custom_ops")
    utils = dict(
        marlin_permute_scales=lambda s, size_k, size_n, group_size: s,
        marlin_make_workspace_new=lambda device: torch.zeros(1),
    )
    modules = {
        "vllm": dict(_custom_ops=ops),
        "vllm.scalar_type": dict(scalar_types=SimpleNamespace(uint4b8=8, uint8b128=128)),
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.quantization": {},
        "vllm.model_executor.layers.quantization.utils": dict(marlin_utils=SimpleNamespace(**utils)),
        "gemlite": {},
        "gemlite.helper": dict(A16Wn=A16Wn),
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, ops.__name__, ops)
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", int4pack)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", int4pack_mm)


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: f"{p.name} {p.scheme.label}")
def test_a_peer_gets_the_weight_in_its_own_layout(peer, libraries):
    generator = torch.Generator().manual_seed(0)
    (q,) = random_copies(peer.scheme, 64, 256, generator, working_set=1)
    x = torch.randn(5, 256, generator=generator).to(peer.x_dtype)
    product = peer.build(q)
    if peer.rounded:
        (product,) = of_rounded([product], x, q.codes.dtype)
    error = relative_error(product(x), x, q.dequantize(torch.float64))
    assert error <= ERROR_BOUNDS[peer.scheme.activation]


def test_peers_come_after_our_kernel_and_know_their_library():
    records, said = bench([stand_in(), stand_in("half", x_dtype=torch.float16)])
    assert not said
    assert [(r["kernel"], r["M"]) for r in records] == [
        ("w4a16_int4pack", 1),
        ("w4a16_int4pack", 17),
        ("stand-in", 1),
        ("stand-in", 17),
        ("half", 1),
        ("half", 17),
    ]
    ours, theirs = records[0], records[-1]
    assert theirs.keys() - ours.keys() == {"library"}
    assert ours.keys() <= theirs.keys()
    assert theirs["library"].startswith("torch 2.")
    assert theirs["x_dtype"] == "float16"
    assert theirs["bf16_us"] == records[1]["bf16_us"]  # of the same run and M
    assert 0 < theirs["rel_error"] < 0.01
    json.dumps(records, allow_nan=False)


def test_a_peer_is_timed_for_its_scheme_alone_and_up_to_its_largest_m():
    records, _ = bench([stand_in(max_M=16)], (W8A16, W4A16))
    assert [(r["scheme"], r["M"]) for r in records if "library" in r] == [("w4a16-g128", 1)]
    assert not [r for r in bench([stand_in()], (parse_scheme("w4a16-g32"),))[0] if "library" in r]


def test_a_peer_of_rounded_x_stands_beside_the_product_alone():
    seen = []

    def build(q):
        def product(x, x_scales):
            seen.append((x.dtype, tuple(x_scales.shape)))
            return (x.double() * x_scales @ q.dequantize(torch.float64).t()).bfloat16()

        return product

    records, said = bench([stand_in(scheme=FP8, build=build, rounded=True)], (FP8,), Ms=(3,))
    assert not said
    assert {*seen} == {(torch.float8_e4m3fn, (3, 1))}
    (theirs,) = (r for r in records if "library" in r)
    (ours,) = (r for r in records if "library" not in r and r.get("variant") == "x in 8 bits")
    assert theirs["variant"] == ours["variant"]
    assert theirs.keys() - ours.keys() == {"library"}
    assert theirs["rel_error"] == pytest.approx(ours["rel_error"], rel=0.01)  # of the same codes of x


def test_a_peer_with_a_wrong_product_gets_no_time():
    wrong = stand_in(build=lambda q: lambda x: 1.1 * dequantized(q)(x))
    record = bench([wrong], Ms=(1,))[0][-1]
    assert record["kernel"] == "stand-in"
    assert record["us"] is None
    assert "exceeds 0.01" in record["refused"]


def test_a_peer_that_fails_at_one_m_is_left_out_there():
    def build(q):
        def product(x):
            if len(x) == 17:
                raise RuntimeError("no kernel image\nand a long story")
            return dequantized(q)(x)

        return product

    records, said = bench([stand_in(build=build), stand_in("next")], Ms=(1, 17, 33))
    assert [r["M"] for r in records if r["kernel"] == "stand-in"] == [1, 33]
    assert [r["M"] for r in records if r["kernel"] == "next"] == [1, 17, 33]
    assert said == ["stand-in w4a16-g128 (64, 256), M = 17: no kernel image"]


def test_a_peer_that_cannot_pack_the_shape_is_left_out():
    def build(q):
        raise ValueError("K must be a multiple of 512")

    records, said = bench([stand_in(build=build)])
    assert {r["kernel"] for r in records} == {"w4a16_int4pack"}
    assert said == ["stand-in w4a16-g128 (64, 256): K must be a multiple of 512"]


def test_one_line_names_the_missing_and_the_rest_is_found(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise OSError('libcudart.so.12: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    there = stand_in()
    peers = [
        Peer("absent", "no_such_module.ops", W4A16, dequantized, device="cpu"),
        Peer("absent too", "no_such_module.ops", W4A16, dequantized, device="cpu"),
        Peer("broken", "broken_peer", W4A16, dequantized, device="cpu"),
        Peer("of another scheme", "no_such_module", W8A16, dequantized, device="cpu"),
        Peer("of a gpu", "torch", W4A16, dequantized),
        there,
    ]
    said: list[str] = []
    assert present(peers, [W4A16], CPU, said.append) == [there]
    assert said == [
        "peers not timed: absent, absent too (No module named 'no_such_module'); "
        "broken (libcudart.so.12: not found); of a gpu (needs a cuda device)"
    ]
    assert present([there], [W4A16], CPU, said.append) == [there]
    assert len(said) == 1


@pytest.mark.parametrize("option", ["--peers", "--no-peers"])
def test_the_command_times_peers_with_shapes(option, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SHAPES, "tiny", [("o", 64, 256)])
    monkeypatch.setattr(cli, "PEERS", (stand_in(), Peer("absent", "no_such_module", W4A16, dequantized)))
    command = ["quantkit", "bench", "--shapes", "tiny", "--no-decode", "--device", "cpu", "--m", "1", option]
    monkeypatch.setattr(sys, "argv", [*command, "--scheme", "w4a16", "--records", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out = capsys.readouterr().out
    timed = option == "--peers"
    assert left.value.code == 0
    assert ("peers not timed: absent (needs a cuda device)" in out) == timed
    assert ("w4a16-g128 stand-in" in out) == timed
    kernels = [r["kernel"] for r in read_records(tmp_path / "linears.jsonl")]
    assert kernels == ["w4a16_int4pack", "stand-in"][: 1 + timed]
