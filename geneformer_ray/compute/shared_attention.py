"""The first layer's attention of sequences that hardly differ: what they share is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["shared_attention"]

# With fewer sequences, or more of its own in each, a sequence is computed faster alone.
LEAST_SEQUENCES = 4
MOST_OWN_SHARE = 0.125


def shared_attention(
    ids_EL: torch.Tensor,
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    queries_keys_values: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    heads: int,
    ranks_EL: torch.Tensor | None = None,
    *,
    most_own_share: float = MOST_OWN_SHARE,
) -> Callable[[slice], tuple[torch.Tensor, torch.Tensor]] | None:
    """Attend in the first layer of sequences that are made of nearly the same (token, position) pairs.

    Only there a token's query, key and value depend on nothing but itself and its position. A deletion leaves the genes
    before it at their ranks and moves those behind it up by one: N deletions of a cell of N genes hold 2 N pairs, not
    N x N. The softmax over the pairs that all sequences hold is taken once for every query; each sequence adds the few
    that are its own, under their common maximum. This is exact: no term is left out.

    Parameters
    ----------
    ids_EL
        Token ids, shape (sequences, length).
    embed
        Token ids and positions, both of shape (pairs,), to what enters the layer, float32 of shape (pairs, width).
    queries_keys_values
        That to queries, scaled, keys and values, each of shape (pairs, width).
    heads
        Attention heads.
    ranks_EL
        Which position embedding each token gets, shape (sequences, length); None for 0, 1, 2 and so on.
    most_own_share
        The share of a sequence's pairs that not all others hold, up to which this pays.

    Returns
    -------
    function or None
        From some of the sequences to what entered the layer, and the attention's context, both float32 of shape
        (sequences x length, width). None where the sequences do not share enough for this to pay.
    """
    sequences, length = ids_EL.shape
    if sequences < LEAST_SEQUENCES or not length:
        return None
    if ranks_EL is None:
        ranks_EL = torch.arange(length, device=ids_EL.device).expand_as(ids_EL)
    # Position first, so that neighbours in a sequence are neighbours among the pairs.
    tokens = int(ids_EL.max()) + 1
    pairs_U, pair_EL = torch.unique(ranks_EL * tokens + ids_EL, return_inverse=True)
    everywhere_U = torch.bincount(pair_EL.reshape(-1), minlength=len(pairs_U)) == sequences
    own_EL = ~everywhere_U[pair_EL]
    common_C, rest_X = everywhere_U.nonzero()[:, 0], (~everywhere_U).nonzero()[:, 0]
    own = length - len(common_C)  # the same in each: a pair is at most once in a sequence
    if own > most_own_share * length or not len(common_C):
        return None
    x_UD = embed(pairs_U % tokens, pairs_U // tokens)
    width = x_UD.shape[1]
    parts = (part.float().view(len(pairs_U), heads, -1) for part in queries_keys_values(x_UD))
    q_HUK, k_HUK, v_HUK = (part_UHK.transpose(0, 1) for part_UHK in parts)

    top_HU, sum_HU, mean_UHK = _softmax_over(q_HUK, k_HUK[:, common_C], v_HUK[:, common_C])
    score_HUX = q_HUK @ k_HUK[:, rest_X].transpose(1, 2)
    number_U = torch.zeros(len(pairs_U), dtype=torch.int64, device=ids_EL.device)
    number_U[rest_X] = torch.arange(len(rest_X), device=ids_EL.device)
    own_EO = pair_EL[own_EL].view(sequences, own)

    def attend(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        pair_el, own_eo = pair_EL[rows], own_EO[rows]
        entered_TD, context_elHK = x_UD[pair_el].view(-1, width), mean_UHK[pair_el]
        if own:
            score_HelO = score_HUX[:, pair_el[:, :, None], number_U[own_eo][:, None, :]]
            shared_top_Hel = top_HU[:, pair_el]
            top_Hel = torch.maximum(shared_top_Hel, score_HelO.amax(dim=-1))
            weight_HelO = score_HelO.sub_(top_Hel[..., None]).exp_()
            shared_Hel = (shared_top_Hel - top_Hel).exp_().mul_(sum_HU[:, pair_el])
            total_Hel = shared_Hel + weight_HelO.sum(dim=-1)
            weight_HelO /= total_Hel[..., None]
            context_elHK *= (shared_Hel / total_Hel).permute(1, 2, 0)[..., None]
            context_elHK += (weight_HelO @ v_HUK[:, own_eo]).permute(1, 2, 0, 3)
        return entered_TD, context_elHK.view(-1, width)

    return attend


def _softmax_over(
    q_HUK: torch.Tensor, k_HCK: torch.Tensor, v_HCK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend to common keys: each query's highest score, its sum of exponentials below that, and the mean value."""
    score_HUC = q_HUK @ k_HCK.transpose(1, 2)
    top_HU = score_HUC.amax(dim=-1)
    score_HUC -= top_HU[..., None]
    weight_HUC = score_HUC.exp_()
    sum_HU = weight_HUC.sum(dim=-1)
    mean_HUK = (weight_HUC @ v_HCK) / sum_HU[..., None]
    return top_HU, sum_HU, mean_HUK.transpose(0, 1).contiguous()
