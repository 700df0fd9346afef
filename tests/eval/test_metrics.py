"""PSNR, SSIM and drift against values worked out by hand or by another library."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from sparse_dit.eval.metrics import (
    drift,
    flat_psnr,
    mean_db,
    nonfinite,
    psnr,
    relative_error,
    ssim,
)


def noise(seed: int = 0, shape: tuple[int, ...] = (3, 16, 20, 3)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def test_psnr_is_the_textbook_value():
    black = np.zeros((2, 4, 4, 3))
    assert psnr(black, black + 0.1) == pytest.approx(20.0)
    assert psnr(black, black + 1.0) == pytest.approx(0.0)
    expected = peak_signal_noise_ratio(noise(0), noise(1), data_range=1.0)
    assert psnr(noise(0), noise(1)) == pytest.approx(expected, rel=1e-6)


def test_psnr_takes_tensors():
    assert psnr(torch.from_numpy(noise(0)), noise(1)) == pytest.approx(psnr(noise(0), noise(1)))
    black = torch.zeros(3, 16, 20, 3, dtype=torch.bfloat16)
    assert math.isfinite(psnr(black, noise()))


def test_equal_videos_are_infinitely_alike():
    assert psnr(noise(), noise()) == math.inf
    assert ssim(noise(), noise()) == pytest.approx(1.0)


def test_a_nan_is_never_hidden():
    broken = noise()
    broken[1, 2, 3, 0] = np.nan
    assert math.isnan(psnr(broken, noise()))
    assert math.isnan(ssim(broken, noise()))
    assert nonfinite(broken) == 1
    assert math.isnan(mean_db([30.0, math.nan]))


def test_ssim_falls_with_noise():
    clean = np.broadcast_to(np.linspace(0, 1, 20, dtype=np.float32)[:, None], (2, 16, 20, 3))
    slight, strong = (
        clean + s * (noise(5, clean.shape) - 0.5).astype(np.float32) for s in (0.05, 0.5)
    )
    assert 1 > ssim(slight, clean) > ssim(strong, clean) > 0


def test_flat_psnr_is_the_variance():
    video = noise()
    variance = np.mean((video - video.mean(axis=(0, 1, 2))) ** 2)
    assert flat_psnr(video) == pytest.approx(-10 * math.log10(variance), rel=1e-5)
    assert flat_psnr(np.full((2, 4, 4, 3), 0.25)) == math.inf


def test_drift_is_relative_to_the_reference():
    reference = [torch.ones(2, 3), 2 * torch.ones(2, 3)]
    assert drift([1.1 * r for r in reference], reference) == pytest.approx([0.1, 0.1])
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.ones(3), torch.zeros(3)) == math.inf


def test_mean_of_decibels_leaves_out_equal_videos():
    assert mean_db([30, 40]) == 35
    assert mean_db([30, math.inf]) == 30
    assert mean_db([math.inf]) == math.inf
    assert math.isnan(mean_db([]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(noise(), noise(shape=(3, 16, 16, 3))), "same shape"),
        (lambda: psnr(noise(shape=(4, 4, 3)), noise(shape=(4, 4, 3))), r"\[T, H, W, 3\]"),
        (lambda: psnr(np.zeros((1, 4, 4, 3), np.uint8), noise(shape=(1, 4, 4, 3))), "uint8"),
        (lambda: ssim(noise(shape=(1, 8, 8, 3)), noise(shape=(1, 8, 8, 3))), "11 x 11"),
        (lambda: drift([torch.ones(2)], []), "same steps"),
        (lambda: relative_error(torch.ones(2), torch.ones(3)), "shapes must be equal"),
    ],
)
def test_wrong_input_says_what_must_hold(call, message):
    with pytest.raises(ValueError, match=message):
        call()
