"""Camera rays against published values, their folding, and the picture of a path."""

import json

import pytest
import torch
from PIL import ImageColor

from tests.reference import load_case, tiny_dit
from wan_core.conditioning.camera import MOVES, CameraPath, camera_conditioning, camera_embedding, plucker_rays
from wan_core.conditioning.camera_picture import END, START, trajectory_picture
from wan_core.conditioning.pose_rows import DEFAULT_ORIGIN
from wan_core.media import frames_to_tensor
from wan_core.types import Conditioning, VideoSize

move = CameraPath.from_direction


@pytest.mark.parametrize("direction", ["Left", "Down", "RightUp", "In"])
def test_rays_equal_the_published_ones(direction):
    case = load_case(f"camera_{direction}")
    call = {key: json.loads(value) for key, value in case.metadata.items()}
    path = move(call["direction"], call["frames"], call["speed"])
    rays = plucker_rays(path, call["width"], call["height"])
    assert rays.dtype == torch.float32
    assert rays.shape == case["plucker"].shape
    assert (rays - case["plucker"]).abs().max() < 1e-6


def test_the_diffsynth_mode_sees_otherwise():
    path, sheared = move("Left", 5, 0.1), move("Left", 5, 0.1, mode="diffsynth")
    rays, other = plucker_rays(path, 48, 32), plucker_rays(sheared, 48, 32)
    assert torch.equal(rays[..., 3:], rays[:1, ..., 3:].expand(5, 32, 48, 3))
    assert other[..., :3].abs().max() == 0
    # World-to-camera with 0.1 k in its upper right corner: its inverse takes 0.1 k times z off x.
    shear = 0.1 * torch.arange(5.0)[:, None, None]
    assert torch.allclose(other[..., 3], rays[..., 3] - shear * rays[..., 5], atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "fx", "fy"),
    [
        (1280, 720, 681.13915, 681.13915),
        (832, 480, 0.532139961 * 480 * 1280 / 720, 0.946026558 * 480),
        (480, 832, 0.532139961 * 832 * 1280 / 720, 0.946026558 * 832),
        (1280, 480, 0.532139961 * 1280, 0.946026558 * 720),
    ],
)
def test_the_field_of_view_is_cut_and_not_squeezed(width, height, fx, fy):
    rays = plucker_rays(move("None", 1), width, height)[0, ..., 3:]
    assert torch.allclose(torch.linalg.vector_norm(rays, dim=-1), torch.ones(height, width))
    column, row = width // 5, height // 7
    x, y, z = rays[row, column].tolist()
    assert x / z == pytest.approx((column + 0.5 - width / 2) / fx, abs=1e-5)
    assert y / z == pytest.approx((row + 0.5 - height / 2) / fy, abs=1e-5)
    assert fx == pytest.approx(fy, rel=1e-6)


def test_a_ray_runs_through_its_camera_and_away_from_it():
    path = move("CW", 5, 0.5).then(move("RightDown", 5, 0.3)).then(move("In", 3))
    rays = plucker_rays(path, 16, 24).double()
    moment, direction = rays.split(3, dim=-1)
    origin = path.poses[:, None, None, :3, 3].expand_as(direction)
    assert torch.allclose(moment, torch.linalg.cross(origin, direction), atol=1e-6)
    forward = path.poses[:, None, None, :3, 2]
    assert (direction * forward).sum(-1).min() > 0


def test_a_lens_that_changes_on_the_way_counts_in_its_frame():
    zoomed = [*DEFAULT_ORIGIN]
    zoomed[1:3] = 2 * zoomed[1], 2 * zoomed[2]
    path = CameraPath.from_rows([DEFAULT_ORIGIN, zoomed, DEFAULT_ORIGIN])
    rays = plucker_rays(path, 32, 16)
    assert torch.equal(rays[0], rays[2])
    assert torch.equal(rays[1], plucker_rays(CameraPath.from_rows([zoomed]), 32, 16)[0])
    assert not torch.equal(rays[0], rays[1])


