"""evaluate.py: metrics against reference values and hand-computed cases; the commands end to end with tiny numbers."""
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import data
import evaluate as ev
import model as model4d
import sample
import vae

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
    pred_z, true_z, counted = ev.released_masking(true, true, valid, np.eye(4))          # view n: z = 0 drops out
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


def two_views(angle=0.5, offset=0.0):
    """A face 0.2 m wide, 0.8 m before camera n, before a wall at 1.2 m; camera m stands beside n and looks at the same.

    Returns per view points_in_ref (H, W, 3) and the face's mask (H, W), by exact ray casting, and m_in_n. The face lies
    `offset` metres along y.
    """
    m_in_n = pose((0, 0, 1)) @ pose(rotvec=(0, -angle, 0)) @ pose((0, 0, -1))
    views = []
    for cam_in_n in (np.eye(4), m_in_n):
        rays = data.pixel_rays(*SIZE, INTRINSICS) @ cam_in_n[:3, :3].T                          # (H, W, 3) in n
        start = cam_in_n[:3, 3]
        at = lambda z: start + rays * ((z - start[2]) / rays[..., 2])[..., None]
        face = at(0.8)
        on_face = (np.abs(face[..., :2] - [0, offset]) < 0.1).all(-1)
        views.append((np.where(on_face[..., None], face, at(1.2)), on_face))
    return views, m_in_n


def test_cross_view_miou_of_the_truth_and_of_a_shift():
    views, m_in_n = two_views()
    ((points_n, mask_n), (points_m, mask_m)) = [(points[None], mask[None]) for points, mask in views]
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


def test_z_buffer_keeps_the_nearest():
    points = np.array([[0, 0, 1.0], [0, 0, 0.5], [0, 0, 2.0], [0, 0, -1.0], [9, 0, 1.0]])
    intrinsics = np.array([[10.0, 0, 2], [0, 10.0, 2], [0, 0, 1]])
    shown, z = ev.z_buffer(points, np.array([True, False, True, True, True]), intrinsics, (5, 5))
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
    assert ev.add_distance(still, 0.08, still, 0.02) == pytest.approx(2 * 0.03 / 3)         # only the fingers differ
    several = ev.add_distance(np.stack([still, still]), np.array([0.04, 0.08]), still, np.array([0.04, 0.04]))
    assert several == pytest.approx([0, 2 * 0.02 / 3])


# ----------------------------------------------------------------------------------------------------- whole clips

def moving_clip(frames=3, step=0.04):
    """prediction.npz's arrays of the two views above while the face, which stands for the gripper, moves along y."""
    instants = [two_views(offset=step * t) for t in range(frames + 1)]
    points = np.stack([[instant[0][v][0] for instant in instants] for v in range(2)]).astype(np.float32)
    gripper = np.stack([[instant[0][v][1] for instant in instants] for v in range(2)])
    view_in_ref = np.stack([np.eye(4), instants[0][1]])
    rgb = np.clip(128 + 400 * (points - [0, 0, 1]) + 60 * gripper[..., None], 0, 255).astype(np.uint8)
    own_z = data.transform(points, data.invert(view_in_ref))[..., 2]
    gripper_in_ref = np.stack([[pose((0, step * t, 0.8)), pose((1, 0, 1))] for t in range(frames + 1)])
    p = dict(observed_rgb=rgb[:, 0], observed_depth=own_z[:, 0], intrinsics=np.stack([INTRINSICS] * 2), fps=2.0,
             true_rgb=rgb[:, 1:], true_points=points[:, 1:], true_valid=np.ones_like(gripper[:, 1:]),
             true_view_in_ref=view_in_ref, true_gripper=gripper[:, 1:, None], observed_gripper=gripper[:, :1],
             true_gripper_in_ref=gripper_in_ref, true_opening=np.full((frames + 1, 2), 0.04),
             observed_gripper_in_ref=gripper_in_ref[0], observed_opening=np.full(2, 0.04))
    return ev.truth_row(p)


def true_track(p):
    in_ref = p["true_gripper_in_ref"]
    return dict(gripper_in_ref=in_ref, opening=p["true_opening"], lost=np.zeros(in_ref.shape[:2], bool))


IDEAL = {"psnr": np.inf, "ssim": 1, "delta1": 1, "miou": 1, "agreement_ratio": 1}               # the others: 0


def base_name(name):
    return name.removesuffix("-n").removesuffix("-m").removesuffix("_moving")


