"""Stage 2's algebra on tensors: exact weighted sums of anchors' updates for many people at once, and truncation."""

from __future__ import annotations

import torch
from torch import Tensor

from mta.errors import AnchorNotFound, InputError
from mta.lora.batch import Factors, LoraBatch, even


def merge_exact(anchors: LoraBatch, ids: Tensor, w: Tensor) -> LoraBatch:
    """Return the weighted sum of anchors' updates for many people, without loss (stage 2).

    Per layer:  delta[u] = sum_k w[u, k] * scale * B[ids[u, k]] @ A[ids[u, k]]
    The factors are concatenated, so no O x D matrix is formed.

    Shapes: ids (U, K); w (U, K) or (U, L, K); A (N, R, D), B (N, O, R) -> A (U, K*R, D), B (U, O, K*R), scale 1.
    Source: arXiv:2511.20072, stage 2; concatenation is our choice (docs/decisions/004).
    Raises: AnchorNotFound.
    """
    weights = _per_layer(anchors, ids, w)
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


def _per_layer(anchors: LoraBatch, ids: Tensor, w: Tensor) -> Tensor:
    """Return coefficients as (U, L, K). Raises AnchorNotFound or InputError if ids or shapes do not fit the anchors."""
    if ids.numel() and (int(ids.max()) >= len(anchors) or int(ids.min()) < 0):
        raise AnchorNotFound(
            f"anchors are numbered 0 to {len(anchors) - 1}, got {int(ids.min())} to {int(ids.max())}",
            hint="Open the bank that these numbers are from, or retrieve anchors again.",
        )
    layers = len(anchors.factors)
    wanted = (ids.shape[0], layers, ids.shape[1])
    weights = w[:, None, :].expand(wanted) if w.ndim == 2 and w.shape == ids.shape else w
    if weights.shape != wanted:
        raise InputError(
            f"coefficients have shape {tuple(w.shape)}; expected {tuple(ids.shape)} or {wanted}",
            hint="Give one coefficient for each person and anchor, or one for each layer as well.",
        )
    return weights
