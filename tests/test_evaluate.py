"""evaluate.py: metrics against reference values and hand-computed cases, and the commands end to end with tiny numbers."""
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import data
import evaluate as ev

GOLDEN = load_file(Path(__file__).parent / "data" / "metrics.safetensors")
RNG = np.random.default_rng


def images():
    return [np.moveaxis(GOLDEN[f"image.{name}_tchw"], 1, -1) for name in ("test", "ref")]       # (5, 48, 64, 3)


def pose(xyz=(0, 0, 0), rotvec=(0, 0, 0)):
    from scipy.spatial.transform import Rotation
    a_in_b = np.eye(4)
    a_in_b[:3, :3], a_in_b[:3, 3] = Rotation.from_rotvec(rotvec).as_matrix(), xyz
    return a_in_b


# --------------------------------------------------------------------------------------------------------- images

def test_psnr_equals_scikit_image():
    test, ref = images()
    for i in range(5):
        assert ev.psnr(test[i:i + 1], ref[i:i + 1]) == pytest.approx(GOLDEN["image.psnr_skimage"][i], abs=1e-6)
    assert ev.psnr(test, ref) == pytest.approx(GOLDEN["image.psnr_skimage"].mean(), abs=1e-6)


def test_psnr_by_hand():
    true = np.full((2, 4, 4, 3), 0.5)
    assert ev.psnr(true + 0.1, true) == pytest.approx(20.0)
    assert ev.psnr(true, true) == float("inf")
    valid = np.zeros((2, 4, 4), bool)
    assert np.isnan(ev.psnr(true, true, valid))
    valid[0, 0, 0] = True                                               # one wrong pixel outside `valid` does not count
    pred = true.copy()
    pred[0, 0, 0] += 0.01
    pred[0, 1, 1] = 1
    assert ev.psnr(pred, true, valid) == pytest.approx(40.0)


def test_ssim_equals_scikit_image():
    test, ref = images()
    for i in range(5):
        assert ev.ssim(test[i:i + 1], ref[i:i + 1]) == pytest.approx(GOLDEN["image.ssim_skimage_gauss"][i], abs=1e-6)
    assert ev.ssim(ref, ref) == pytest.approx(1.0, abs=1e-12)


def test_ssim_over_some_pixels():
    _, ref = images()
    pred, left = ref.copy(), np.zeros(ref.shape[:3], bool)
    left[:, :, :20] = True
    pred[:, :, 40:] = 0                                                 # farther from `left` than the window reaches
    assert ev.ssim(pred, ref) < 0.8
    assert ev.ssim(pred, ref, left) == pytest.approx(1.0, abs=1e-9)


# ----------------------------------------------------------------------------------------------- depth and points

def test_depth_equals_reference():
    pred, gt = GOLDEN["depth.pred"], GOLDEN["depth.gt"]                 # gt holds zeros and NaNs: not measured
    valid = np.isfinite(gt) & (gt > 0)
    for mask in (valid, None):
        assert ev.abs_rel(pred, gt, mask) == pytest.approx(GOLDEN["depth.raw"][0], abs=1e-6)
        assert ev.delta1(pred, gt, mask) == pytest.approx(GOLDEN["depth.raw"][4], abs=1e-6)
    scaled = pred * np.median(gt[valid]) / np.median(pred[valid])       # the reference's delta1 is 0 without this
    assert ev.abs_rel(scaled, gt) == pytest.approx(GOLDEN["depth.median_scaled"][0], abs=1e-6)
    assert ev.delta1(scaled, gt) == pytest.approx(GOLDEN["depth.median_scaled"][4], abs=1e-6)
    assert ev.abs_rel(gt, gt) == 0 and ev.delta1(gt, gt) == 1


def test_depth_by_hand():
    true, pred = np.array([1.0, 2.0, 4.0, 0.0]), np.array([1.1, 2.0, 2.0, 9.0])
    assert ev.abs_rel(pred, true) == pytest.approx((0.1 + 0 + 0.5) / 3)
    assert ev.delta1(pred, true) == pytest.approx(2 / 3)
    assert ev.delta1(np.array([-1.0]), np.array([1.0])) == 0            # both quotients are -1 < 1.25, yet it is wrong
    assert ev.abs_rel(pred, true, np.array([0, 1, 0, 1], bool)) == 0
    assert np.isnan(ev.abs_rel(pred, true, np.zeros(4, bool)))