def test_folding_repeats_the_first_frame_and_interleaves_groups_of_four():
    size = VideoSize(48, 32, 9)
    path = move("LeftUp", 9).then(move("CW", 1))
    rays = plucker_rays(path, size.width, size.height)
    folded = camera_embedding(path, size)
    assert folded.shape == (1, 24, 3, 32, 48)
    for latent_frame, frames in enumerate([(0, 0, 0, 0), (1, 2, 3, 4), (5, 6, 7, 8)]):
        for channel in range(6):
            for k, frame in enumerate(frames):
                assert torch.equal(folded[0, 4 * channel + k, latent_frame], rays[frame, ..., channel])
    half = camera_embedding(path, size, torch.bfloat16)
    assert torch.equal(half, folded.bfloat16())


def test_a_path_of_another_length_is_stretched_with_a_notice(caplog):
    caplog.set_level("INFO", "wancore")
    size = VideoSize(32, 16, 9)
    stretched = camera_embedding(move("Left", 5), size)
    assert "5 frames over the video's 9" in caplog.text
    assert torch.allclose(stretched, camera_embedding(move("Left", 9, 1 / 108), size), atol=1e-6)
    assert camera_embedding(move("Left", 5), VideoSize(32, 16, 1)).shape == (1, 24, 1, 16, 32)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0x16"):
        plucker_rays(move("Left", 5), 0, 16)


def test_the_model_sees_the_path():
    dit, size = tiny_dit("fun_camera"), VideoSize(32, 48, 5)
    generator = torch.Generator().manual_seed(0)
    cond = Conditioning(
        text=torch.randn(1, 512, 64, generator=generator),
        image_tokens=torch.randn(1, 257, 1280, generator=generator),
        concat=torch.randn(1, 16, *size.latent.shape, generator=generator),
    )
    x = torch.randn(1, 16, *size.latent.shape, generator=generator)

    def velocity(*names: str, **changes) -> torch.Tensor:
        with torch.no_grad():
            return dit(x, torch.tensor([500.0]), cond.with_inputs(*names, **changes))

    moved = {d: camera_conditioning(cond, move(d, 5, 0.5), size) for d in ("None", "Left", "Right")}
    assert moved["Left"].inputs == ("camera",)
    results = [velocity(camera=c.camera) for c in moved.values()]
    assert all(r.shape == x.shape and r.isfinite().all() for r in results)
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


def pixels(path: CameraPath, *size: int) -> torch.Tensor:
    picture = trajectory_picture(path, *size)
    assert picture.mode == "RGB"
    return frames_to_tensor([picture])[0]


def test_every_move_has_a_picture_of_its_own():
    pictures = {direction: pixels(move(direction, 17), 256, 256) for direction in MOVES}
    assert all(p.shape == (256, 256, 3) for p in pictures.values())
    assert all(p.flatten(0, 1).unique(dim=0).shape[0] > 50 for p in pictures.values())
    assert len({tuple(p.flatten().tolist()) for p in pictures.values()}) == len(MOVES)


@pytest.mark.parametrize("size", [(96, 96), (640, 200), (96, 700)])
def test_pictures_of_any_shape(size):
    path = move("Left", 5).then(move("CW", 9)).then(move("In", 5))
    assert pixels(path, *size).shape == (size[1], size[0], 3)


def test_pictures_of_the_odd_paths():
    for path in (move("None", 1), move("Left", 9, 1e-12), move("In", 9, 1e6), move("Up", 9, mode="diffsynth")):
        assert pixels(path).std() > 0.01
    with pytest.raises(ValueError, match="at least 96; got 95x96"):
        trajectory_picture(move("None", 1), 95, 96)


@pytest.mark.parametrize(
    ("direction", "panel", "offset"),
    [("Left", (0, 0), (-1, 0)), ("In", (0, 0), (0, -1)), ("Right", (1, 0), (1, 0)), ("Up", (1, 0), (0, -1)),
     ("Down", (0, 1), (0, 1)), ("Out", (0, 1), (-1, 0))],
)  # fmt: skip
def test_the_picture_shows_which_way_the_camera_goes(direction, panel, offset):
    column, row = panel
    picture = pixels(move(direction, 81), 512, 512)[row * 256 : row * 256 + 256, column * 256 : column * 256 + 256]

    def place(colour: str) -> torch.Tensor:
        wanted = torch.tensor(ImageColor.getrgb(colour)) / 255
        return ((picture - wanted).abs().amax(-1) < 0.02).nonzero().float().mean(0).flip(0)

    way = place(END) - place(START)
    assert way.div(50).trunc().sign().tolist() == list(offset)
