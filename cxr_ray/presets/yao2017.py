"""`yao2017`: the network of Yao et al., which reads the findings one after another.

A DenseNet trained from scratch turns the film into a vector; an LSTM goes over the findings in a fixed order and gives the
probability of each one given the film and the findings before it, p(y_t | y_<t, x), so that findings that come together can
be learnt as such. In training it is told the true earlier findings (teacher forcing). Split: random by patient, 70/10/20.

What is compared between films is p(y_t | x), and that is the sum over all courses that the earlier findings can take. Feeding
back one's own decisions takes a single course and ranks films by the wrong number. Here the `BEAM` most probable courses
are followed and weighed by their probability. Their number doubles with each finding, so that the first eight findings
are exact; what later ones may be off by is at most the probability of the courses let go, which `FindingChain.marginals`
tells. Chosen blindly, by the frequencies of the whole ChestX-ray14, 128 courses hold 97.5 % at the last finding.

Loss: the paper sums the cross-entropy over the steps, training here averages it, a fourteenth of the same; and it is not
weighted, because only then is the product of the steps the probability of a course.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from cxr_ray.clinical import ClinicalLayout
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, positions
from cxr_ray.presets.preset import Network, NetworkOptions, Preset, Published, in_nih_order

GROWTH = 24
BLOCKS = (4, 6, 8, 8)
STEM_CHANNELS = 2 * GROWTH
HIDDEN = 100
BEAM = 128
LARGEST_LOG_ODDS = 30.0
# What an earlier finding can be told as.
ABSENT, PRESENT, UNKNOWN = range(3)

State = tuple[torch.Tensor, torch.Tensor]


class Marginals(NamedTuple):
    """What the courses that were followed say.

    Attributes
    ----------
    log_odds
        Of each label given the image; float32, shape (N, T).
    coverage
        Probability of the courses still followed at each label, (N, T): p(y_t = 1 | x) lies between c p and c p + 1 - c, where
        p is the probability given here and c its coverage.
    """

    log_odds: torch.Tensor
    coverage: torch.Tensor


class FindingChain(nn.Module):
    """An LSTM that goes over T labels, one a step, and is told the image at every step.

    Parameters
    ----------
    width
        Numbers that describe an image.
    labels
        T.
    hidden
        Width H of the LSTM's state.
    """

    def __init__(self, width: int, labels: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.labels = labels
        self.initial = nn.Linear(width, 2 * hidden)
        self.image = nn.Linear(width, 4 * hidden)
        # Row 0 stands for "nothing yet"; a label has a row for each way in which it can be told.
        self.earlier = nn.Embedding(1 + 3 * (labels - 1), 4 * hidden)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        self.output = nn.Linear(hidden, labels)
        nn.init.uniform_(self.earlier.weight, -(hidden**-0.5), hidden**-0.5)
        with torch.no_grad():
            # A forget gate that begins open (Jozefowicz et al. 2015).
            self.image.bias[hidden : 2 * hidden] += 1

    def begin(self, vector: torch.Tensor) -> tuple[torch.Tensor, State]:
        """Image vectors (float32, (N, width)) to their part of the gates, (N, 1, 4H), and the first state, twice (N, 1, H)."""
        hidden, cell = self.initial(vector).unsqueeze(1).chunk(2, dim=2)
        return self.image(vector).unsqueeze(1), (hidden.tanh(), cell)

    def step(self, label: int, earlier: torch.Tensor, image: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """One label of K courses for each of N images.

        Parameters
        ----------
        label
            Which one, from 0.
        earlier
            The label before: `ABSENT`, `PRESENT` or `UNKNOWN`; int64, shape (N, K). Not read at the first label.
        image
            From `begin`, shape (N, 1, 4H).
        state
            Of the step before, twice (N, K, H).

        Returns
        -------
        tuple
            log-odds of the label given the image and the course so far, (N, K), and the new state.
        """
        row = torch.zeros_like(earlier) if label == 0 else 1 + 3 * (label - 1) + earlier
        hidden, cell = state
        enter, forget, candidate, leave = (image + self.earlier(row) + self.recurrent(hidden)).chunk(4, dim=2)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        return hidden @ self.output.weight[label] + self.output.bias[label], (hidden, cell)

    def forced(self, vector: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """Log-odds of each label given the image and the labels before it, which are told.

        Parameters
        ----------
        vector
            float32, shape (N, width).
        told
            `ABSENT`, `PRESENT` or `UNKNOWN`; int64, shape (N, K, T): K courses for each image.

        Returns
        -------
        torch.Tensor
            float32, shape (N, K, T).
        """
        image, state = self.begin(vector)
        earlier = torch.zeros_like(told[..., 0])
        log_odds = []
        for label in range(self.labels):
            logit, state = self.step(label, earlier, image, state)
            log_odds.append(logit)
            earlier = told[..., label]
        return torch.stack(log_odds, dim=2)

    def marginals(self, vector: torch.Tensor, beam: int) -> Marginals:
        """Log-odds of each label given the image alone, over the `beam` most probable courses of the labels before it.

        Label t has 2^t courses; while these are no more than `beam`, the result is exact. Nothing is drawn at random, and an
        image's courses do not depend on the other images.

        Parameters
        ----------
        vector
            float32, shape (N, width).
        """
        image, state = self.begin(vector)
        rows = torch.arange(vector.shape[0], device=vector.device).unsqueeze(1)
        probability = vector.new_zeros(vector.shape[0], 1)  # log p(course so far | image), (N, K)
        earlier = torch.zeros_like(probability, dtype=torch.long)
        log_odds, coverage = [], []
        for label in range(self.labels):
            logit, (hidden, cell) = self.step(label, earlier, image, state)
            absent, present = probability + F.logsigmoid(-logit), probability + F.logsigmoid(logit)
            log_odds.append(present.logsumexp(dim=1) - absent.logsumexp(dim=1))
            coverage.append(probability.logsumexp(dim=1).exp())
            courses = probability.shape[1]
            probability, kept = torch.cat([absent, present], dim=1).topk(min(beam, 2 * courses), dim=1)
            earlier, parent = kept // courses, kept % courses
            state = hidden[rows, parent], cell[rows, parent]
        return Marginals(torch.stack(log_odds, dim=1), torch.stack(coverage, dim=1))


def enumerated_log_odds(chain: FindingChain, vector: torch.Tensor) -> torch.Tensor:
    """What `FindingChain.marginals` comes near to, over all 2^T courses: for few labels or images, to check it.

    Parameters
    ----------
    vector
        float32, shape (N, width).

    Returns
    -------
    torch.Tensor
        float32, shape (N, T).
    """
    courses = torch.tensor(list(product((ABSENT, PRESENT), repeat=chain.labels)), device=vector.device)
    logits = chain.forced(vector, courses.expand(vector.shape[0], -1, -1))
    taken = courses == PRESENT
    probability = torch.where(taken, F.logsigmoid(logits), F.logsigmoid(-logits)).sum(dim=2, keepdim=True)
    present = probability.masked_fill(~taken, -torch.inf).logsumexp(dim=1)
    return present - probability.masked_fill(taken, -torch.inf).logsumexp(dim=1)


class _DenseLayer(nn.Module):
    """Huang et al. 2017: normalised maps, squeezed to 4 x `GROWTH`, give `GROWTH` new maps beside those that came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.new = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * GROWTH, 1, bias=False)),
            *(nn.BatchNorm2d(4 * GROWTH), nn.ReLU(), nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.cat([maps, self.new(maps)], dim=1)


def _encoder() -> tuple[nn.Sequential, int]:
    """A small DenseNet up to its last maps, a thirty-second of the image, and how many they are."""
    channels = STEM_CHANNELS
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    for number, block in enumerate(BLOCKS):
        if number:
            halved = channels // 2
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, halved, 1, bias=False), nn.AvgPool2d(2)]
            channels = halved
        layers += [_DenseLayer(channels + index * GROWTH) for index in range(block)]
        channels += block * GROWTH
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    encoder = nn.Sequential(*layers)
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return encoder, channels