def test_released_masking_scores_points_that_no_surface_has():
    true = np.full((1, 2, 2, 3), 1.0)
    valid = np.array([[[True, True], [True, False]]])
    m_in_n = pose((0.3, 0, 0.5))
    pred_z, true_z, counted = ev.released_masking(true, true, valid, m_in_n)
    assert ev.abs_rel(pred_z, true_z, counted) == pytest.approx((0 + 0 + 0 + 0.5 / 0.5) / 4)     # the camera's own z
    assert ev.abs_rel(true[..., 2], true[..., 2], valid) == 0
    pred_z, true_z, counted = ev.released_masking(true, true, valid, np.eye(4))                  # view n: z = 0 drops out
    assert counted.sum() == 3


def test_point_error_and_chamfer_by_hand():
    true = RNG(0).normal(size=(2, 5, 6, 3))
    valid = np.ones((2, 5, 6), bool)
    assert ev.point_error(true + [0.03, 0.04, 0], true, valid) == pytest.approx(0.05)
    valid[1] = False
    pred = true.copy()
    pred[1] += 1
    assert ev.point_error(pred, true, valid) == 0
    a, b = np.zeros((1, 3)), np.array([[0, 0, 1.0], [0, 0, 3.0]])
    assert ev.chamfer(a, b) == pytest.approx((1 + 2) / 2)               # a -> b: 1, b -> a: mean(1, 3)
    assert ev.chamfer(b, b) == 0 and np.isnan(ev.chamfer(a, b[:0]))


def test_moving_and_flicker():
    first = np.zeros((2, 2, 3))
    true = np.zeros((3, 2, 2, 3))
    true[:, 0, 0, 0] = [0.01, 0.03, 0.05]                               # 2 cm is passed in the second frame
    seen = np.ones((3, 2, 2), bool)
    mask = ev.moving(true, first, seen, seen[0])
    assert mask.sum() == 2 and mask[1:, 0, 0].all()
    assert ev.flicker(true, ~mask) == 0                                 # what moves in the truth is not flicker
    restless = true + 0.1 * np.arange(3)[:, None, None, None] * [0, 1, 0]
    assert ev.flicker(restless, ~mask) == pytest.approx(0.1)


# --------------------------------------------------------------------------------------- distributions of videos

@pytest.mark.parametrize("case", ["full_rank", "rank_deficient", "identical"])
def test_frechet_equals_reference(case):
    a, b = GOLDEN[f"frechet.{case}.a"], GOLDEN[f"frechet.{case}.b"]
    assert ev.frechet_distance(a, b) == pytest.approx(GOLDEN[f"frechet.{case}.value_eigh"][()], rel=1e-6, abs=1e-9)
    assert ev.frechet_distance(b, a) == pytest.approx(ev.frechet_distance(a, b), rel=1e-6, abs=1e-9)


def test_frechet_by_hand():
    a = np.array([[-1.0], [1.0]])                                       # mean 0, variance 2 (ddof 1)
    assert ev.frechet_distance(a, 2 * a + 3) == pytest.approx(9 + 2 + 8 - 2 * 4)
    assert ev.fvd_per_clip(np.zeros((2, 3)), np.ones((2, 3))) == pytest.approx(3)
    assert np.isnan(ev.fvd(np.zeros((1, 3)), np.zeros((1, 3))))
    with pytest.raises(ValueError, match="two samples"):
        ev.frechet_distance(a[:1], a)


def test_i3d_is_called_as_the_hub_file_wants(tmp_path):
    import torch

    class Stub(torch.nn.Module):
        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = True):
            assert x.shape[1] == 3 and x.shape[3:] == (224, 224) and not rescale and not resize and return_features
            return x.mean((3, 4)).flatten(1)

    torch.jit.script(Stub()).save(tmp_path / "i3d.pt")
    video = np.zeros((2, 10, 8, 8, 3), np.uint8)
    video[1] = 255
    features = ev.i3d_features(ev.load_i3d(str(tmp_path / "i3d.pt")), video)
    assert features.shape == (2, 30) and np.allclose(features[0], -1) and np.allclose(features[1], 1)
    (tmp_path / "not.pt").write_text("no network")
    with pytest.raises(ValueError, match="not.pt is not a TorchScript"):
        ev.load_i3d(str(tmp_path / "not.pt"))


# -------------------------------------------------------------------------------------------- agreement of views

SIZE = (48, 64)
INTRINSICS = np.array([[60.0, 0, 31.5], [0, 60.0, 23.5], [0, 0, 1]])


