"""Every op as a Triton kernel, under the names that `reference.py` has them in torch."""

from dynsize.kernels.ctc import ctc_loss
from dynsize.kernels.linear_residual import linear_gated_residual
from dynsize.kernels.residual import gated_residual, gated_residual_layer_norm

__all__ = ["gated_residual", "gated_residual_layer_norm", "linear_gated_residual", "ctc_loss"]  # noqa: RUF022
