"""Boosted trees of each finding as tensors: they lie in a bundle and run beside a network without the library that grew them.

They are grown by `cxr_ray.boosting` before a network is trained, and nothing of them is learnt by gradients. They answer as
QuickScorer does (Lucchese et al. 2015): all tests of all trees are made at once, each failed one rules out the leaves on its
left, and the first leaf that is left of a tree is where the row ends.
"""

import torch
from torch import nn

from cxr_ray.findings import FINDINGS

# What is compared lies below it, whatever it is; an infinity would not count as a usable weight.
LARGEST = torch.finfo(torch.float32).max
# A bit each in a byte.
MOST_LEAVES = 8
# The tests of so many rows at once stay in a processor's cache.
_ROWS_AT_ONCE = 128


class Forest(nn.Module):
    """Clinical numbers to log-odds: of each finding a constant and one leaf of each of its trees, summed up.

    Parameters
    ----------
    trees
        Of each finding.
    leaves
        A tree has at most so many, and one test less; at most 8.

    Attributes
    ----------
    feature
        The number that a test looks at; int16, shape (14, trees, leaves - 1).
    threshold
        The test is passed where the number is at most this; float32, the same shape. Tests that a tree does not need are
        always passed.
    kept
        The leaves that are possible where the test is failed, the first leaf in the lowest bit; uint8, the same shape.
    value
        Of the leaves, from left to right; float32, shape (14, trees, leaves).
    constant
        float32, shape (14,).
    """

    feature: torch.Tensor
    kept: torch.Tensor
    _first_bit: torch.Tensor

    def __init__(self, trees: int, leaves: int) -> None:
        super().__init__()
        if leaves > MOST_LEAVES:
            raise ValueError(f"trees of {leaves} leaves; give at most {MOST_LEAVES}")
        self.trees, self.leaves = trees, leaves
        tests = (len(FINDINGS), trees, leaves - 1)
        self.register_buffer("feature", torch.zeros(tests, dtype=torch.int16))
        self.register_buffer("kept", torch.full(tests, 255, dtype=torch.uint8))
        # Parameters, since buffers of floats are averaged over workers: a threshold off in its last digit is another one.
        self.threshold = nn.Parameter(torch.full(tests, LARGEST), requires_grad=False)
        self.value = nn.Parameter(torch.zeros(len(FINDINGS), trees, leaves), requires_grad=False)
        self.constant = nn.Parameter(torch.zeros(len(FINDINGS)), requires_grad=False)
        first = [(byte & -byte).bit_length() - 1 for byte in range(1, 256)]
        self.register_buffer("_first_bit", torch.tensor([0, *first]), persistent=False)

    def forward(self, clinical: torch.Tensor) -> torch.Tensor:
        """Clinical numbers (float32, (N, K)) to log-odds (float32, (N, 14))."""
        parts = [self._log_odds(rows) for rows in clinical.split(_ROWS_AT_ONCE)]
        return torch.cat(parts) if parts else clinical.new_zeros((0, len(FINDINGS)))

    def _log_odds(self, clinical: torch.Tensor) -> torch.Tensor:
        possible = clinical.new_full((1,), 255, dtype=torch.uint8)
        for test in range(self.leaves - 1):
            numbers = clinical[:, self.feature[:, :, test].flatten().long()]
            passed = numbers <= self.threshold[:, :, test].flatten()
            possible = possible & torch.where(passed, 255, self.kept[:, :, test].flatten())
        leaf = self._first_bit[possible.long()].unflatten(1, (len(FINDINGS), -1))
        values = self.value.expand(len(clinical), -1, -1, -1).gather(3, leaf[..., None])
        return values.squeeze(3).sum(dim=2) + self.constant
