"""What n-gram speculation asks of ``sgl_kernel``, in torch, for its stand-in (cpu_engine.py).

Trees of draft tokens, n to a request: node 0 is the last token that is certain. Definitions:
``sglang/kernels/ops/speculative`` (reconstruct_tree.py, spec_tree.py, cache_locs.py), whose kernels
are CUDA's and Triton's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions of nodes, and their first child and next sibling within their request, or -1.

    tree_mask: bool ``[B * n * n]``, whether node j is i or above it. verified_seq_len: ``[B]``.
    Written: positions int64 ``[B * n]``, the others int64 ``[B, n]``.
    """
    nodes = torch.arange(draft_token_num)
    shape = (batch_size, draft_token_num)
    above = tree_mask.view(*shape, draft_token_num) & (nodes < nodes[:, None])  # [B, i, j]
    positions.copy_((above.sum(2) + verified_seq_len[:, None]).flatten())
    retrive_index.copy_(torch.arange(batch_size * draft_token_num).view(shape))
    parents = torch.where(above, nodes, -1).amax(2)
    siblings = (parents[:, :, None] == parents[:, None, :]) & (nodes[:, None] > nodes)
    siblings &= (parents >= 0)[:, None, :]
    for later, first in ((above, retrive_next_token), (siblings, retrive_next_sibling)):
        lowest = torch.where(later, nodes[:, None], draft_token_num).amin(1)
        first.copy_(lowest.where(lowest < draft_token_num, -1))


def verify_tree_greedy(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Down each tree as long as a child is what the model itself says comes next.

    candidates, retrive_* and target_predict: ``[B, n]``. Written: predicts ``[B * n]`` at the nodes
    passed, accept_index ``[B, depth]`` their places in it, accept_token_num ``[B]`` the drafts
    among them.
    """
    depth = accept_index.shape[1]
    says = target_predict.flatten().tolist()
    trees = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    for row, (tokens, places, child, sibling) in enumerate(
        zip(*(part.tolist() for part in trees), strict=True)
    ):
        node, passed = 0, [places[0]]
        while len(passed) < depth:
            node = child[node]
            while node != -1 and tokens[node] != says[passed[-1]]:
                node = sibling[node]
            if node == -1:
                break
            passed.append(places[node])
        for place in passed:
            predicts[place] = says[place]
        accept_index[row, : len(passed)] = accept_index.new_tensor(passed)
        accept_token_num[row] = len(passed) - 1


def assign_extend_cache_locs(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _pool_len: int,
) -> None:
    """Pack each request's cache slots [start, end) into `out_cache_loc`, one behind the other."""
    for row, window, place in windows(req_pool_indices, start_offset, end_offset):
        out_cache_loc[place] = req_to_token[row, window]


def windows(
    rows: torch.Tensor, start: torch.Tensor, end: torch.Tensor
) -> Iterator[tuple[int, slice, slice]]:
    """Of each request: its row of the pool, [start, end) there, and where that is once packed."""
    taken = 0
    for row, first, behind in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        yield row, slice(first, behind), slice(taken, taken + behind - first)
        taken += behind - first


def fill_accept_out_cache_loc(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack the cache slots of the nodes passed, accept_index ``[B, depth]`` but for its -1."""
    passed = accept_index[accept_index > -1].long()
    accept_out_cache_loc[: len(passed)] = out_cache_loc[passed]
