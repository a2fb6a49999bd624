"""Operators on trees of draft tokens, by the definitions in ``sglang/kernels/ops/speculative``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sere_sglang.patches import cpu_drafts

ROWS, DRAFTS = 5, 9


def _parents(seed: int) -> np.ndarray:
    """Of random trees, int ``[ROWS, DRAFTS]``: the root's is -1; a chain and a star among them."""
    random = np.random.default_rng(seed)
    trees = [[-1, *(int(random.integers(0, i)) for i in range(1, DRAFTS))] for _ in range(3)]
    return np.array([*trees, list(range(-1, DRAFTS - 1)), [-1, *[0] * (DRAFTS - 1)]])


def _mask(parents: np.ndarray) -> np.ndarray:
    """bool ``[ROWS, DRAFTS, DRAFTS]``: whether node j is i or above it."""
    mask = np.zeros((ROWS, DRAFTS, DRAFTS), dtype=bool)
    for row, tree in enumerate(parents):
        for i, parent in enumerate(tree):
            mask[row, i, i] = True
            if parent >= 0:
                mask[row, i] |= mask[row, parent]
    return mask


def _links(mask: np.ndarray, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
    positions = torch.empty(ROWS * DRAFTS, dtype=torch.int64)
    index, child, sibling = (torch.empty(ROWS, DRAFTS, dtype=torch.int64) for _ in range(3))
    cpu_drafts.reconstruct_indices_from_tree_mask(
        torch.from_numpy(mask).flatten(), lengths, positions, index, child, sibling, ROWS, DRAFTS
    )
    return positions.view(ROWS, DRAFTS), index, child, sibling


@pytest.mark.parametrize("seed", range(5))
def test_links_of_nodes(seed: int) -> None:
    parents = _parents(seed)
    lengths = torch.tensor([3, 0, 11, 7, 1])
    positions, index, child, sibling = _links(_mask(parents), lengths)
    for row, tree in enumerate(parents.tolist()):
        for node, parent in enumerate(tree):
            children = [i for i in range(DRAFTS) if tree[i] == node]
            later = [i for i in range(node + 1, DRAFTS) if tree[i] == parent >= 0]
            assert child[row, node] == (children or [-1])[0]
            assert sibling[row, node] == (later or [-1])[0]
    assert index.flatten().tolist() == list(range(ROWS * DRAFTS))
    for row, tree in enumerate(parents):
        depth = [0] * DRAFTS
        for i, parent in enumerate(tree):
            depth[i] = 0 if parent < 0 else depth[parent] + 1
        assert positions[row].tolist() == [int(lengths[row]) + d for d in depth]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("depth", [DRAFTS, 3])
def test_a_tree_is_walked_as_far_as_the_model_agrees(seed: int, depth: int) -> None:
    parents = _parents(seed)
    generator = torch.Generator().manual_seed(seed)
    candidates, says = torch.randint(0, 2, (2, ROWS, DRAFTS), generator=generator)
    _, index, child, sibling = _links(_mask(parents), torch.zeros(ROWS, dtype=torch.int64))
    predicts = torch.full((ROWS * DRAFTS,), -7, dtype=torch.int32)
    accepted = torch.full((ROWS, depth), -1, dtype=torch.int32)
    counts = torch.empty(ROWS, dtype=torch.int32)
    cpu_drafts.verify_tree_greedy(
        predicts=predicts, accept_index=accepted, accept_token_num=counts, candidates=candidates,
        retrive_index=index, retrive_next_token=child, retrive_next_sibling=sibling,
        target_predict=says,
    )  # fmt: skip
    for row, tree in enumerate(parents):
        node, path = 0, [0]
        while len(path) < depth:
            agree = [i for i in range(DRAFTS) if tree[i] == node
                     and candidates[row, i] == says[row, node]]  # fmt: skip
            if not agree:
                break
            node = agree[0]
            path.append(node)
        places = [row * DRAFTS + i for i in path]
        assert accepted[row].tolist() == places + [-1] * (depth - len(path))
        assert counts[row] == len(path) - 1
        of_row = predicts.view(ROWS, DRAFTS)[row]
        assert of_row[path].tolist() == says[row, path].tolist()
        assert (of_row == -7).sum() == DRAFTS - len(path)


def test_cache_slots_are_packed() -> None:
    pool = torch.arange(40, dtype=torch.int32).view(4, 10)
    out = torch.zeros(5, dtype=torch.int64)
    cpu_drafts.assign_extend_cache_locs(
        torch.tensor([2, 0]), pool, torch.tensor([1, 7]), torch.tensor([4, 9]), out, 10
    )
    assert out.tolist() == [21, 22, 23, 7, 8]
    kept = torch.zeros(6, dtype=torch.int64)
    passed = torch.tensor([[0, 2, -1], [4, -1, -1]], dtype=torch.int32)
    cpu_drafts.fill_accept_out_cache_loc(passed, out, kept)
    assert kept.tolist() == [21, 23, 8, 0, 0, 0]
