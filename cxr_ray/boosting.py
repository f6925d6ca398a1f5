"""Boosted trees on the clinical numbers (Friedman 2001), grown by scikit-learn, one set a finding.

What is known of a patient is a table of a hundred numbers, many of them flags and shares, and trees read such tables as well as
networks do, and differently: together they are better than either.
"""

from dataclasses import dataclass, replace

import numpy as np
import ray
import torch

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.losses import prior_log_odds
from cxr_ray.presets.forest import LARGEST, Forest
from cxr_ray.progress import ProgressReport

# Chosen by cross-validation over patients of the official train_val list.
LEARNING_RATE = 0.03
_LEAST_IN_A_LEAF = 40
_PENALTY = 10.0
_SHARE_OF_NUMBERS = 0.2
# Trees are compared with what scikit-learn answers on so many rows.
_CHECKED_ROWS = 2000
_ARRAYS = ("feature", "kept", "threshold", "value")


@dataclass(frozen=True)
class GrownTrees:
    """Trees of one finding; arrays as `Forest` holds them, without its first axis, and the constant."""

    feature: np.ndarray
    kept: np.ndarray
    threshold: np.ndarray
    value: np.ndarray
    constant: float

    @classmethod
    def none(cls, trees: int, leaves: int, constant: float) -> "GrownTrees":
        """Trees that add nothing to the constant."""
        empty = Forest(trees, leaves)
        arrays = {name: getattr(empty, name)[0].detach().numpy().copy() for name in _ARRAYS}
        return cls(**arrays, constant=constant)

    def log_odds(self, clinical: np.ndarray) -> np.ndarray:
        """What they answer, computed as `Forest` does; float64, shape (N,)."""
        passed = clinical[:, self.feature] <= self.threshold
        possible = np.bitwise_and.reduce(np.where(passed, np.uint8(255), self.kept), axis=2)
        leaf = np.log2(possible & -possible.astype(np.int16)).astype(np.int64)
        return (
            np.take_along_axis(self.value[None], leaf[:, :, None], axis=2)[:, :, 0].sum(axis=1, dtype=np.float64)
            + self.constant
        )


def grow_forest(forest: Forest, clinical: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, torch.Tensor]:
    """What `forest.load_state_dict` takes: trees for each finding, grown on the cluster, a finding a task.

    Parameters
    ----------
    clinical
        float32, shape (N, K), without NaN.
    labels
        float32, shape (N, 14); rows with an unknown label are left out for that finding. A finding of one class gets no tree.

    Raises
    ------
    CxrRayError
        If scikit-learn's trees do not answer as scikit-learn does.
    """
    shared = ray.put(clinical)
    constants = prior_log_odds(labels).numpy()
    # The cluster's logical CPUs share the node's cores; scikit-learn takes as many threads as Ray gives the task.
    tasks = [
        _grow.remote(shared, labels[:, k], forest.trees, forest.leaves, float(constants[k]), seed) for k in range(len(FINDINGS))
    ]
    with ProgressReport("trees", len(tasks), "findings") as progress:
        waiting = tasks
        while waiting:
            done, waiting = ray.wait(waiting)
            progress.advance(len(done))
    grown: list[GrownTrees] = ray.get(tasks)
    state = {name: torch.from_numpy(np.stack([getattr(trees, name) for trees in grown])) for name in _ARRAYS}
    return state | {"constant": torch.tensor([trees.constant for trees in grown])}


@ray.remote(num_cpus=1, max_retries=3)
def _grow(clinical: np.ndarray, labels: np.ndarray, trees: int, leaves: int, constant: float, seed: int) -> GrownTrees:
    return grow_trees(clinical, labels, trees, leaves, constant, seed)


def grow_trees(clinical: np.ndarray, labels: np.ndarray, trees: int, leaves: int, constant: float, seed: int) -> GrownTrees:
    """Trees of one finding; labels float32, shape (N,), NaN where unknown, `constant` where there is nothing to tell apart."""
    from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: PLC0415 - takes a second, and few runs need it

    grown = GrownTrees.none(trees, leaves, constant)
    known = np.isfinite(labels)
    truth = labels[known]
    if not 0 < truth.sum() < truth.size:
        return grown
    model = HistGradientBoostingClassifier(
        learning_rate=LEARNING_RATE,
        max_iter=trees,
        max_leaf_nodes=leaves,
        min_samples_leaf=_LEAST_IN_A_LEAF,
        l2_regularization=_PENALTY,
        max_features=_SHARE_OF_NUMBERS,
        early_stopping=False,
        random_state=seed,
    ).fit(clinical[known], truth)
    grown = replace(grown, constant=float(np.ravel(model._baseline_prediction)[0]))
    # Not public, so what is made of it is checked.
    for number, (predictor,) in enumerate(model._predictors):
        _convert(predictor.nodes, grown, number)
    shown = clinical[:_CHECKED_ROWS]
    if not np.allclose(grown.log_odds(shown), model.decision_function(shown), atol=1e-4):
        from sklearn import __version__  # noqa: PLC0415

        raise CxrRayError(f"scikit-learn {__version__} keeps its trees in another way than is read here; install 1.9 instead")
    return grown


def _convert(nodes: np.ndarray, grown: GrownTrees, number: int) -> None:
    """Write scikit-learn's nodes of a tree, the root first, as tests and leaves from left to right."""
    tests, leaves = 0, 0

    def visit(place: int) -> int:
        """Write what hangs on a node; the leaves on it, a bit each."""
        nonlocal tests, leaves
        node = nodes[place]
        if node["is_leaf"]:
            grown.value[number, leaves] = node["value"]
            leaves += 1
            return 1 << (leaves - 1)
        test, tests = tests, tests + 1
        left = visit(node["left"])
        grown.feature[number, test] = node["feature_idx"]
        grown.threshold[number, test] = _at_most(node["num_threshold"])
        grown.kept[number, test] = 255 & ~left
        return left | visit(node["right"])

    visit(0)


def _at_most(threshold: float) -> np.float32:
    """The largest float32 that is at most this float64: what is compared is float32, so nothing changes sides."""
    narrow = np.float32(np.clip(threshold, -LARGEST, LARGEST))
    return np.nextafter(narrow, np.float32(-np.inf)) if float(narrow) > threshold else narrow
