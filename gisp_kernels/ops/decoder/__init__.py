"""Operations of a decoder layer but products, forward and backward, for a fused pass without autograd.

Tensors are [tokens, features] with contiguous rows and any row stride, bfloat16, float16 or float32; arithmetic is
float32 and rounds where the transformers modules round. A kernel copies an operand whose rows are not contiguous and
refuses a result of that kind. Arguments are checked little: a pass makes a thousand calls.
"""

from gisp_kernels.ops.decoder.attention import attention
from gisp_kernels.ops.decoder.cross_entropy import token_nll, token_nll_grad_
from gisp_kernels.ops.decoder.kv_heads import expand_kv
from gisp_kernels.ops.decoder.rms_norm import add_rms_norm, rms_norm_apply, rms_norm_backward_
from gisp_kernels.ops.decoder.rotary import rotary
from gisp_kernels.ops.decoder.swiglu import swiglu, swiglu_backward_, swiglu_backward_gates_
from gisp_kernels.ops.decoder.unrotate import unrotate_qkv

__all__ = [
    "add_rms_norm",
    "attention",
    "expand_kv",
    "rms_norm_apply",
    "rms_norm_backward_",
    "rotary",
    "swiglu",
    "swiglu_backward_",
    "swiglu_backward_gates_",
    "token_nll",
    "token_nll_grad_",
    "unrotate_qkv",
]