def two_views(angle=0.5):
    """A box face 0.2 m wide, 0.8 m before camera n, before a wall at 1.2 m; camera m stands beside n and looks at the same.

    Returns per view points_in_ref (1, H, W, 3) and the face's mask (1, H, W), by exact ray casting, and m_in_n.
    """
    m_in_n = pose((0, 0, 1)) @ pose(rotvec=(0, -angle, 0)) @ pose((0, 0, -1))
    views = []
    for cam_in_n in (np.eye(4), m_in_n):
        rays = data.pixel_rays(*SIZE, INTRINSICS) @ cam_in_n[:3, :3].T                          # (H, W, 3) in n
        start = cam_in_n[:3, 3]
        at = lambda z: start + rays * ((z - start[2]) / rays[..., 2])[..., None]
        face = at(0.8)
        on_face = (np.abs(face[..., :2]) < 0.1).all(-1)
        views.append((np.where(on_face[..., None], face, at(1.2))[None], on_face[None]))
    return views, m_in_n


def test_cross_view_miou_of_the_truth_and_of_a_shift():
    ((points_n, mask_n), (points_m, mask_m)), m_in_n = two_views()
    n_in_m = data.invert(m_in_n)
    z_m = data.transform(points_m, n_in_m)[..., 2]
    seen = ev.seen_by(points_m, points_n[0, ..., 2], INTRINSICS)
    assert seen[mask_m].mean() > 0.8 and not seen.all()                 # the face hides a piece of the wall from n
    score = lambda points, **more: ev.cross_view_miou(points, mask_n, mask_m, INTRINSICS, INTRINSICS, n_in_m, **more)[0]
    full = dict(z_m=z_m, seen=seen, slack=1)
    assert score(points_n) > 0.85                                       # half-pixel errors at the mask's boundary
    assert score(points_n, **full) == 1
    shifted = [score(points_n + [0, step, 0], **full) for step in (0.03, 0.06, 0.12, 0.3)]
    assert shifted[0] > shifted[1] > shifted[2] > shifted[3] == 0
    assert ev.cross_view_miou(points_n, mask_n & False, mask_m, INTRINSICS, INTRINSICS, n_in_m)[0] == 0


def test_splat_keeps_the_nearest():
    points = np.array([[0, 0, 1.0], [0, 0, 0.5], [0, 0, 2.0], [0, 0, -1.0], [9, 0, 1.0]])
    intrinsics = np.array([[10.0, 0, 2], [0, 10.0, 2], [0, 0, 1]])
    shown, z = ev.splat(points, np.array([True, False, True, True, True]), intrinsics, (5, 5))
    assert not shown.any() and z[2, 2] == 0.5 and np.isinf(z).sum() == 24


def test_pose_errors_by_hand():
    translation, rotation = ev.pose_errors(pose((0.3, 0.4, 0), (0, 0, 0.2)), np.eye(4))
    assert translation == pytest.approx(0.5) and rotation == pytest.approx(0.2, abs=1e-12)
    for angle in (1e-9, 1e-4, 1.0, 3.1, np.pi):
        a = pose((1, 2, 3), RNG(1).normal(size=3))
        _, rotation = ev.pose_errors(a @ pose(rotvec=(0, angle, 0)), a)
        assert rotation == pytest.approx(angle, rel=1e-6)
    assert ev.pose_errors(np.stack([a, a]), np.stack([a, a]))[0].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------- grippers

def test_wilson_interval():
    low, high = ev.wilson_interval(0, 30)
    assert low == 0 and high == pytest.approx(0.1135, abs=1e-4)
    assert ev.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert ev.wilson_interval(30, 30)[1] == 1 and ev.wilson_interval(0, 0) == (0, 1)


def test_add_by_hand(monkeypatch):
    finger = np.array([[0, 0.01, 0.1]])
    monkeypatch.setattr(data, "gripper_mesh", lambda: dict(hand=(np.zeros((1, 3)), None), finger=(finger, None)),
                        raising=False)
    points = ev.gripper_points(0.08)
    assert points == pytest.approx(np.array([[0, 0, 0], [0, 0.05, 0.1], [0, -0.05, 0.1]]))
    still = np.eye(4)
    assert ev.add_distance(still, 0.04, still, 0.04) == 0
    assert ev.add_distance(pose((0, 0, 0.02)), 0.04, still, 0.04) == pytest.approx(0.02)
    assert ev.add_distance(still, 0.08, still, 0.02) == pytest.approx(2 * 0.03 / 3)             # only the fingers differ
    several = ev.add_distance(np.stack([still, still]), np.array([0.04, 0.08]), still, np.array([0.04, 0.04]))
    assert several == pytest.approx([0, 2 * 0.02 / 3])
