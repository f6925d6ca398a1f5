"""What is said of networks in few words: what they read, what was published about them, and how sure that is."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxr_ray.clinical import ClinicalLayout
    from cxr_ray.presets.preset import Published

_MEAN_ONLY, _UNVERIFIED = "*", "**"
_LEGEND = {
    _MEAN_ONLY: "the mean was read in a public source; the findings are quoted from memory of the paper: check them there",
    _UNVERIFIED: "quoted from memory of the paper: check it there before you print it",
}


def inputs_read(image: str | None, layout: "ClinicalLayout") -> str:
    """What a network reads; `image` says it of the film, None where it reads none."""
    parts = [image] if image else []
    parts += ["age, sex, view"] if layout.meta else []
    parts += [f"history ({layout.encoding})"] if layout.history else []
    return ", ".join(parts)


def mark(published: "Published") -> str:
    """What stands behind a published figure that nobody here has read in full; see `explained`."""
    if published.verified:
        return ""
    return _MEAN_ONLY if published.mean_verified else _UNVERIFIED


def explained(listed: "Iterable[Published]") -> list[str]:
    """A line for each mark that these figures carry."""
    used = {mark(published) for published in listed}
    return [f"{sign} {meaning}." for sign, meaning in _LEGEND.items() if sign in used]


def published_as_json(listed: "Iterable[Published]") -> list[dict[str, object]]:
    """Published figures for machines."""
    return [
        {
            "split": published.split,
            "auc": dict(published.auc),
            "mean": round(published.mean, 4),
            "verified": published.verified,
            "mean_verified": published.mean_verified,
        }
        for published in listed
    ]
