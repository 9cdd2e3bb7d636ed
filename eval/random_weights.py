"""Packed weights of random codes: for timing, where quantizing gigabytes of floating-point weights would be waste.

Real data in every tensor: kernels run faster on zeros than they will on weights.
"""

import torch

from quantkit.linear import tensor_specs
from quantkit.packing import QuantizedTensor, pack_codes
from quantkit.scheme import LARGEST_CODE, Scheme

STD = 0.02  # of the weights that the codes stand for: transformers' initializer_range
CODE_STD = {"int2": 1.1, "int3": 2.3, "int4": 4.6, "int8": 73.6, "fp8": 100.0}  # integers uniform, fp8 normal
INPUT_MAX = 6.0  # covers standard normal activations: |x| > 6 has probability 2e-9


def random_quantized(
    scheme: Scheme,
    N: int,
    K: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedTensor:
    """A packed weight [N, K] of standard deviation about `STD`, every scale and zero different.

    Args:
        generator: on `device`; None: torch's own.
        scale_dtype: of scales of 2 to 4 bits; the others are float32.
    """
    specs = tensor_specs(scheme, N, K, scale_dtype)
    tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in specs.items()}
    codes, scales = tensors["codes"], tensors["scales"]
    if scheme.bits < 8:
        codes.copy_(
            torch.randint(
                -(2**31), 2**31 - 1, codes.shape, generator=generator, device=device, dtype=torch.int32
            )
        )
        within = torch.full((1, K), scheme.largest_code, device=device)
        codes &= pack_codes(within, scheme.bits)  # columns past K hold the code 0
    elif scheme.weight == "int8":
        codes.copy_(
            torch.randint(-127, 128, codes.shape, generator=generator, device=device, dtype=torch.int8)
        )
    else:
        normal = torch.randn(codes.shape, generator=generator, device=device, dtype=torch.bfloat16)
        codes.copy_((normal * CODE_STD["fp8"]).clamp_(-scheme.largest_code, scheme.largest_code))
    spread = torch.rand(scales.shape, generator=generator, device=device) + 0.5
    scales.copy_(spread * (STD / CODE_STD[scheme.weight]))
    if "zeros" in tensors:
        zeros = tensors["zeros"]
        zeros.copy_(
            torch.randint(
                0, scheme.largest_code + 1, zeros.shape, generator=generator, device=device, dtype=torch.uint8
            )
        )
    if "input_scale" in tensors:
        assert scheme.activation is not None
        tensors["input_scale"].fill_(INPUT_MAX / LARGEST_CODE[scheme.activation])
    return QuantizedTensor(scheme, (N, K), **tensors)
