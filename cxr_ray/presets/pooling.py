"""Pooling between the mean and the maximum of a map."""

import torch


def log_mean_exp(maps: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Log-sum-exp pooling (Pinheiro & Collobert 2015): towards the mean for `sharpness` to 0, the maximum to infinity.

    ``x* + log(mean(exp(r (x - x*)))) / r`` with the spatial maximum ``x*``, so that no exponent is positive (Wang et al. 2017).
    It is computed from ``exp - 1``, which keeps the digits that small exponents would lose beside 1. The value does not depend
    on ``x*``, hence no gradient flows through it.

    Parameters
    ----------
    maps
        float of any precision, shape (N, C, h, w); computed in float32 or wider.
    sharpness
        ``r``, above 0.

    Returns
    -------
    torch.Tensor
        Shape (N, C), float32 or wider.

    Raises
    ------
    ValueError
        If `sharpness` is not above 0.
    """
    if not sharpness > 0:
        raise ValueError(f"sharpness must be above 0, is {sharpness}; for the mean, take the mean")
    wide = maps if maps.dtype == torch.float64 else maps.float()
    peak = wide.detach().amax(dim=(2, 3), keepdim=True)
    below_one = torch.expm1(sharpness * (wide - peak)).mean(dim=(2, 3))
    return peak[:, :, 0, 0] + torch.log1p(below_one) / sharpness
