"""The operations that simba exists for. They know tensors, not models.

Each file holds the public function (shapes, dtypes, equation), its reference in PyTorch, and
dispatch to the fast twin where there is one. Names are those of the field:

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
| anchor      | T     | the prompt's last token                     | (batch,)                  |

Mamba-2 (`ssd_scan`, `ssd_influence`) splits channels into heads, with one A, D and step size a
head, and has a B and C for each group of heads: x is (batch, length, heads, head_dim), dt (batch,
length, heads), B and C are (batch, length, groups, d_state). `gated_norm` follows.
"""

from simba.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference
from simba.ops.dispatch import Choice, choose
from simba.ops.gated_norm import gated_norm, gated_norm_reference
from simba.ops.gather import (
    gather,
    gather_add_norm,
    gather_add_norm_reference,
    gather_reference,
)
from simba.ops.influence import influence, influence_reference
from simba.ops.select import Survivors, choose_survivors, select, select_reference
from simba.ops.selective_scan import (
    decay_rates,
    inverse,
    pack,
    selective_scan,
    selective_scan_reference,
)
from simba.ops.ssd_influence import ssd_influence, ssd_influence_reference
from simba.ops.ssd_scan import ssd_scan, ssd_scan_reference, step_sizes

__all__ = [
    "Choice",
    "Survivors",
    "causal_conv1d",
    "causal_conv1d_reference",
    "choose",
    "choose_survivors",
    "decay_rates",
    "gated_norm",
    "gated_norm_reference",
    "gather",
    "gather_add_norm",
    "gather_add_norm_reference",
    "gather_reference",
    "influence",
    "influence_reference",
    "inverse",
    "pack",
    "select",
    "select_reference",
    "selective_scan",
    "selective_scan_reference",
    "ssd_influence",
    "ssd_influence_reference",
    "ssd_scan",
    "ssd_scan_reference",
    "step_sizes",
]
