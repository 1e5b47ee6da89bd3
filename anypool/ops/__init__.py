"""The few fused operations a model needs: one portable reference each, and faster versions per chip beside it.

Other rooms use:
- `choose(platform, dtype, ...)` -> `Kernels`: one implementation of every op for a platform, and why it was chosen;
- `attention`: dense attention over whole sequences (training, scoring);
- `rotary_tables`, `rotate`: rotary position embedding;
- `sampling`: the draw of the next token, keyed by (seed, position).

References lower to the portable subset: no sort, no variadic reduce, no cond, no dynamic loop, no integer dot.
"""

from anypool.ops.attention import attention
from anypool.ops.kernels import Choice, Kernels, choose
from anypool.ops.rotary import rotary_tables, rotate

__all__ = ["Choice", "Kernels", "attention", "choose", "rotary_tables", "rotate"]
