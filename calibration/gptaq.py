"""GPTAQ (Li et al., ICML 2025, arXiv:2504.02692): GPTQ that also makes up for what earlier layers lost.

GPTQ minimises ||(W - Q) X||^2 with X the inputs of the partly quantized model. The original model's layer gave
W X_o from its own inputs X_o. The asymmetric objective asks for that output:

    min over Q of || W X_o - Q X ||^2                                                   (their equation 4)
      = || (W* - Q) X ||^2 + constant,     W* = W X_o X^T (X X^T)^-1 = W + W D H^-1
    with D = (X_o - X) X^T and H = X X^T

So GPTQ with the target W* solves it. The authors fold the same correction into GPTQ's column loop, where each
column gets the part that later columns can still undo; moving the target first is the whole correction, and leaves
the loop as it is. D is damped as H is, or it would fit the noise of the calibration sample.
"""

import torch

from quantkit.calibration.gptq import HessianError
from quantkit.calibration.statistics import InputStatistics

DAMP_PERCENT = 0.01  # of mean(diag H), on top of H where it is inverted here


def correction(statistics: InputStatistics) -> torch.Tensor:
    """D H^-1 [K, K] of the linears that share an input; `weight + weight @ correction` is their target W*.

    Raises:
        HessianError: H is not positive definite, damped as it is, or no drift was noted.
    """
    if statistics.drift is None:
        raise HessianError("the inputs of the original model were not noted")
    H = statistics.hessian.clone()
    H.diagonal().add_(DAMP_PERCENT * H.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(H)
    if info != 0:
        raise HessianError("the Hessian is not positive definite")
    return torch.cholesky_solve(statistics.drift.T, lower).T
