"""What is written can be read back, at the size and look that was meant."""

import imageio.v3 as iio
import numpy as np
import pytest

from sparse_dit.eval.metrics import psnr
from sparse_dit.eval.video import enlarge, save_video, side_by_side, to_uint8


def gradient(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    video = np.zeros((frames, height, width, 3), np.float32)
    video[..., 0] = np.linspace(0, 1, width)
    video[..., 1] = np.linspace(0, 1, frames)[:, None, None]
    video[..., 2] = 0.5
    return video


def read(path) -> np.ndarray:
    return iio.imread(path, plugin="pyav").astype(np.float32) / 255


def test_an_mp4_holds_the_frames(tmp_path):
    path = save_video(tmp_path / "a.mp4", gradient(), fps=8)
    back = read(path)
    assert back.shape == (5, 256, 384, 3)  # 32 x 48, enlarged eight times
    assert psnr(back, enlarge(gradient(), 256)) > 30
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    metadata = iio.immeta(path, plugin="pyav")
    assert (metadata["codec"], metadata["fps"]) == ("h264", 8)
    assert metadata["video_format"].startswith("yuv420p")


def test_odd_sides_become_even(tmp_path):
    path = save_video(tmp_path / "odd.mp4", gradient(height=33, width=35), min_side=1)
    assert read(path).shape == (5, 34, 36, 3)


def test_one_frame_is_a_video(tmp_path):
    assert read(save_video(tmp_path / "one.mp4", gradient(frames=1))).shape[0] == 1


def test_a_nan_is_magenta():
    video = gradient()
    video[0, 0, 0, 1] = np.nan
    video[0, 0, 1] = np.inf
    shown = to_uint8(video)
    assert shown[0, 0, 0].tolist() == [255, 0, 255]
    assert shown[0, 0, 1].tolist() == [255, 255, 255]


def test_three_panels(tmp_path):
    dense = gradient()
    sparse = dense.copy()
    sparse[:, 8:24, 8:24] += 0.1
    video = side_by_side(dense, sparse)
    assert video.shape[0] == 5
    assert video.shape[2] == 3 * 384 + 8
    caption, panels = video[:, :-256], video[:, -256:]
    assert caption.min() == 0 and caption.max() == 1  # letters on white
    assert np.array_equal(panels[:, :, :384], enlarge(dense, 256))
    difference = panels[:, :, -384:]
    assert difference[:, 0, 0].max() == 0
    assert difference[0, 100, 100, 2] == pytest.approx(0.4, abs=1e-5)
    save_video(tmp_path / "side.mp4", video)


@pytest.mark.parametrize(
    ("name", "fps", "message"), [("a.gif", 8, ".mp4"), ("a.mp4", 0, "fps must be > 0")]
)
def test_bad_requests(tmp_path, name, fps, message):
    with pytest.raises(ValueError, match=message):
        save_video(tmp_path / name, gradient(), fps=fps)
    assert not list(tmp_path.iterdir())


def test_panels_must_match():
    with pytest.raises(ValueError, match="same shape"):
        side_by_side(gradient(), gradient(frames=4))
