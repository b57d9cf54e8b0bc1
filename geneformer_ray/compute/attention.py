"""Attention without a mask, over sequences of one length."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attention"]

# Scores that a CPU's core works on at once: a second-level cache of the machines in use holds them.
SCORE_BYTES_A_THREAD = 2 * 2**20
# Keys are padded to a multiple of a vector register's length; products of odd sizes are up to a fifth slower.
KEYS_TOGETHER = 16
# Sums of exponentials in this range have float32's full precision, as has what they divide.
SAFE_SUMS = (1e-25, 1e25)


def attention(q_EHLK: torch.Tensor, k_EHLK: torch.Tensor, v_EHLK: torch.Tensor) -> torch.Tensor:
    """Attend from every query to all keys of its sequence.

    On a CPU in float32 the products of whole blocks of scores were 1.1 to 1.3 times as fast as torch's fused kernel
    (``BENCHMARKS.md``); everywhere else the fused kernel is taken.

    Parameters
    ----------
    q_EHLK
        Queries, scaled already, shape (sequences, heads, queries, width of a head).
    k_EHLK, v_EHLK
        Keys and values, shape (sequences, heads, length, width of a head).

    Returns
    -------
    Tensor
        Shape (sequences x queries, heads x width of a head).
    """
    if q_EHLK.device.type != "cpu" or q_EHLK.dtype != torch.float32:
        context_EHLK = scaled_dot_product_attention(q_EHLK, k_EHLK, v_EHLK, scale=1.0)
        return context_EHLK.transpose(1, 2).reshape(-1, q_EHLK.shape[1] * q_EHLK.shape[3])
    return _in_blocks(q_EHLK, k_EHLK, v_EHLK)


def _in_blocks(q_EHLK: torch.Tensor, k_EHLK: torch.Tensor, v_EHLK: torch.Tensor) -> torch.Tensor:
    """Go through blocks of sequences, heads and queries of which the scores stay in the cache."""
    sequences, heads, queries, width = q_EHLK.shape
    length = k_EHLK.shape[2]
    padded = -(-length // KEYS_TOGETHER) * KEYS_TOGETHER
    threads = torch.get_num_threads()
    scores = SCORE_BYTES_A_THREAD * threads // 4
    heads_at_once = min(heads, max(threads, scores // (queries * padded)))
    sequences_at_once = max(1, scores // (heads * queries * padded))
    rows_at_once = max(KEYS_TOGETHER, scores // (heads_at_once * padded) // KEYS_TOGETHER * KEYS_TOGETHER)

    context_ELHK = q_EHLK.new_empty(sequences, queries, heads, width)
    for first in range(0, sequences, sequences_at_once):
        some = slice(first, first + sequences_at_once)
        for head in range(0, heads, heads_at_once):
            these = slice(head, head + heads_at_once)
            k_BLK = _padded(k_EHLK[some, these], padded)
            v_BLK = v_EHLK[some, these].reshape(-1, length, width)
            for row in range(0, queries, rows_at_once):
                rows = slice(row, row + rows_at_once)
                q_ehRK = q_EHLK[some, these, rows]
                mean_BRK = _attend(q_ehRK.reshape(-1, q_ehRK.shape[2], width), k_BLK, v_BLK)
                context_ELHK[some, rows, these] = mean_BRK.view(q_ehRK.shape).transpose(1, 2)
    return context_ELHK.view(-1, heads * width)


def _attend(q_BRK: torch.Tensor, k_BLK: torch.Tensor, v_BLK: torch.Tensor, *, below_top: bool = False) -> torch.Tensor:
    """Attend from one block of queries; keys may be padded beyond the values.

    A softmax is the same whatever is subtracted from its scores. Nothing is, unless that leaves float32's range.
    """
    length = v_BLK.shape[1]
    score_BRL = torch.bmm(q_BRK, k_BLK.transpose(1, 2))
    if below_top:
        score_BRL -= score_BRL[:, :, :length].amax(dim=2, keepdim=True)
    weight_BRL = score_BRL.exp_()[:, :, :length]
    sum_BR1 = weight_BRL.sum(dim=2, keepdim=True)
    if not below_top and not bool(((sum_BR1 > SAFE_SUMS[0]) & (sum_BR1 < SAFE_SUMS[1])).all()):
        return _attend(q_BRK, k_BLK, v_BLK, below_top=True)
    return torch.bmm(weight_BRL, v_BLK).div_(sum_BR1)


def _padded(x_ehLK: torch.Tensor, length: int) -> torch.Tensor:
    """Copy to shape (sequences x heads, length, width), zeros behind the end."""
    sequences, heads, there, width = x_ehLK.shape
    out_ehLK = x_ehLK.new_empty(sequences, heads, length, width)
    out_ehLK[:, :, :there] = x_ehLK
    out_ehLK[:, :, there:] = 0
    return out_ehLK.view(-1, length, width)
