"""What makes a model's logits probabilities: fitted on the valid days, kept in the checkpoint, served with it."""

from __future__ import annotations

import torch
from torch import Tensor

from models.checkpoint import UNCALIBRATED, Calibration

STEPS, CLOSE = 50, 1e-9


def fit(logit_B: Tensor, label_B: Tensor) -> Calibration:
    """Platt's scaling: slope and intercept of the labels' logistic regression on the logits, by Newton's method.

    The labels are softened as by Platt (1999), so that few rows give no infinite slope. Where the fit has no slope
    above 0, the logits stay as they are: a model that ranks backwards is the gate's business.
    """
    z_B, y_B = logit_B.double(), label_B.double()
    clicks = y_B.sum()
    others = len(y_B) - clicks
    target_B = torch.where(y_B > 0, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    design_B2 = torch.stack((z_B, torch.ones_like(z_B)), 1)
    found_2 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(STEPS):
        p_B = torch.sigmoid(design_B2 @ found_2)
        gradient_2 = design_B2.T @ (target_B - p_B)
        hessian_22 = (design_B2 * (p_B * (1 - p_B))[:, None]).T @ design_B2
        step_2, singular = torch.linalg.solve_ex(hessian_22, gradient_2)
        if singular or not step_2.isfinite().all():
            return UNCALIBRATED
        found_2 = found_2 + step_2.clamp(-1, 1)
        if step_2.abs().max() < CLOSE:
            break
    slope, intercept = found_2.tolist()
    return Calibration(slope, intercept) if slope > 0 else UNCALIBRATED
