"""What becomes of attention when one key is taken out or another one takes its place: closed forms, and gradients.

The softmax of a query changes by known terms when a key does. Nothing here is linear in how much the key differs, or in
its weight; what is first order is only what comes behind: each query's change is read through a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AttentionInfluence", "attend_in_place", "attention_influence"]

# Scores that are worked on at once, by device: a CPU's second-level cache holds a few such blocks.
BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**27}
# A query whose whole weight lies on one key has nothing left without it.
LEAST_REST = 1e-6


@dataclass
class AttentionInfluence:
    """How f changes through one layer's attention in one sequence, for each of S functions f.

    Parameters
    ----------
    gate_SL
        Gradient of f with respect to a bias on each key, added to the scores of all queries and heads; zeros where
        `removed` was not wanted.
    removed_SL
        Change of f when no other query sees a key any more; likewise.
    replaced_SA
        Change of f when other queries see an alternate in the place of a key.
    inputs_SLX
        Gradient of f with respect to queries, keys and values, side by side; None where it was not wanted.
    """

    gate_SL: torch.Tensor
    removed_SL: torch.Tensor
    replaced_SA: torch.Tensor
    inputs_SLX: torch.Tensor | None


def attend_in_place(
    alternates_HAK: Sequence[torch.Tensor],
    k_HLK: torch.Tensor,
    v_HLK: torch.Tensor,
    at_A: torch.Tensor,
) -> torch.Tensor:
    """Attend from alternates, each to a sequence in which it stands in the place of one token.

    Parameters
    ----------
    alternates_HAK
        Queries, scaled, keys and values of the alternates, each of shape (heads, alternates, width of a head).
    k_HLK, v_HLK
        Keys and values of the sequence, shape (heads, length, width of a head).
    at_A
        The positions that they take, shape (alternates,).

    Returns
    -------
    Tensor
        Shape (alternates, heads x width of a head).
    """
    query_HAK, key_HAK, value_HAK = alternates_HAK
    heads, alternates, width = query_HAK.shape
    context_AHK = query_HAK.new_empty(alternates, heads, width)
    rows_at_once = max(1, BLOCK_BYTES[query_HAK.device.type] // (4 * heads * k_HLK.shape[1]))
    for start in range(0, alternates, rows_at_once):
        rows = slice(start, start + rows_at_once)
        at_R = at_A[rows]
        row_R = torch.arange(len(at_R), device=at_A.device)
        score_HRL = query_HAK[:, rows] @ k_HLK.transpose(1, 2)
        score_HRL[:, row_R, at_R] = (query_HAK[:, rows] * key_HAK[:, rows]).sum(dim=2)
        weight_HRL = score_HRL.softmax(dim=2)
        own_HR1 = weight_HRL[:, row_R, at_R][:, :, None]
        mean_HRK = weight_HRL @ v_HLK + own_HR1 * (value_HAK[:, rows] - v_HLK[:, at_R])
        context_AHK[rows] = mean_HRK.transpose(0, 1)
    return context_AHK.flatten(1)


def attention_influence(
    qkv_HLK: Sequence[torch.Tensor],
    context_HQK: torch.Tensor,
    gradient_SHQK: torch.Tensor,
    alternates_HAK: Sequence[torch.Tensor],
    at_A: torch.Tensor,
    *,
    removed: bool,
    inputs: bool,
) -> AttentionInfluence:
    """Go back through one layer's attention of one sequence, block of queries by block.

    With w the weights of a query, o what it gives, g the gradient of f there and P = g (v - o) for each key: a bias on
    the key has the gradient w P; a query that no longer sees it gives w P / (1 - w) less; one that sees an alternate
    (w', P') instead gives (w' P' - w P) / (1 - w + w') more. The weights of a block are made again here: nothing of the
    size length x length is kept from the forward pass, or from layer to layer.

    Parameters
    ----------
    qkv_HLK
        Queries, scaled, keys and values, float, each of shape (heads, length, width of a head). There may be fewer
        queries: the first ones.
    context_HQK
        What they gave, shape (heads, queries, width of a head).
    gradient_SHQK
        Gradient of each f with respect to that.
    alternates_HAK, at_A
        Keys and values of the alternates, and the positions that they take.
    removed
        Whether the changes without a key are wanted.
    inputs
        Whether the gradient of the inputs is wanted.
    """
    q_HQK, k_HLK, v_HLK = qkv_HLK
    key_HAK, value_HAK = alternates_HAK
    functions, heads, queries, width = gradient_SHQK.shape
    length, alternates = k_HLK.shape[1], len(at_A)
    new = gradient_SHQK.new_zeros
    found = AttentionInfluence(new(functions, length), new(functions, length), new(functions, alternates), None)
    dq_SHLK, dk_SHLK, dv_SHLK = (new(functions, heads, length, width) for _ in range(3)) if inputs else (None,) * 3
    r_SHQ1 = (gradient_SHQK * context_HQK).sum(dim=3, keepdim=True)
    rows_at_once = max(1, BLOCK_BYTES[k_HLK.device.type] // (4 * heads * length))
    for start in range(0, queries, rows_at_once):
        rows = slice(start, min(start + rows_at_once, queries))
        row_R = torch.arange(rows.stop - start, device=at_A.device)
        q_HRK = q_HQK[:, rows]
        weight_HRL = q_HRK @ k_HLK.transpose(1, 2)
        top_HR1 = weight_HRL.amax(dim=2, keepdim=True)
        weight_HRL.sub_(top_HR1).exp_()
        sum_HR1 = weight_HRL.sum(dim=2, keepdim=True)
        weight_HRL.div_(sum_HR1)
        top_HR1 += sum_HR1.log()
        rest_HRL = (1 - weight_HRL).clamp_(min=LEAST_REST).reciprocal_() if removed else None
        if alternates:
            alternate_HRA = torch.baddbmm(-top_HR1, q_HRK, key_HAK.transpose(1, 2)).exp_()
            share_HRA = (1 - weight_HRL[:, :, at_A]).add_(alternate_HRA).clamp_(min=LEAST_REST).reciprocal_()
            # Its own query is no other's: what the token in its place does there is computed, not estimated.
            inside = (at_A >= start) & (at_A < rows.stop)
            share_HRA[:, at_A[inside] - start, inside.nonzero()[:, 0]] = 0
        for s in range(functions):
            g_HRK, r_HR1 = gradient_SHQK[s, :, rows], r_SHQ1[s, :, rows]
            change_HRL = torch.baddbmm(-r_HR1, g_HRK, v_HLK.transpose(1, 2)).mul_(weight_HRL)
            if rest_HRL is not None:
                found.gate_SL[s] += change_HRL.sum(dim=(0, 1))
                without_HRL = change_HRL * rest_HRL
                without_HRL[:, row_R, start + row_R] = 0
                found.removed_SL[s] -= without_HRL.sum(dim=(0, 1))
            if alternates:
                gain_HRA = torch.baddbmm(-r_HR1, g_HRK, value_HAK.transpose(1, 2)).mul_(alternate_HRA)
                gain_HRA = gain_HRA.sub_(change_HRL[:, :, at_A]).mul_(share_HRA)
                found.replaced_SA[s] += gain_HRA.sum(dim=(0, 1))
            if dq_SHLK is not None and dk_SHLK is not None and dv_SHLK is not None:
                dq_SHLK[s, :, rows] = change_HRL @ k_HLK
                dk_SHLK[s] += change_HRL.transpose(1, 2) @ q_HRK
                dv_SHLK[s] += weight_HRL.transpose(1, 2) @ g_HRK
    if dq_SHLK is not None and dk_SHLK is not None and dv_SHLK is not None:
        parts = [part.transpose(1, 2).flatten(2) for part in (dq_SHLK, dk_SHLK, dv_SHLK)]
        found.inputs_SLX = torch.cat(parts, dim=2)
    return found
