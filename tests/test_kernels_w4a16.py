"""W4A16 on tiles: every kernel in many launches, against float64, within the rounding that its formula allows.

Without a GPU the kernels run in Triton's interpreter and in float16: see test_kernels_products.py. x stands in the
corner of a larger tensor of NaNs, so that a read past its last row or column shows in y.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.calibration.rtn import rtn
from quantkit.fuse import SwiGLULinear
from quantkit.fuse import merged as merged_linear
from quantkit.kernels import cpu, dequantize, ops, stream_k, w4a16, w4a16_decode, w4a16_hopper, w4a16_wide
from quantkit.kernels.dispatch import target_of
from quantkit.kernels.int4tiles import not_tileable, pack_tiles, tiled_shape, unpack_tiles
from quantkit.linear import QuantLinear
from quantkit.packing import merge_rows, unpack_codes
from quantkit.scheme import parse_scheme
from rounding import DEVICE, GPU, Random, assert_within

gpu = pytest.mark.gpu
F16, BF16 = torch.float16, torch.bfloat16
DTYPES = [F16, pytest.param(BF16, marks=gpu)]  # the interpreter multiplies the bit patterns of bfloat16
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
zeros = pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
group_sizes = pytest.mark.parametrize("group_size", [0, 32, 64, 96, 128, 256])
SHAPES = [  # N, K
    (64, 512),  # nothing ragged
    (40, 300),  # half a strip, a word that is not full, a ragged group of every size
    (72, 20),  # K shorter than the group, and than a tile
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def in_nans(x: Tensor) -> Tensor:
    """x as a corner of a larger tensor, the rest of which is NaN."""
    M, K = x.shape
    columns = K + 48 + -K % 8  # rows at multiples of 16 bytes, as TMA wants them
    larger = torch.full((M + 3, columns), float("nan"), dtype=x.dtype, device=x.device)
    larger[:M, :K] = x
    return larger[:M, :K]


@dataclass
class Product:
    """One call of a kernel on tiles, and what it should return."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    group_size: int
    swiglu: bool = False

    @classmethod
    def of(
        cls,
        random: Random,
        M: int,
        N: int,
        K: int,
        group_size: int,
        asymmetric: bool,
        dtype: torch.dtype,
        scales_dtype: torch.dtype | None = None,
        bias: bool = False,
        residual: bool = False,
        swiglu: bool = False,
    ) -> "Product":
        groups = -(-K // group_size) if group_size else 1
        return cls(
            in_nans(random.x(M, K, dtype)),
            random.int4(N, K),
            random.scales(N, groups, dtype=scales_dtype or dtype),
            random.zeros(N, groups) if asymmetric else None,
            random.bias(N, dtype) if bias else None,
            random.x(M, N // 2 if swiglu else N, dtype) if residual else None,
            group_size,
            swiglu,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, N, K."""
        return len(self.x), len(self.codes), self.x.shape[1]

    @property
    def arguments(self) -> tuple:
        """What every kernel on tiles takes, and the op."""
        _, N, K = self.shape
        tiles = pack_tiles(self.codes, self.scales, self.zeros, self.group_size, K)
        return self.x, *tiles, self.bias, self.residual, self.group_size, N, self.swiglu

    def check(self, y: Tensor, roundings: int = 0) -> None:
        """roundings: of a weight, and of what is held in x.dtype before y."""
        K = self.shape[2]
        weight = self.codes, self.scales, self.zeros
        plain = w4a16.reference(self.x, *weight, self.bias, self.group_size)
        magnitude = self.x.double().abs() @ w4a16.dequantize(*weight, self.group_size, K).abs().T
        if self.bias is not None:
            magnitude += self.bias.double().abs()
        if self.swiglu:  # |silu'| < 1.1, and the product of the two errors
            gate, up = plain.unflatten(1, (-1, 2, 8)).unbind(2)
            of_gate, of_up = magnitude.unflatten(1, (-1, 2, 8)).unbind(2)
            lost = (K + 8) * 2**-23 + roundings * torch.finfo(y.dtype).eps / 2
            magnitude = 1.1 * of_gate * (up.abs() + lost * of_up) + F.silu(gate).abs() * of_up
            magnitude = magnitude.flatten(1)
        residual = None
        if self.residual is not None:
            residual = self.residual.double()
            magnitude += residual.abs()
        expected = cpu.epilogue(plain, residual, self.swiglu)
        assert y.dtype == self.x.dtype
        assert_within(y, expected, magnitude, K, roundings)


def decode_launch(
    rows: int, warps_n: int, warps_k: int, depth: int, stages: int, programs: int = 0
) -> w4a16_decode.Config:
    return dict(
        rows=rows, warps_n=warps_n, warps_k=warps_k, depth=depth, stages=stages, programs=programs,
        max_registers=0,
    )  # fmt: skip


def wide_launch(block_m: int, rows: int, warps: int, tiles: int, stages: int) -> w4a16_wide.Config:
    return dict(block_m=block_m, rows=rows, warps=warps, tiles=tiles, stages=stages)


@zeros
@group_sizes
@pytest.mark.parametrize("M", [1, 3, 8, 9, 16])
@dtypes
@shapes
def test_decode(random: Random, shape, dtype, M, group_size, asymmetric):
    product = Product.of(random, M, *shape, group_size, asymmetric, dtype)
    product.check(w4a16_decode.w4a16_decode(*product.arguments))


# For N = 136 and K = 700: 9 strips, the last of them half, and 12 tiles (6 units of two) along K, the last empty.
DECODE_LAUNCHES = [
    decode_launch(1, 1, 1, 1, 1),
    decode_launch(2, 1, 4, 2, 1),
    decode_launch(4, 1, 2, 1, 1),
    decode_launch(1, 1, 4, 4, 1),
    decode_launch(1, 2, 2, 1, 3),
    decode_launch(2, 4, 2, 1, 3),
    decode_launch(4, 1, 4, 2, 3),
    decode_launch(1, 1, 8, 1, 1),
]
STREAM_LAUNCHES = [
    decode_launch(1, 1, 2, 1, 1, programs=1),  # one program, every tile in turn
    decode_launch(1, 1, 2, 1, 1, programs=2),  # a cut in the middle of a tile
    decode_launch(2, 1, 2, 2, 1, programs=5),  # several tiles a program, cut at odd places
    decode_launch(1, 2, 1, 1, 3, programs=7),
    decode_launch(2, 4, 2, 1, 3, programs=11),  # many programs a tile
    decode_launch(4, 1, 1, 1, 1, programs=16),  # nearly one a step
    decode_launch(1, 1, 4, 1, 1, programs=97),  # more programs than steps: some have nothing to do
]


def launch_name(launch: dict[str, int]) -> str:
    return " ".join(f"{name}{value}" for name, value in launch.items() if name != "max_registers")


# the interpreter takes seconds a launch: two of the four cases there
@pytest.mark.parametrize(
    ("M", "group_size"),
    [(2, 32), (11, 128), pytest.param(2, 128, marks=gpu), pytest.param(11, 32, marks=gpu)],
)
@pytest.mark.parametrize("launch", DECODE_LAUNCHES + STREAM_LAUNCHES, ids=launch_name)
@dtypes
def test_decode_in_every_launch(random: Random, dtype, launch, M, group_size):
    product = Product.of(random, M, 136, 700, group_size, group_size == 32, dtype)
    arguments = product.arguments
    y = w4a16_decode.w4a16_decode(*arguments, launch)
    product.check(y)
    if launch["programs"]:  # their sums are added in a fixed order, and their counters stand at zero again
        assert torch.equal(w4a16_decode.w4a16_decode(*arguments, launch), y)
        assert not stream_k.counters(DEVICE).any()


def test_decode_takes_no_more_rows_a_warp_than_there_are(random: Random):
    product = Product.of(random, 2, 10, 200, 64, True, F16)
    product.check(w4a16_decode.w4a16_decode(*product.arguments, decode_launch(4, 1, 2, 1, 1)))


def test_decode_without_a_counter_a_tile_gives_every_program_whole_tiles(random: Random, monkeypatch):
    monkeypatch.setattr(w4a16_decode, "COUNTERS", 2)
    product = Product.of(random, 2, 72, 300, 32, False, F16)
    product.check(w4a16_decode.w4a16_decode(*product.arguments, decode_launch(1, 1, 1, 1, 1, programs=7)))


def test_decode_refuses_more_rows_than_it_takes(random: Random):
    product = Product.of(random, 17, 16, 128, 128, False, F16)
    with pytest.raises(ValueError, match="w4a16_decode: x has 17 rows, expected at most 16; use w4a16_wide"):
        w4a16_decode.w4a16_decode(*product.arguments)


@zeros
@group_sizes
@pytest.mark.parametrize("M", [17, 33, 130])
@dtypes
@shapes
def test_wide(random: Random, shape, dtype, M, group_size, asymmetric):
    product = Product.of(random, M, *shape, group_size, asymmetric, dtype)
    product.check(w4a16_wide.w4a16_wide(*product.arguments), roundings=1)


WIDE_LAUNCHES = [
    wide_launch(16, 1, 4, 2, 1),
    wide_launch(32, 2, 4, 1, 3),
    wide_launch(64, 1, 8, 1, 2),
    wide_launch(64, 2, 4, 2, 4),
    wide_launch(128, 2, 4, 2, 2),
    wide_launch(128, 1, 8, 2, 3),
]


def hopper_launch(block_m: int, block_n: int, stages: int, programs: int = 0) -> w4a16_hopper.Config:
    return dict(block_m=block_m, block_n=block_n, stages=stages, programs=programs)


# For M = 70, N = 136 and K = 2100: 17 steps of 128 columns, more than a ring has slots, and a last one that is not full.
HOPPER_LAUNCHES = [
    hopper_launch(8, 128, 4),
    hopper_launch(16, 256, 3),
    hopper_launch(32, 64, 6),
    hopper_launch(64, 256, 5),
    hopper_launch(128, 64, 5),
    hopper_launch(128, 128, 3),
    hopper_launch(256, 64, 3),
    hopper_launch(256, 128, 2),
    hopper_launch(32, 64, 6, programs=3),  # equal shares of whole tiles
    hopper_launch(64, 128, 4, programs=8),  # each tile cut in two
    hopper_launch(16, 64, 4, programs=7),  # cut at odd places, several tiles a program
    hopper_launch(128, 64, 3, programs=29),  # ten programs a tile
    hopper_launch(64, 256, 3, programs=1000),  # one a step
]


@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("launch", WIDE_LAUNCHES, ids=launch_name)
@dtypes
def test_wide_in_every_launch(random: Random, dtype, launch, group_size):
    product = Product.of(random, 70, 136, 700, group_size, group_size == 32, dtype)
    product.check(w4a16_wide.w4a16_wide(*product.arguments, launch), roundings=1)


hopper = pytest.mark.skipif(
    not GPU or target_of(DEVICE) != "sm_90", reason="written in Gluon, which has no interpreter, for sm_90"
)


@gpu
@hopper
@zeros
@group_sizes
@pytest.mark.parametrize("M", [1, 17, 33, 130, 300])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (200, 1500)], ids=lambda s: "x".join(map(str, s)))
def test_hopper(random: Random, shape, dtype, M, group_size, asymmetric):
    product = Product.of(random, M, *shape, group_size, asymmetric, dtype)
    product.check(w4a16_hopper.w4a16_hopper(*product.arguments), roundings=1)


@gpu
@hopper
@pytest.mark.parametrize("group_size", [0, 32, 64, 128, 256])
@pytest.mark.parametrize("launch", HOPPER_LAUNCHES, ids=launch_name)
def test_hopper_in_every_launch(random: Random, launch, group_size):
    product = Product.of(random, 70, 136, 2100, group_size, group_size in (32, 256), BF16)
    arguments = product.arguments
    y = w4a16_hopper.w4a16_hopper(*arguments, launch)
    product.check(y, roundings=1)
    assert torch.equal(w4a16_hopper.w4a16_hopper(*arguments, launch), y)
    assert not stream_k.counters(DEVICE).any()


@gpu
@hopper
@pytest.mark.parametrize("reason", ["x at an odd address", "y in odd rows", "a group that fits no step"])
def test_hopper_leaves_to_the_wide_kernel_what_it_cannot_take(random: Random, reason):
    N, group_size = 141 if "rows" in reason else 48, 96 if "group" in reason else 64
    product = Product.of(random, 20, N, 300, group_size, True, BF16)
    x, *rest = product.arguments
    if "address" in reason:
        x = torch.zeros(20, 303, dtype=BF16, device=DEVICE)[:, 1:301].copy_(x)
    product.check(w4a16_hopper.w4a16_hopper(x, *rest), roundings=1)


@gpu
@hopper
def test_hopper_without_a_counter_a_tile_gives_every_program_one_tile(random: Random, monkeypatch):
    monkeypatch.setattr("quantkit.kernels.hopper.COUNTERS", 1)
    product = Product.of(random, 40, 136, 600, 128, False, BF16)
    product.check(
        w4a16_hopper.w4a16_hopper(*product.arguments, hopper_launch(16, 64, 4, programs=7)), roundings=1
    )


SIZES = [
    (M, N, K)
    for M in (17, 40, 100, 300, 5000)
    for N, K in ((64, 512), (4096, 4096), (4096, 14336), (57344, 8192))
]


@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_launches_of_hoppers_kernel_fit_its_gpu(size, group_size):
    launches = w4a16_hopper.candidates(*size, group_size)
    assert launches[0] == w4a16_hopper.config(*size, group_size)
    for launch in launches:
        assert launch["block_n"] <= 128 or launch["block_m"] <= w4a16_hopper.WIDE_ROWS
        assert w4a16_hopper.shared_bytes(launch, group_size) <= w4a16_hopper.SHARED
        assert launch["stages"] >= 3
    assert len({tuple(launch.items()) for launch in launches}) == len(launches)


@zeros
@group_sizes
@dtypes
@shapes
def test_dequantizing_tiles_for_the_vendors_gemm(random: Random, shape, dtype, group_size, asymmetric):
    product = Product.of(random, 5, *shape, group_size, asymmetric, dtype)
    product.check(dequantize.w4a16_tiles_vendor(*product.arguments), roundings=1)


FOLLOWING = list(itertools.product([False, True], repeat=3))
KERNELS = {  # kernel, M, launch, roundings before y
    "decode": (w4a16_decode.w4a16_decode, 3, None, 0),
    "decode 16": (w4a16_decode.w4a16_decode, 16, decode_launch(2, 1, 4, 1, 3), 0),
    "stream": (w4a16_decode.w4a16_decode, 5, decode_launch(2, 2, 2, 1, 1, programs=5), 0),
    "wide": (w4a16_wide.w4a16_wide, 37, wide_launch(32, 2, 4, 2, 3), 1),
    "hopper": (w4a16_hopper.w4a16_hopper, 37, None, 1),
    "hopper few": (
        w4a16_hopper.w4a16_hopper,
        16,
        hopper_launch(16, 128, 4),
        0,
    ),  # the scale after the product
    "hopper stream": (w4a16_hopper.w4a16_hopper, 130, hopper_launch(128, 64, 3, programs=5), 1),
    # w, the product, the bias, silu, silu(gate) * up
    "vendor": (lambda *a: dequantize.w4a16_tiles_vendor(*a[:-1]), 4, None, 5),
}


@pytest.mark.parametrize(("bias", "residual", "swiglu"), FOLLOWING)
@pytest.mark.parametrize(
    "kernel", [pytest.param(name, marks=[gpu, hopper] if "hopper" in name else []) for name in KERNELS]
)
@dtypes
def test_what_follows_the_product(random: Random, dtype, kernel, bias, residual, swiglu):
    run, M, launch, roundings = KERNELS[kernel]
    N = 144 if swiglu else 136 if "hopper" in kernel else 141
    group_size = 128 if roundings == 0 else 64  # hopper rounds no weight where a group is 128 columns
    product = Product.of(
        random, M, N, 300, group_size, True, dtype, bias=bias, residual=residual, swiglu=swiglu
    )
    product.check(run(*product.arguments, launch), roundings)


@pytest.mark.parametrize("group_size", [0, 96, 128])
@dtypes
def test_scales_may_have_the_other_16_bit_type(random: Random, dtype, group_size):
    other = BF16 if dtype == F16 else F16
    few = Product.of(random, 3, 40, 300, group_size, True, dtype, other)
    few.check(w4a16_decode.w4a16_decode(*few.arguments))
    few.check(dequantize.w4a16_tiles_vendor(*few.arguments), roundings=1)
    many = Product.of(random, 20, 40, 300, group_size, True, dtype, other)
    many.check(w4a16_wide.w4a16_wide(*many.arguments), roundings=3)


@pytest.mark.parametrize("kind", ["outliers", "mean"])
@pytest.mark.parametrize(
    "kernel",
    [
        *("decode", "stream", "wide"),
        *(pytest.param(name, marks=[gpu, hopper]) for name in ("hopper", "hopper stream", "hopper few")),
    ],
)
@dtypes
def test_hard_activations_cost_no_more_than_dequantizing_first(random: Random, dtype, kernel, kind):
    """Columns of 1000, and a mean of 1000: the sums nearly cancel."""
    run, M, launch, roundings = KERNELS[kernel]
    N, K, group_size = 136, 512, 128
    product = Product.of(random, M, N, K, group_size, True, dtype)
    x = torch.randn(M, K, generator=random.generator)
    if kind == "mean":
        x += 1000
    else:
        x[:, ::37] = 1000
    product = replace(product, x=in_nans(x.to(DEVICE, dtype)))
    weight = product.codes, product.scales, product.zeros
    exact = w4a16.reference(product.x, *weight, None, group_size)
    w = w4a16.dequantize(*weight, group_size, K).to(dtype)
    plain = F.linear(product.x, w)
    assert torch.isfinite(plain).all()

    error = (run(*product.arguments, launch).double() - exact).norm()
    # those that round a weight round the same ones, and adds up the same terms in another order
    assert error <= (plain.double() - exact).norm() * (1 if roundings == 0 else 1.01)


@zeros
@group_sizes
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (17, 129), (130, 8)], ids=str)
def test_tiles_hold_every_code_where_equation_1_says(random: Random, shape, group_size, asymmetric):
    N, K = shape
    groups = -(-K // group_size) if group_size else 1
    codes, scales = random.int4(N, K), random.scales(N, groups, dtype=BF16)
    z = random.zeros(N, groups) if asymmetric else None
    tiles, tile_scales, tile_zeros = pack_tiles(codes, scales, z, group_size, K)
    strips, along_k, all_groups = tiled_shape(N, K, group_size)
    assert tiles.shape == (strips, along_k, 8, 4, 4)
    assert tile_scales.shape == (strips, all_groups, 8, 2)

    q = torch.zeros(strips * 16, along_k * 64, dtype=torch.uint8, device=DEVICE)
    q[:N, :K] = unpack_codes(codes, K, 4)
    s, t, g, c, kt = torch.meshgrid(*(torch.arange(n) for n in tiles.shape), indexing="ij")
    for h, c8, e in itertools.product(range(2), repeat=3):
        n, k = 16 * s + 8 * h + g, 64 * t + 16 * kt + 8 * c8 + 2 * c + e
        assert torch.equal((tiles >> 4 * (2 * h + c8 + 4 * e) & 0xF).to(torch.uint8), q[n, k])

    for in_tiles, by_row in ((tile_scales, scales), (tile_zeros, z)):
        if by_row is None:
            assert in_tiles is None
            continue
        padded = torch.zeros(strips * 16, all_groups, dtype=by_row.dtype, device=DEVICE)
        padded[:N, :groups] = by_row
        s, group, g, h = torch.meshgrid(*(torch.arange(n) for n in in_tiles.shape), indexing="ij")
        assert torch.equal(in_tiles, padded[16 * s + 8 * h + g, group])

    back = unpack_tiles(tiles, tile_scales, tile_zeros, group_size, N, K)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)
    assert back[2] is None if z is None else torch.equal(back[2], z)


@pytest.mark.parametrize(
    ("group_size", "x_dtype", "scales_dtype", "reason"),
    [
        (48, BF16, BF16, "needs a group_size that is a multiple of 32, or 0, not 48"),
        (
            32,
            torch.float32,
            BF16,
            "needs x and scales in float16 or bfloat16, not torch.float32 and torch.bfloat16",
        ),
        (
            0,
            F16,
            torch.float32,
            "needs x and scales in float16 or bfloat16, not torch.float16 and torch.float32",
        ),
    ],
)
def test_what_cannot_be_tiled_says_why(random: Random, group_size, x_dtype, scales_dtype, reason):
    assert not_tileable(group_size, x_dtype, scales_dtype) == reason
    assert not_tileable(32, F16, BF16) is None
    if x_dtype != torch.float32:
        scales = random.scales(16, 2, dtype=scales_dtype)
        with pytest.raises(ValueError, match="pack_tiles: needs"):
            pack_tiles(random.int4(16, 64), scales, None, group_size, 64)


op = torch.ops.quantkit.w4a16_tiles


@zeros
@group_sizes
@pytest.mark.parametrize("dtype", [F16, BF16, torch.float32], ids=str)
def test_the_op(random: Random, dtype, group_size, asymmetric):
    product = Product.of(
        random, 3, 48, 300, group_size, asymmetric, dtype, BF16, bias=True, residual=True, swiglu=asymmetric
    )
    product.check(op(*product.arguments), roundings=5)


def test_the_op_takes_any_leading_shape_and_no_rows(random: Random):
    product = Product.of(random, 6, 48, 100, 32, True, F16, residual=True)
    x, *weight, bias, residual, group_size, N, swiglu = product.arguments
    rest = group_size, N, swiglu
    y = op(x, *weight, bias, residual, *rest)
    assert torch.equal(
        op(x.unflatten(0, (2, 3)), *weight, bias, residual.view(2, 3, N), *rest), y.view(2, 3, N)
    )
    assert torch.equal(op(x.t().contiguous().t(), *weight, bias, residual, *rest), y)
    for empty in (x[:0], x[:0].view(2, 0, 100)):
        assert op(empty, *weight, bias, None, *rest).shape == (*empty.shape[:-1], N)
        assert op(empty, *weight, bias, None, group_size, N, True).shape == (*empty.shape[:-1], N // 2)


@pytest.mark.parametrize("swiglu", [False, True], ids=["", "swiglu"])
def test_the_op_passes_opcheck(random: Random, swiglu):
    product = Product.of(random, 3, 32, 100, 32, True, F16, bias=True, residual=True, swiglu=swiglu)
    x, *rest = product.arguments
    torch.library.opcheck(op, (x.contiguous(), *rest))


def test_the_op_compiles_without_a_graph_break_and_with_any_number_of_rows(random: Random):
    product = Product.of(random, 7, 32, 100, 32, True, F16, bias=True)
    x, *weight, bias, _, group_size, N, swiglu = product.arguments
    call = lambda x: op(x * 2, *weight, bias, None, group_size, N, swiglu) + 1
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="inductor" if GPU else "aot_eager")
    for M in (3, 7):
        torch.testing.assert_close(compiled(x[:M]), call(x[:M]))


WRONG = [  # position of the argument, its replacement, what the message must say
    (0, lambda x: x.double(), "x is float64, expected float32 or float16 or bfloat16; convert x"),
    (0, lambda x: x.sum(), "x has shape [], expected [..., K]"),
    (0, lambda x: torch.cat([x, x], 1), "tiles has shape [2, 2, 8, 4, 4], expected [2, 4, 8, 4, 4] for x [3, 200]"),
    (1, lambda t: t.long(), "tiles is int64, expected int32"),
    (1, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "call .contiguous() once after loading"),
    (2, lambda t: t.float(), "scales is float32, expected float16 or bfloat16"),
    (2, lambda t: t[:, :1].contiguous(), "scales has shape [2, 1, 8, 2], expected [2, 4, 8, 2]"),
    (3, lambda t: t.int(), "zeros is int32, expected uint8"),
    (3, lambda t: t[:1], "zeros has shape [1, 4, 8, 2], expected [2, 4, 8, 2]"),
    (4, lambda b: b[:5], "bias has shape [5], expected [32]"),
    (5, lambda r: r.float(), "residual is float32, expected float16"),
    (5, lambda r: r[:1], "residual has shape [1, 32], expected [3, 32]"),
    (6, lambda g: 48, "group_size is 48, expected a multiple of 32, or 0 for one scale a row"),
    (6, lambda g: -32, "group_size is -32, expected a multiple of 32"),
    (7, lambda n: 33, "tiles has shape [2, 2, 8, 4, 4], expected [3, 2, 8, 4, 4]"),
    (8, lambda s: True, "residual has shape [3, 32], expected [3, 16]"),
]  # fmt: skip


@pytest.mark.parametrize(("at", "change", "message"), WRONG, ids=[wrong[2][:36] for wrong in WRONG])
def test_a_wrong_argument_is_named(random: Random, at, change, message):
    product = Product.of(random, 3, 32, 100, 32, True, F16, bias=True, residual=True)
    arguments = list(product.arguments)
    arguments[at] = change(arguments[at])
    with pytest.raises(ValueError, match=r"^w4a16_tiles: ") as error:
        op(*arguments)
    assert message in str(error.value)


def test_swiglu_wants_whole_turns_of_gates_and_ups(random: Random):
    arguments = Product.of(random, 3, 40, 100, 32, True, F16).arguments
    with pytest.raises(ValueError, match="w4a16_tiles: N is 40, expected a multiple of 16 for SwiGLU"):
        op(*arguments[:-1], True)


@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g128-asym", "w4a16-channel"])
@dtypes
def test_merged_gates_and_ups_with_swiglu(random: Random, dtype, label):
    """Against silu(gate) * up of the two weights apart: in every kernel, and in the op."""
    M, N, K, scheme = 5, 72, 300, parse_scheme(label)
    group_size = scheme.group_size or 0
    gate, up = (rtn(torch.randn(N, K, generator=random.generator) / 8, scheme) for _ in range(2))
    merged = merge_rows([gate, up], interleave=True)
    tensors = {name: tensor.to(DEVICE) for name, tensor in merged.tensors().items()}
    x = in_nans(random.x(M, K, dtype))
    product = Product(
        x, tensors["codes"], tensors["scales"], tensors.get("zeros"), None, None, group_size, swiglu=True
    )
    of_gate, of_up = (x.double() @ t.dequantize(torch.float64).to(DEVICE).T for t in (gate, up))
    weight = product.codes, product.scales, product.zeros
    plain = w4a16.reference(x, *weight, None, group_size)
    torch.testing.assert_close(cpu.epilogue(plain, None, True), F.silu(of_gate) * of_up)
    product.check(op(*product.arguments), roundings=5)
    product.check(w4a16_decode.w4a16_decode(*product.arguments))
    # the scales are bfloat16: past the first, float16 x costs a rounding of the scale and of the product
    product.check(w4a16_wide.w4a16_wide(*product.arguments), roundings=3)


@pytest.mark.usefixtures("laid_out_as_on_a_gpu")
@pytest.mark.parametrize("M", [3, 20])
@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g128-asym"])
@dtypes
def test_gate_and_up_of_a_fused_block(random: Random, monkeypatch, dtype, label, M):
    """By the kernels that a GPU has for them, together and apart."""
    if not GPU:
        monkeypatch.setattr(ops, "target_of", lambda device: "sm_80")
    N, K, scheme = 40, 300, parse_scheme(label)
    parts = [
        QuantLinear.from_quantized(
            rtn(torch.randn(N, K, generator=random.generator) / 8, scheme), random.bias(N, dtype).cpu()
        )
        for _ in range(2)
    ]
    for part in parts:
        part.to(DEVICE).repack(dtype)
    linear = merged_linear(parts, swiglu=True)
    assert type(linear) is SwiGLULinear
    weight, x = linear.quantized(), in_nans(random.x(M, K, dtype))
    group_size = scheme.group_size or 0
    product = Product(
        x, weight.codes, weight.scales, weight.zeros, linear.bias, None, group_size, swiglu=True
    )
    product.check(linear(x), roundings=0 if M == 3 else 3)
    apart = torch.cat([part(x) for part in parts], 1)
    product.check(torch.ops.quantkit.swiglu_quantize(apart, None, None, 0)[0], roundings=6)


# The rest needs a GPU.

REAL = [(28672, 4096), (4096, 14336), (1000, 4100)]  # N, K


@gpu
@zeros
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("M", [1, 5, 16, 33, 128, 257])
@pytest.mark.parametrize("shape", REAL, ids=lambda s: "x".join(map(str, s)))
def test_layers_of_real_models(random: Random, shape, M, dtype, group_size, asymmetric):
    product = Product.of(random, M, *shape, group_size, asymmetric, dtype)
    arguments = product.arguments
    product.check(op(*arguments), roundings=1)
    product.check(dequantize.w4a16_tiles_vendor(*arguments), roundings=1)
    if M <= w4a16_decode.MAX_M:
        product.check(w4a16_decode.w4a16_decode(*arguments))
    else:
        product.check(w4a16_wide.w4a16_wide(*arguments), roundings=1)


STREAM = decode_launch(2, 4, 2, 1, 3, programs=264)


@gpu
@dtypes
def test_a_captured_stream_k_launch_replays_with_another_x(random: Random, dtype):
    product = Product.of(random, 16, 4096, 4096, 128, False, dtype)
    x, *rest = replace(product, x=product.x.contiguous()).arguments
    other = random.x(16, 4096, dtype)
    w4a16_decode.w4a16_decode(x, *rest, STREAM)  # the first call compiles the kernel and makes the counters
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w4a16_decode.w4a16_decode(x, *rest, STREAM)
    for values in (other, other * 2, x.clone()):
        x.copy_(values)
        graph.replay()
        assert torch.equal(y, w4a16_decode.w4a16_decode(values, *rest, STREAM))
    assert not stream_k.counters(DEVICE).any()


@gpu
def test_two_streams_may_run_one_layer_at_once(random: Random):
    product = Product.of(random, 16, 4096, 4096, 128, False, BF16)
    x, *rest = product.arguments
    xs = [x, random.x(16, 4096, BF16)]
    expected = [w4a16_decode.w4a16_decode(x, *rest, STREAM) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(100):
        for x, stream, ys in zip(xs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                ys.append(w4a16_decode.w4a16_decode(x, *rest, STREAM))
    torch.cuda.synchronize()
    for ys, y in zip(found, expected, strict=True):
        assert all(torch.equal(other, y) for other in ys)


@gpu
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g128-asym", "w4a16-channel"])
def test_a_linear_on_a_gpu_holds_tiles_and_saves_the_neutral_layout(random: Random, label, dtype):
    N, K = 208, 512
    weight = rtn(torch.randn(N, K, generator=random.generator), parse_scheme(label))
    stored = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    module = QuantLinear.from_quantized(weight, random.bias(N, dtype).cpu()).to(DEVICE)
    module.repack(dtype)
    assert module.codes is module.scales is module.zeros is None
    state = module.state_dict()
    assert [name for name in state if name not in ("weight", "bias")] == list(stored)
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].cpu(), tensor)

    exact = weight.dequantize(torch.float64).to(DEVICE)
    products = {}
    for M in (1, 16, 40, 300):
        x = random.x(M, K, dtype)
        products[M] = x, module(x)
        magnitude = x.double().abs() @ exact.abs().T + module.bias.double().abs()
        assert_within(products[M][1], x.double() @ exact.T + module.bias.double(), magnitude, K, roundings=4)

    module.cpu()
    for name, tensor in module.quantized().tensors().items():
        assert torch.equal(tensor, stored[name])
    module.to(DEVICE)
    if module.packed is None:  # float16, and one scale a row, have no order on a CPU that could be kept
        module.repack(dtype)
    for x, y in products.values():
        assert torch.equal(module(x), y)