class Yao2017(Network):
    """Image and clinical numbers to 14 log-odds, in NIH order whatever the order in which they are read.

    Parameters
    ----------
    layout
        Clinical numbers that stand beside the image vector.
    order
        The findings in the order in which the LSTM reads them; it is kept with the weights.
    """

    order: torch.Tensor

    def __init__(self, layout: ClinicalLayout, order: Sequence[str] = FINDINGS) -> None:
        super().__init__()
        self.features, channels = _encoder()
        self.chain = FindingChain(channels + layout.width, len(FINDINGS))
        self.register_buffer("order", torch.tensor(positions(order, FINDINGS)))

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Log-odds given the image and the earlier labels in training, given the image alone in evaluation.

        Labels that are not known are told to the LSTM as such; without `labels`, all of them are. In evaluation no
        label is read.
        """
        vector = torch.cat([self.features(images).mean(dim=(2, 3)), clinical], dim=1)
        # bfloat16 has three digits: too few for a sum of a hundred small probabilities.
        with torch.autocast(vector.device.type, enabled=False):
            if self.training:
                log_odds = self.chain.forced(vector.float(), self._told(labels, len(vector)).unsqueeze(1)).squeeze(1)
            else:
                log_odds = self.marginals(vector.float()).log_odds
        return log_odds[:, self.order.argsort()]

    def marginals(self, vector: torch.Tensor) -> Marginals:
        """`FindingChain.marginals` over `BEAM` courses, in the order of the LSTM; log-odds beyond 30 are cut off."""
        log_odds, coverage = self.chain.marginals(vector, BEAM)
        return Marginals(log_odds.clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS), coverage)

    def _told(self, labels: torch.Tensor | None, images: int) -> torch.Tensor:
        if labels is None:
            return self.order.new_full((images, len(FINDINGS)), UNKNOWN)
        known = torch.where(labels > 0.5, PRESENT, ABSENT)
        return torch.where(labels.isnan(), UNKNOWN, known)[:, self.order]

    def set_prior(self, log_odds: torch.Tensor) -> None:
        """See `Network.set_prior`."""
        with torch.no_grad():
            self.chain.output.bias.copy_(log_odds[self.order.to(log_odds.device)])

    def load_imagenet(self) -> None:
        """See `Network.load_imagenet`; the paper trains from scratch, so there are none."""
        raise CxrRayError(
            "init 'imagenet': preset yao2017 is trained from scratch and has no such weights; "
            "give --init random, a weights file or a bundle"
        )


def _make(options: NetworkOptions) -> Network:
    return Yao2017(options.layout)


PRESET = Preset(
    name="yao2017",
    summary="DenseNet from scratch, then an LSTM that reads one finding after another",
    source="Yao et al. 2017, arXiv 1710.10501: learning to diagnose from scratch by exploiting dependencies among labels",
    published=(
        Published(
            "random by patient, 70/10/20",
            in_nih_order(.772, .904, .859, .695, .792, .717, .713, .841, .788, .882, .829, .767, .765, .914),
            verified=True,
        ),
    ),
    assumed=(
        "DenseNet of 4 blocks (4, 6, 8, 8 layers of 24 maps), a thirty-second of the image at its end",
        "LSTM of 100 units, told the image at every step; findings in NIH order",
        "unweighted cross-entropy, so that the steps multiply to a probability",
        "scores are p(finding | image) over the 128 most probable courses of the earlier findings",
        "Adam at 1e-3, batches of 32, slight turns, shifts and scaling",
    ),
    layout=ClinicalLayout(meta=False, history=False),
    make=_make,
    recipe={
        "loss": "bce",
        "prior_bias": True,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "head_rate": 1.0,
        "weight_decay": 0.0,
        "schedule": "plateau",
        "warmup": 0.0,
        "clip": 1.0,
        "batch_size": 32,
        "augmentation": "mild",
        "augment": 2.0,
    },
    published_size=512,
    pretrained=False,
)  # fmt: skip
