"""Every op as a Triton kernel, under the names that `reference.py` has them in torch."""

from kernels.ctc import ctc_loss
from kernels.linear_residual import linear_gated_residual
from kernels.residual import gated_residual, gated_residual_layer_norm

__all__ = ["gated_residual", "gated_residual_layer_norm", "linear_gated_residual", "ctc_loss"]  # noqa: RUF022
