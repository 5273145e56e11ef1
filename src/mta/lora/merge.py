"""Stage 2's algebra on tensors: exact weighted sums of anchors' updates for many people at once, and truncation."""

from __future__ import annotations

import torch
from torch import Tensor

from mta.lora.batch import Factors, LoraBatch, even


def merge_exact(anchors: LoraBatch, ids: Tensor, w: Tensor) -> LoraBatch:
    """Return the weighted sum of anchors' updates for many people, without loss (stage 2).

    Per layer:  delta[u] = sum_k w[u, k] * scale * B[ids[u, k]] @ A[ids[u, k]]
    The factors are concatenated, so no O x D matrix is formed.

    Shapes: ids (U, K); w (U, K) or (U, L, K); A (N, R, D), B (N, O, R) -> A (U, K*R, D), B (U, O, K*R), scale 1.
    Source: arXiv:2511.20072, stage 2; concatenation is our choice (docs/decisions/004).
    """
    weights = w if w.ndim == 3 else w[:, None].expand(-1, len(anchors.factors), -1)  # (U, L, K)
    factors = {}
    for layer, (name, (a, b)) in enumerate(anchors.factors.items()):
        share = (anchors.scale * weights[:, layer]).to(b)
        weighed = (b[ids] * share[:, :, None, None]).transpose(1, 2)  # (U, O, K, R)
        factors[name] = Factors(a[ids].flatten(1, 2), weighed.flatten(2))
    return LoraBatch(factors)


def truncate(batch: LoraBatch, rank: int) -> tuple[LoraBatch, Tensor]:
    """Return the best approximation at ``rank``: QR of both factors, SVD of the small core.

    Returns the batch with scale 1 and the relative Frobenius error over all layers, (U,).
    Source: our choice; for servers with fixed rank slots.
    """
    factors, lost, total = {}, torch.zeros(()), torch.zeros(())
    for name, (a, b) in batch.scaled_into_b().factors.items():
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        keep = min(rank, s.shape[-1])
        root = s[:, :keep].sqrt()
        factors[name] = Factors(root[:, :, None] * (v[:, :keep] @ q_a.mT), (q_b @ u[:, :, :keep]) * root[:, None, :])
        lost = lost + (s[:, keep:] ** 2).sum(-1)
        total = total + (s**2).sum(-1)
    return even(factors), (lost / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()
