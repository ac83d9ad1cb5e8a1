"""How good a separation is (BSS-eval), and what separation without pictures or training comes to (NMF, RPCA).

BSS-eval version 3 (Vincent et al. 2006): an estimate is split into what a filter of 512 taps makes of its own
source, what filters make of the other sources (interference), and the rest (artefacts).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TAPS = 512  # samples; that of BSS-eval version 3
SILENT = 1e-5  # energy, the sum of squared samples, below which a source counts as silent
TINY = torch.finfo(torch.float64).eps  # share of an estimate's energy that cannot be told from 0


class BSSEval(NamedTuple):
    """Ratios in dB, one for each estimate: higher is better."""

    sdr: Tensor  # source to everything else
    sir: Tensor  # source to interference
    sar: Tensor  # source and interference to artefacts


def bss_eval(sources: Tensor, estimates: Tensor) -> BSSEval:
    """SDR, SIR and SAR of estimates, each of the source in its own place: there is no search over orders.

    The same numbers as `mir_eval.separation.bss_eval_sources(..., compute_permutation=False)`, for several
    estimates of the same sources at the price of one: only energies of projections are needed, so nothing is
    filtered. Ratios end at about 156 dB, where double precision does. Of sources that lack whole bands, SIR
    and SAR of mir_eval are lower by several dB: its solver loses digits there (checked by a projection).

    Args:
        sources: (S, samples). estimates: (..., S, samples).

    Returns:
        Ratios (..., S) float64. Those of an estimate that is silent are NaN.

    Raises:
        ValueError: shapes that do not fit, a single source, which has no SIR, or a source without energy, for
            which no ratio is defined.
    """
    if sources.ndim != 2 or estimates.ndim < 2 or estimates.shape[-2:] != sources.shape:
        raise ValueError(
            f"estimates must be (..., S, samples) of sources (S, samples) = {tuple(sources.shape)}, "
            f"got {tuple(estimates.shape)}"
        )
    if len(sources) < 2:
        raise ValueError(f"sources must be two or more for SIR, got {len(sources)}")
    if is_silent(sources).any():
        raise ValueError(f"sources {is_silent(sources).nonzero().flatten().tolist()} are silent")
    S, samples = sources.shape
    sources, flat = sources.double(), estimates.double().reshape(-1, S, samples)
    size = 2 ** (samples + TAPS - 1).bit_length()  # of a Fourier transform in which nothing wraps around
    source_spectra, spectra = torch.fft.rfft(sources, size), torch.fft.rfft(flat, size)

    # Inner products of all delayed sources with each other, and with the estimates.
    delays = torch.arange(TAPS, device=sources.device)
    among = torch.fft.irfft(source_spectra[:, None].conj() * source_spectra, size)  # (S, S, lags)
    gram = among[:, :, delays[:, None] - delays]  # (S, S, TAPS, TAPS); lags below 0 are at the end
    products = torch.fft.irfft(source_spectra[:, None, None].conj() * spectra, size)[..., :TAPS]
    products = products.permute(0, 3, 1, 2)  # (S, TAPS, estimates, S): source and its delay, then estimate

    energy = flat.square().sum(-1)
    whole = gram.permute(0, 2, 1, 3).reshape(S * TAPS, S * TAPS)
    explained = projected(whole, products.flatten(0, 1).flatten(1)).view(-1, S)  # by all sources
    own = torch.stack([projected(gram[s, s], products[s, :, :, s]) for s in range(S)], dim=1)
    floor = TINY * energy
    interference, artefacts = (explained - own).clamp(min=floor), (energy - explained).clamp(min=floor)
    ratios = own / (energy - own).clamp(min=floor), own / interference, explained / artefacts
    return BSSEval(*(10 * torch.log10(ratio).view(estimates.shape[:-1]) for ratio in ratios))


def projected(gram: Tensor, products: Tensor) -> Tensor:
    """Energies of vectors projected onto a basis, from the basis' inner products with itself, (n, n), and
    with the vectors, (n, vectors).
    """
    solution, info = torch.linalg.solve_ex(gram, products)
    if info or not solution.isfinite().all():  # the sources hold each other
        solution = torch.linalg.lstsq(gram, products, driver="gelsd").solution
    return (products * solution).sum(0).clamp(min=0)


def is_silent(sounds: Tensor) -> Tensor:
    """(..., samples) -> (...) bool: too little energy to be a source."""
    return sounds.double().square().sum(-1) < SILENT


# --- separation that is blind -------------------------------------------------------------------------------


def nmf_masks(magnitude: np.ndarray, *, components: int = 8, seed: int = 0) -> np.ndarray:
    """Two soft masks by non-negative matrix factorisation (Virtanen 2007).

    (bins, frames) -> (2, bins, frames). `components` spectra times their loudness over time, in
    Kullback-Leibler divergence (scikit-learn's multiplicative updates); then k-means on the spectra
    (logarithmic, so that faint overtones count) deals the components out to two sources, and each source
    takes its share of every bin.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import NMF

    options = dict(beta_loss="kullback-leibler", solver="mu", init="nndsvda", max_iter=100, tol=1e-3)
    nmf = NMF(components, random_state=seed, **options)
    spectra = nmf.fit_transform(magnitude + 1e-8)  # (bins, components)
    shape = np.log(spectra / (spectra.max(0) + 1e-12) + 1e-3).T
    belongs = KMeans(2, n_init=4, random_state=seed).fit_predict(shape)
    parts = np.stack([spectra[:, belongs == n] @ nmf.components_[belongs == n] for n in range(2)])
    return parts / (parts.sum(0) + 1e-12)


def rpca_masks(magnitude: np.ndarray, *, iterations: int = 100, tolerance: float = 1e-4) -> np.ndarray:
    """Two soft masks by robust principal components (Huang et al. 2012), (bins, frames) -> (2, bins, frames).

    The magnitude is split into a low-rank part, taken for the source that repeats itself, and a sparse one,
    taken for the other: min ||low||_* + ||sparse||_1 / sqrt(max(bins, frames)), by inexact augmented Lagrange
    multipliers (Lin et al. 2010).
    """
    weight = max(magnitude.shape) ** -0.5
    norm = np.linalg.norm(magnitude, 2)
    multiplier = magnitude / max(norm, abs(magnitude).max() / weight)
    low, sparse, penalty = np.zeros_like(magnitude), np.zeros_like(magnitude), 1.25 / norm
    for _ in range(iterations):
        u, values, v = np.linalg.svd(magnitude - sparse + multiplier / penalty, full_matrices=False)
        low = (u * np.maximum(values - 1 / penalty, 0)) @ v
        rest = magnitude - low + multiplier / penalty
        sparse = np.sign(rest) * np.maximum(abs(rest) - weight / penalty, 0)
        error = magnitude - low - sparse
        multiplier, penalty = multiplier + penalty * error, min(1.5 * penalty, 1e7)
        if np.linalg.norm(error) < tolerance * np.linalg.norm(magnitude):
            break
    parts = np.stack([abs(low), abs(sparse)])
    return parts / (parts.sum(0) + 1e-12)
