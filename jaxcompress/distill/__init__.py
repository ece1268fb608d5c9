"""Distillation losses: how far a student's logits are from its teacher's.

Every loss takes `(..., classes)` logits and returns one value per example, `(...)`; the caller
reduces. What holds for all of them:

- Gradients do not flow into the teacher (`lax.stop_gradient`).
- Logits of any float type are read; the arithmetic and the result are float32 (float64 if either
  input is). Logits of plus or minus 1e4 are nothing special.
- A loss with a `temperature` T softens both sides and carries the factor T², so that its gradient
  keeps its size when T changes (arXiv:1503.02531, section 2). T may be traced; a concrete one must
  be positive and finite.
- A logit of -inf is a class that does not exist. Masked on both sides, it counts for nothing, in
  the value and in the gradient; an example masked throughout counts 0. Masked on one side only,
  the divergence is what mathematics says: infinite if the other side must put mass there.

To leave padding tokens out, reduce with a mask: `jnp.mean(loss, where=is_token)`.
"""

from jaxcompress.distill._decoupled import decoupled as decoupled
from jaxcompress.distill._logits import jensen_shannon as jensen_shannon
from jaxcompress.distill._logits import kl as kl
from jaxcompress.distill._logits import logit_mse as logit_mse
from jaxcompress.distill._logits import reverse_kl as reverse_kl
from jaxcompress.distill._logits import soft_cross_entropy as soft_cross_entropy
from jaxcompress.distill._mix import mix as mix
