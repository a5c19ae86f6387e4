"""Every op as a Triton kernel, under the names that `reference.py` has them in torch."""

from kernels.ctc import ctc_loss as ctc_loss
from kernels.linear_residual import linear_gated_residual as linear_gated_residual
from kernels.residual import gated_residual as gated_residual
from kernels.residual import gated_residual_layer_norm as gated_residual_layer_norm
