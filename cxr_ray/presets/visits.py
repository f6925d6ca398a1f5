"""The clinical vector, encoded: what the rich layout tells of single earlier visits is read as the sequence that it is.

A GRU goes over the latest visits from the oldest to the newest; a visit that did not take place leaves its state as it was,
so that one visit and three need no different treatment. Age, sex, view and the summary of all visits go through a small
perceptron. Layouts without single visits, the paper's among them, have the perceptron alone.
"""

import torch
from torch import nn

from cxr_ray.clinical import VISIT_WIDTH, ClinicalLayout

# Where a visit's numbers say whether there was one.
_TOOK_PLACE = 0


class ClinicalEncoder(nn.Module):
    """Clinical numbers to `width` features.

    Parameters
    ----------
    layout
        Of at least one number.
    width
        Features that are given.
    dropout
        Share of the features that are dropped in training.
    """

    def __init__(self, layout: ClinicalLayout, width: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.known = layout.meta_width + layout.summary_width
        self.numbers = nn.Sequential(
            *(nn.Linear(self.known, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)),
        )
        self.visit = nn.GRUCell(VISIT_WIDTH, width) if layout.visits_width else None
        self.after = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, clinical: torch.Tensor) -> torch.Tensor:
        """Clinical numbers (float, (N, K)) to features (float32, (N, width)), in float32 under autocast too."""
        with torch.autocast(clinical.device.type, enabled=False):
            clinical = clinical.float()
            features = self.numbers(clinical[:, : self.known])
            if self.visit is not None:
                features = features + self._course(self.visit, clinical[:, self.known :])
            return self.after(features)

    @staticmethod
    def _course(visit: nn.GRUCell, clinical: torch.Tensor) -> torch.Tensor:
        """The GRU's last state; where it is not known whether a visit took place, it is moved by that visit's probability."""
        state = clinical.new_zeros(clinical.shape[0], visit.hidden_size)
        for numbers in clinical.unflatten(1, (-1, VISIT_WIDTH)).flip(1).unbind(1):
            took_place = numbers[:, _TOOK_PLACE, None]
            state = torch.lerp(state, visit(numbers * took_place, state), took_place)
        return state