def test_the_truth_is_ideal_everywhere():
    p = moving_clip()
    values = ev.score(p, p["true_gripper"].any(2), true_track(p))
    floors = {"agreement", "miou_paper", "flicker", "flicker_rgb"}      # the truth itself is sampled by pixels
    assert {base_name(name) for name in values} >= {"psnr", "abs_rel", "points", "chamfer", "camera_m", "add", "miou"}
    for name, value in values.items():
        if base_name(name) not in floors and name != "invented":       # the face is always seen
            assert ev.mean(value) == pytest.approx(IDEAL.get(base_name(name), 0), abs=1e-6), name
    assert ev.mean(values["flicker"]) < 1e-3 and 0.5 < ev.mean(values["miou_paper"]) < 1



SPOILT = {                                          # what is spoilt -> the metrics that must get worse
    "rgb": "psnr-n psnr-m ssim-n ssim-m psnr_moving-n psnr_moving-m ssim_moving-n ssim_moving-m flicker_rgb",
    "points of n": "abs_rel-n abs_rel_moving-n points-n points_moving-n chamfer agreement agreement_ratio miou "
                   "miou_paper",
    "points of m": "abs_rel-m delta1-m points-m delta1_moving-m points_moving-m chamfer agreement agreement_ratio",
    "restless points": "flicker points-n points-m",
    "pose": "camera_m camera_rad",
    "track": "gripper_m gripper_rad add opening lost",
    "masks": "miou miou_paper",
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_each_metric_gets_worse_when_it_should(spoilt):
    p = moving_clip()
    masks, trajectory = p["true_gripper"].any(2), true_track(p)
    best = {name: ev.mean(value) for name, value in ev.score(p, masks, trajectory).items()}
    spoil_points = np.zeros_like(p["points"])
    if spoilt == "points of n":
        spoil_points[0] += [0, 0.1, 0.1]
    if spoilt == "points of m":
        spoil_points[1] += [0, 0, 0.5]
    if spoilt == "restless points":
        spoil_points[:, 1] += 0.02
    bad, bad_track = dict(p, points=p["points"] + spoil_points), dict(trajectory)
    if spoilt == "rgb":
        bad["rgb"] = RNG(0).integers(0, 255, p["rgb"].shape).astype(np.uint8)
    if spoilt == "pose":
        bad["view_in_ref"] = p["view_in_ref"] @ pose((0.1, 0, 0), (0, 0.1, 0))
    if spoilt == "track":
        bad_track["gripper_in_ref"] = trajectory["gripper_in_ref"] @ pose((0.05, 0, 0), (0, 0.2, 0))
        bad_track["opening"], bad_track["lost"] = trajectory["opening"] + 0.01, ~trajectory["lost"]
    got = ev.score(bad, np.roll(masks, 5, axis=2) if spoilt == "masks" else masks, bad_track)
    for name in best:
        _, _, _, better = ev.METRICS[name.removesuffix("-n").removesuffix("-m")]
        if name in SPOILT[spoilt].split():
            assert better * ev.mean(got[name]) < better * best[name], name


def test_moving_pixels_expose_the_repeated_frame():
    p = moving_clip(step=0.1)
    still = ev.score(ev.last_frame_row(p))
    assert ev.mean(still["abs_rel_moving-n"]) > 3 * ev.mean(still["abs_rel-n"]) > 0
    assert ev.mean(still["flicker"]) == 0


def test_a_lost_view_scores_zero_not_nothing():
    p = moving_clip()
    masks = p["true_gripper"].any(2)
    masks[1] = False
    assert ev.mean(ev.score(p, masks)["miou"]) == 0


def test_only_moving_grippers_count():
    p = moving_clip()
    trajectory = true_track(p)
    trajectory["gripper_in_ref"] = trajectory["gripper_in_ref"].copy()
    trajectory["gripper_in_ref"][:, 1, :3, 3] += 1                      # the parked arm
    values = ev.score_gripper(trajectory, p["true_gripper_in_ref"], p["true_opening"])
    assert ev.mean(values["gripper_m"]) == 0
    with pytest.raises(ValueError, match="every arm"):
        one_arm = {**trajectory, "gripper_in_ref": trajectory["gripper_in_ref"][:, :1]}
        ev.score_gripper(one_arm, p["true_gripper_in_ref"], p["true_opening"])


def test_a_gripper_that_no_view_sees_must_be_lost():
    p = moving_clip()
    in_ref, gripper = p["true_gripper_in_ref"], np.repeat(p["true_gripper"], 2, axis=2)
    gripper[:, 1] = False                                               # out of sight in the second of three frames
    trajectory = true_track(p)
    trajectory["gripper_in_ref"] = in_ref.copy()
    trajectory["gripper_in_ref"][2, 0, 2, 3] += 1                       # a pose is invented there
    values = ev.score_gripper(trajectory, in_ref, p["true_opening"], gripper)
    assert ev.mean(values["gripper_m"]) == 0 and ev.mean(values["lost"]) == 0 and ev.mean(values["invented"]) == 1
    trajectory["lost"] = np.array([[0], [0], [1], [0]], bool).repeat(2, 1)
    values = ev.score_gripper(trajectory, in_ref, p["true_opening"], gripper)
    assert ev.mean(values["lost"]) == 0 and ev.mean(values["invented"]) == 0


def test_spread_over_seeds():
    clips = lambda a, b: ({"one": {"points-n": np.array([a, b])}, "two": {"points-n": np.array([a, np.nan])}},
                          {"fvd-n": a})
    row = ev.summarise([clips(1.0, 3.0), clips(2.0, 4.0)])
    assert row["points-n"]["per_seed"] == [1.5, 2.5] and row["points-n"]["mean"] == 2
    assert row["points-n"]["spread"] == pytest.approx(np.std([1.5, 2.5], ddof=1))
    assert row["points-n"]["horizon"] == [1.5, 3.5]
    assert [ev.cell(row, name) for name in ("points-n", "psnr-n", "fvd-n")] == ["2000 ± 707", "n/a", "2 ± 1"]
    assert ev.summarise([clips(1.0, 3.0)])["points-n"]["spread"] is None


# ------------------------------------------------------------------------------------------------------- commands

@pytest.fixture
def predictions(tmp_path, monkeypatch):
    """Two clips of somebody's method on disk, and a tracker that finds every gripper where it truly is."""
    monkeypatch.setattr(ev.track, "track", true_track)
    monkeypatch.setattr(ev, "tracked_mask", lambda p, trajectory: p["valid"][0])
    monkeypatch.chdir(tmp_path)
    for name, error in (("good", 0.01), ("bad", 0.1)):
        p = moving_clip()
        ev.write_npz(tmp_path / "method" / name, "prediction.npz", dict(p, points=p["points"] + np.float32(error)))
    return tmp_path / "method"


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    ev.main()


def test_predictions_of_any_method(predictions, monkeypatch, capsys):
    run(monkeypatch, "--predictions", predictions)
    results = json.loads((predictions / "results.json").read_text())
    assert list(results["rows"]) == ["method", "last frame repeated", "ground truth", "ground truth, tracked"]
    error = np.sqrt(3) * (0.01 + 0.1) / 2
    assert results["rows"]["method"]["points-n"]["mean"] == pytest.approx(error, rel=1e-3)
    assert results["rows"]["ground truth"]["psnr-n"]["mean"] == "inf"
    assert results["per_clip"]["method"][0]["bad"]["points-n"] > results["per_clip"]["method"][0]["good"]["points-n"]
    table = (predictions / "results.md").read_text()
    assert "| *paper: ours* |" in table and "--i3d hub" in table and table in capsys.readouterr().out
    for picture in ("horizon.png", "worst.png"):
        assert (predictions / picture).stat().st_size > 5000
    assert (predictions / "good" / "trajectory.npz").exists()

    others = np.zeros((2, 3, *SIZE), bool)                              # masks from elsewhere replace the tracker's
    np.savez(predictions / "good" / "masks.npz", gripper=others)
    assert not ev.tracks(ev.load_prediction(predictions / "good" / "prediction.npz"), predictions / "good")[1].any()


def test_bad_input_is_one_line(predictions, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="say --task"):
        run(monkeypatch)
    with pytest.raises(ValueError, match="no NAME/prediction.npz"):
        run(monkeypatch, "--predictions", tmp_path / "nothing")
    np.savez(predictions / "good" / "masks.npz", gripper=np.zeros(3))
    with pytest.raises(ValueError, match="masks.npz: an array 'gripper' of shape"):
        run(monkeypatch, "--predictions", predictions)
    path = predictions / "good" / "prediction.npz"
    p = dict(np.load(path))
    for change, message in ((dict(points=p["points"][:1]), "'points' has shape"), (dict(rgb=None), "no array 'rgb'"),
                            (dict(true_rgb=None), "no ground truth")):
        np.savez(path, **{key: value for key, value in {**p, **change}.items() if value is not None})
        with pytest.raises(ValueError, match=message):
            ev.load_prediction(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="prediction.npz cannot be read"):
        ev.load_prediction(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One recorded episode, two cameras, packed at the tiny preset's size."""
    folder = tmp_path_factory.mktemp("recorded")
    data.pack_folder(Path(__file__).parent / "data" / "recorded", 1, folder, (64, 80))
    return folder


def recorded_truth(folder):
    episode, start, cameras = ev.test_clips(folder, (64, 80), 2)[-1]
    item = data.read_clip(episode, start, cameras, np.arange(10), (64, 80))
    points = data.denormalize_points(item["points"][:, 1:])
    prediction = sample.to_prediction(*sample.observation(item), item["rgb"][:, 1:], points)
    return ev.truth_row(sample.add_truth(prediction, item))


def test_miou_of_recorded_truth_is_above_0_9_and_falls(recorded):
    p = recorded_truth(recorded)
    masks = p["true_gripper"].any(2)
    score = lambda shift: ev.mean(ev.score_views(dict(p, points=p["points"] + np.float32(shift)), masks)["miou"])
    assert score([0, 0, 0]) >= 0.9
    assert score([0, 0, 0]) > score([0, 0, 0.05]) > score([0, 0, 0.1]) < 0.3
    assert ev.mean(ev.score_views(p, masks)["miou_paper"]) < 0.8        # the hand's far side is seen by one view only


def test_masks_of_tracked_grippers(recorded):
    p = recorded_truth(recorded)
    trajectory = true_track(p)
    both = np.stack([ev.tracked_mask(ev.one_view(p, v), trajectory) for v in range(2)])     # rendered hand, true pose
    true = p["true_gripper"].any(2)
    overlap = lambda a, b: (a & b).sum() / (a | b).sum()
    assert overlap(both[0], true[0]) > 0.5 and overlap(both[1], true[1]) > 0.5
    trajectory["lost"] = ~trajectory["lost"]
    assert not ev.tracked_mask(ev.one_view(p, 0), trajectory).any()


def test_every_test_clip_once(recorded):
    clips = ev.test_clips(recorded, (64, 80), 2)
    assert [tuple(cameras) for _, _, cameras in clips] == [(0, 1), (1, 0)]
    assert len(ev.test_clips(recorded, (64, 80), 2, count=1)) == 1


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A run folder with a freshly built tiny model, and the tracker of `true_track`."""
    preset = model4d.PRESETS["tiny"]
    torch.manual_seed(0)
    model = model4d.Model4D(preset).eval()
    vaes = {name: vae.VAE.from_config(preset.vae).eval() for name in ("rgb", "pointmap")}
    monkeypatch.setattr(sample, "load_run", lambda run, device="cpu": (model, vaes, None))
    monkeypatch.setattr(ev.track, "track", true_track)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "model.json").write_text("{}")
    (run_folder / "model.safetensors").write_text("")
    for picture in ("plot_horizon", "worst_clips"):                     # test_predictions_of_any_method draws them
        monkeypatch.setattr(ev, picture, lambda *_: None)
    return run_folder


def test_task_command_samples_and_compares(recorded, untrained, monkeypatch, capsys):
    run(monkeypatch, "--task", 1, "--data", recorded, "--run", untrained, "--frames", 2, "--steps", 1, "--clips", 1)
    results = json.loads((untrained / "evaluation" / "results.json").read_text())
    assert list(results["rows"]) == ["ours", "last frame repeated", "ground truth", "ground truth, tracked",
                                     "ground truth through the VAEs"]
    ours = results["rows"]["ours"]["points-m"]
    assert len(ours["per_seed"]) == 2 and ours["spread"] == pytest.approx(np.std(ours["per_seed"], ddof=1))
    assert ours["spread"] > 0
    made = sorted((untrained / "evaluation").rglob("prediction.npz"))
    assert len(made) == 2
    sampled = lambda steps: ev.sample_test(untrained, recorded, untrained / "evaluation" / "seed_0", 0, 1, 2, 2, steps)
    written = lambda: made[0].stat().st_mtime_ns
    before = written()
    assert sampled(steps=1) == [made[0].parent] and written() == before             # the same again: not sampled twice
    assert sampled(steps=2) == [made[0].parent] and written() > before


def test_ablation_trains_four_rows_alike(recorded, untrained, monkeypatch):
    commands = []

    def train(command):
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        for name in ("model.json", "model.safetensors"):
            (out / name).write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ev.subprocess, "run", train)
    run(monkeypatch, "--task", 1, "--data", recorded, "--run", untrained, "--frames", 1, "--steps", 1, "--clips", 1,
        "--seeds", 0, "--ablation", "--train_steps", 7)
    switches = [tuple(word for word in command if word in ("--rgb_only", "none", "rgb")) for command in commands]
    assert switches == [(), ("none",), ("--rgb_only", "none"), ("--rgb_only", "rgb")]
    assert all("--steps 7" in " ".join(command) and f"--vae {untrained}" in " ".join(command) for command in commands)
    rows = json.loads((untrained / "ablation" / "results.json").read_text())["rows"]
    assert list(rows)[:4] == list(ev.ABLATION)
    monkeypatch.setattr(ev.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(ValueError, match="train.py stopped"):
        ev.train_ablation(1, recorded, untrained, [0])


# ---------------------------------------------------------------------------------------------------- closed loop

def oracle(size):
    return lambda _, *now: ev.scripted_future(*now, size, 10)


@pytest.fixture
def perfect_tracker(monkeypatch):
    monkeypatch.setattr(ev.track, "track", lambda p: true_track(p))
    monkeypatch.setattr(ev.place_cameras, "__defaults__", (2,))         # no choice of cameras: it takes seconds


@pytest.mark.parametrize("task", data.TASKS)
def test_rollout_of_the_true_future_succeeds(task, perfect_tracker):
    assert ev.rollout(task, ev.ROLLOUT_SEED, (16, 20), oracle((16, 20)), generated=False) == "success"
    assert ev.rollout(task, ev.ROLLOUT_SEED, (16, 20), lambda *_: None, generated=False) == "held still"


def test_failures_are_sorted(perfect_tracker, monkeypatch):
    track, size = ev.track.track, (16, 20)
    elsewhere = np.eye(4)
    elsewhere[:3, 3] = 0.1

    def moved(p):
        path = track(p)
        path["gripper_in_ref"] = np.concatenate([path["gripper_in_ref"][:1], path["gripper_in_ref"][1:] @ elsewhere])
        return path

    outcome = lambda generated: ev.rollout(1, ev.ROLLOUT_SEED, size, oracle(size), generated)
    monkeypatch.setattr(ev.track, "track", moved)
    assert outcome(generated=True) == "generation" and outcome(generated=False) == "tracking"
    monkeypatch.setattr(ev.track, "track", lambda p: {**moved(p), "lost": np.ones((11, 1), bool)})
    assert outcome(generated=True) == "tracking"
    monkeypatch.setattr(ev.track, "track", lambda p: {**track(p), "opening": np.full((11, 1), 0.08)})    # never grasps
    assert outcome(generated=True) == "execution"


def test_lost_frames_are_bridged():
    in_ref = np.stack([pose((x, 0, 0)) for x in (0, 0, 0, 0.3, 0.3)])[:, None]
    lost = np.array([0, 1, 1, 0, 1], bool)[:, None]
    opening = np.array([0.08, 0.08, 0.08, 0.02, 0.02])[:, None]
    bridged = ev.bridge(dict(gripper_in_ref=in_ref, opening=opening, lost=lost))
    assert bridged["gripper_in_ref"][:, 0, 0, 3] == pytest.approx([0, 0.1, 0.2, 0.3, 0.3])
    assert bridged["opening"][:, 0] == pytest.approx([0.08, 0.06, 0.04, 0.02, 0.02])


def test_cameras_are_placed_to_see_the_hand():
    world, size = data.World(1), (32, 40)
    world.reset(ev.ROLLOUT_SEED)
    intrinsics, cam_in_world = ev.place_cameras(world, RNG(0), size, 2, candidates=8)
    tips = world.demonstration[0][..., :3, 3] + data.TCP * world.demonstration[0][..., :3, 2]
    drawn = data.sample_cameras(RNG(0), tips, size, 8)[1]
    assert intrinsics.shape == (2, 3, 3) and not np.allclose(cam_in_world, drawn[:2])
    assert all(any(np.allclose(camera, one) for one in drawn) for camera in cam_in_world)
    assert np.allclose(world.gripper_in_world, world.demonstration[0][0])           # the script was played in a copy


def test_rollout_table(perfect_tracker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--task", 1, "--rollout", 2, "--size", "16x20")
    rows = json.loads((tmp_path / "runs/task_1/rollouts/rollouts.json").read_text())["rows"]
    assert rows["oracle: the true future, 16 x 20"]["success"] == 2 and rows["hold still"]["success"] == 0
    assert "oracle and hold-still rows only" in capsys.readouterr().out
