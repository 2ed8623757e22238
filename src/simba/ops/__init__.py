"""The operations that simba is built from. They know tensors, not models.

Every operation exists up to three times:

- ``simba.ops.X`` is the function to call. Its docstring gives the equation, shapes, dtypes and
  errors, and ``backend`` says what may run it (see `simba.ops.choose`).
- ``simba.ops.X_torch`` is the tuned PyTorch path, which runs on any device and is differentiable
  (scores and selections have no gradient). The Triton kernels are in `simba.ops.triton`.
- ``simba.ops.naive.X`` is the plain equation, slow and short. Read this first. Tests compare the
  other two with it.

Names are those of the field:

| here        | paper | meaning                                     | shape                     |
|-------------|-------|---------------------------------------------|---------------------------|
| x           | x_t   | input of the recurrence                     | (batch, length, d_inner)  |
| dt, step    | Δ_t   | step size before / after bias and softplus  | (batch, length, d_inner)  |
| A           | A     | decay rates, negative                       | (d_inner, d_state)        |
| exp(A Δ_t)  | Ā_t   | discretised decay                           |                           |
| Δ_t B_t     | B̄_t   | discretised input weight                    |                           |
| B, C        | B, C  | input and output projections of the state   | (batch, length, d_state)  |
| D           | D     | skip connection                             | (d_inner,)                |
| z           |       | gate                                        | (batch, length, d_inner)  |
| state       | h_t   | the recurrence's state                      | (batch, d_inner, d_state) |
| anchor      | T     | column of the prompt's last token           | (batch,)                  |

Mamba-2 (`ssd_scan`, `ssd_influence`, `gated_norm`) splits the channels into heads. Each head has
one A, one D and one step size, and each group of heads shares a B and a C. So x is (batch, length,
heads, head_dim), dt is (batch, length, heads), and B and C are (batch, length, groups, d_state).
"""

from simba.ops import naive
from simba.ops.attention import attention_influence
from simba.ops.conv import causal_conv1d, causal_conv1d_torch
from simba.ops.dispatch import Choice, choose
from simba.ops.mamba2_scan import (
    Decays,
    ssd_decays,
    ssd_scan,
    ssd_scan_torch,
    step_norms,
    step_sizes,
)
from simba.ops.mamba2_score import ssd_influence, ssd_influence_torch
from simba.ops.norms import (
    gated_norm,
    gated_norm_torch,
    gather_add_norm,
    gather_add_norm_torch,
    put_add_norm,
    put_add_norm_torch,
    put_add_scale,
    put_add_scale_torch,
    scale,
)
from simba.ops.rows import gather, gather_torch
from simba.ops.scan import decay_rates, inverse, pack, selective_scan, selective_scan_torch
from simba.ops.score import REDUCTIONS, influence, influence_torch
from simba.ops.selection import Survivors, choose_survivors, select, select_torch
from simba.ops.varlen import (
    causal_conv1d_varlen,
    causal_conv1d_varlen_torch,
    chunk_places,
    influence_varlen,
    influence_varlen_torch,
    prompts_of,
    select_varlen,
    selective_scan_varlen,
    selective_scan_varlen_torch,
    ssd_influence_varlen,
    ssd_influence_varlen_torch,
    ssd_scan_varlen,
    ssd_scan_varlen_torch,
)

__all__ = [
    "REDUCTIONS",
    "Choice",
    "Decays",
    "Survivors",
    "attention_influence",
    "causal_conv1d",
    "causal_conv1d_torch",
    "causal_conv1d_varlen",
    "causal_conv1d_varlen_torch",
    "choose",
    "choose_survivors",
    "chunk_places",
    "decay_rates",
    "gated_norm",
    "gated_norm_torch",
    "gather",
    "gather_add_norm",
    "gather_add_norm_torch",
    "gather_torch",
    "influence",
    "influence_torch",
    "influence_varlen",
    "influence_varlen_torch",
    "inverse",
    "naive",
    "pack",
    "prompts_of",
    "put_add_norm",
    "put_add_norm_torch",
    "put_add_scale",
    "put_add_scale_torch",
    "scale",
    "select",
    "select_torch",
    "select_varlen",
    "selective_scan",
    "selective_scan_torch",
    "selective_scan_varlen",
    "selective_scan_varlen_torch",
    "ssd_decays",
    "ssd_influence",
    "ssd_influence_torch",
    "ssd_influence_varlen",
    "ssd_influence_varlen_torch",
    "ssd_scan",
    "ssd_scan_torch",
    "ssd_scan_varlen",
    "ssd_scan_varlen_torch",
    "step_norms",
    "step_sizes",
]
