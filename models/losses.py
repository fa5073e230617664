"""The losses of click models: the mean binary cross-entropy, and the one that trains two towers at once.

    BCE(z)  = mean_B( log(1 + exp z) − y z )
    Tri-BCE = BCE(z) + Σ_p w_p BCE(z_p),   w_p = max(0, BCE(z_p) − BCE(z))

Source of Tri-BCE: arXiv 2407.13349. Its published code lets gradients flow through w_p.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.schema import Logits


def bce(logits: Logits, label_B: Tensor) -> Tensor:
    """Scalar mean cross-entropy of the ranking logit; labels in [0, 1], any dtype."""
    return F.binary_cross_entropy_with_logits(logits.logit_B, label_B.to(logits.logit_B.dtype))


def tri_bce(logits: Logits, label_B: Tensor, detach: bool = False) -> Tensor:
    """Scalar Tri-BCE over the ranking logit and every part; plain BCE where there are no parts.

    detach  True keeps gradients out of the weights w_p; the published form does not.
    """
    whole = bce(logits, label_B)
    total = whole
    for part_B in logits.parts_B:
        own = bce(Logits(part_B), label_B)
        weight = (own - whole).relu()
        total = total + (weight.detach() if detach else weight) * own
    return total
