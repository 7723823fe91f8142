"""evaluate.py: metrics against reference values and hand-computed cases; the commands end to end with tiny numbers."""
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

import data
import evaluate as ev

GOLDEN = load_file(Path(__file__).parent / "data" / "metrics.safetensors")
RECORDED = Path(__file__).parent / "data" / "recorded"
RNG = np.random.default_rng


def pose(xyz=(0, 0, 0), rotvec=(0, 0, 0)):
    a_in_b = np.eye(4)
    a_in_b[:3, :3], a_in_b[:3, 3] = Rotation.from_rotvec(rotvec).as_matrix(), xyz
    return a_in_b


def test_image_and_depth_metrics_equal_references():
    test, ref = (np.moveaxis(GOLDEN[f"image.{name}_tchw"], 1, -1).astype(float) for name in ("test", "ref"))
    for metric, golden in ((ev.psnr, "image.psnr_skimage"), (ev.ssim, "image.ssim_skimage_gauss")):
        assert [metric(*pair) for pair in zip(test, ref)] == pytest.approx(GOLDEN[golden], abs=1e-6)
    pred, gt = GOLDEN["depth.pred"], GOLDEN["depth.gt"]                 # gt holds zeros and NaNs: not measured
    valid = np.isfinite(gt) & (gt > 0)
    for mask in (valid, True):
        assert ev.abs_rel(pred, gt, mask) == pytest.approx(GOLDEN["depth.raw"][0], abs=1e-6)
        assert ev.delta1(pred, gt, mask) == pytest.approx(GOLDEN["depth.raw"][4], abs=1e-6)
    scaled = pred * np.median(gt[valid]) / np.median(pred[valid])       # the reference's delta1 is 0 without this
    assert ev.abs_rel(scaled, gt) == pytest.approx(GOLDEN["depth.median_scaled"][0], abs=1e-6)
    assert ev.delta1(scaled, gt) == pytest.approx(GOLDEN["depth.median_scaled"][4], abs=1e-6)


def test_by_hand():
    true = np.full((4, 4, 3), 0.5)
    assert ev.psnr(true + 0.1, true) == pytest.approx(20.0) and ev.psnr(true, true) == 100
    valid, pred = np.zeros((4, 4), bool), true.copy()
    valid[0, 0], pred[0, 0], pred[1, 1] = True, 0.51, 1                 # the second is wrong, but not in `valid`
    assert ev.psnr(pred, true, valid) == pytest.approx(40.0) and np.isnan(ev.psnr(true, true, valid & False))
    true, pred = np.array([1.0, 2.0, 4.0, 0.0]), np.array([1.1, 2.0, 2.0, 9.0])
    assert ev.abs_rel(pred, true) == pytest.approx((0.1 + 0 + 0.5) / 3)
    assert ev.delta1(pred, true) == pytest.approx(2 / 3)
    assert ev.delta1(np.array([-1.0]), np.array([1.0])) == 0            # both quotients are -1 < 1.25, yet it is wrong
    assert ev.abs_rel(pred, true, np.array([0, 1, 0, 1], bool)) == 0 and np.isnan(ev.abs_rel(pred, true, true < 0))
    a, b = np.zeros((1, 3)), np.array([[0, 0, 1.0], [0, 0, 3.0]])
    assert ev.chamfer(a, b) == pytest.approx((1 + 2) / 2)               # a -> b: 1, b -> a: mean(1, 3)
    assert ev.chamfer(b, b) == 0 and np.isnan(ev.chamfer(a, b[:0]))


def test_still_error_forgives_drift_and_not_trembling():
    true = RNG(0).uniform(-1, 1, (48, 64, 3))
    still = np.ones((48, 64), bool)
    drifted = data.transform(true, pose((0.1, 0, 0.05), (0, 0.1, 0)))
    assert ev.still_error(drifted, true, still) < 1e-6
    trembling = drifted + RNG(1).normal(0, 0.01, true.shape)
    assert ev.still_error(trembling, true, still) == pytest.approx(0.01 * 1.538, rel=0.1)           # median of a chi(3)
    assert np.isnan(ev.still_error(true, true, ~still))


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient", "identical"])
def test_frechet_equals_reference(case):
    a, b = GOLDEN[f"frechet.{case}.a"], GOLDEN[f"frechet.{case}.b"]
    for pair in ((a, b), (b, a)):
        assert ev.frechet_distance(*pair) == pytest.approx(GOLDEN[f"frechet.{case}.value_eigh"][()], rel=1e-6, abs=1e-9)


def test_mmd_by_hand_and_without_bias():
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [0.0]])
    kernel = lambda x, y: (x * y + 1) ** 3
    pair = kernel(0, 1) + kernel(2, 0) - kernel(0, 0) - kernel(1, 2)    # h(1, 2) = h(2, 1)
    assert ev.polynomial_mmd(a, b) == pytest.approx(pair) and ev.polynomial_mmd(a, a) == 0
    same = [ev.polynomial_mmd(*RNG(i).normal(size=(2, 8, 20))) for i in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300)         # two sets of 8 from one distribution
    shifted = [ev.polynomial_mmd(x, y + 0.5) for x, y in (RNG(i).normal(size=(2, 8, 20)) for i in range(300))]
    larger = ev.polynomial_mmd(*(RNG(0).normal(size=(2, 3000, 20)) + [[[0]], [[0.5]]]))
    assert np.mean(shifted) == pytest.approx(larger, rel=0.1) and larger > 0.5


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


SIZE = (48, 64)
INTRINSICS = np.array([[60.0, 0, 31.5], [0, 60.0, 23.5], [0, 0, 1]])


def two_views(offset=0.0):
    """A face 0.2 m wide, `offset` along y, 0.8 m before camera n, before a wall at 1.2 m; camera m stands beside n. Per
    view points_in_ref (H, W, 3) and the face's mask (H, W), by exact ray casting; and m_in_n."""
    m_in_n = pose((0, 0, 1)) @ pose(rotvec=(0, -0.5, 0)) @ pose((0, 0, -1))
    views = []
    for cam_in_n in (np.eye(4), m_in_n):
        rays = data.pixel_rays(*SIZE, INTRINSICS) @ cam_in_n[:3, :3].T                              # (H, W, 3) in n
        start = cam_in_n[:3, 3]
        at = lambda z: start + rays * ((z - start[2]) / rays[..., 2])[..., None]
        face = at(0.8)
        on_face = (np.abs(face[..., :2] - [0, offset]) < 0.1).all(-1)
        views.append((np.where(on_face[..., None], face, at(1.2)), on_face))
    return views, m_in_n


def moving_clip(frames=3, step=0.04):
    """A clip of the two views above while the face, which stands for the gripper, moves along y; an arm is parked."""
    instants = [two_views(step * t) for t in range(frames + 1)]
    points = np.stack([[instant[0][v][0] for instant in instants] for v in range(2)]).astype(np.float32)
    face = np.stack([[instant[0][v][1] for instant in instants] for v in range(2)])
    gripper = np.stack([face, face], 2)                                                             # (V, F, A, H, W)
    view_in_ref = np.stack([np.eye(4), instants[0][1]])
    rgb = np.clip(128 + 100 * (points - [0, 0, 1]) + 60 * face[..., None], 0, 255).astype(np.uint8)
    own_z = data.transform(points, data.invert(view_in_ref))[..., 2]
    in_ref = np.stack([[pose((0, step * t, 0.8)), pose((1, 0, 1))] for t in range(frames + 1)])
    opening = np.full((frames + 1, 2), 0.04)
    return data.truth_row(dict(
        observed_rgb=rgb[:, 0], observed_depth=own_z[:, 0], intrinsics=np.stack([INTRINSICS] * 2), fps=2.0,
        observed_gripper=gripper[:, 0], observed_gripper_in_ref=in_ref[0], observed_opening=opening[0],
        true_rgb=rgb[:, 1:], true_points=points[:, 1:], true_valid=np.ones_like(face[:, 1:]),
        true_view_in_ref=view_in_ref, true_gripper=gripper[:, 1:], true_gripper_in_ref=in_ref,
        true_opening=opening)) | {"gripper": face[:, 1:]}


def true_track(clip, model=None):
    assert model is None or model.link == data.WRIST  # a robot knows its arm
    in_ref, opening = clip["true_gripper_in_ref"], clip["true_opening"]
    return dict(gripper_in_ref=in_ref, opening=opening, closed=ev.track.closed_flags(opening),
                lost=np.zeros(in_ref.shape[:2], bool), profile=np.zeros((*opening.shape, len(ev.track.WIDTHS))))


def means(clip, trajectory=None):
    return {name: float(ev.mean(value)) for name, value in ev.score(clip, trajectory).items() if " " not in name}


base = lambda name: name.split("-")[0]


def test_the_truth_is_ideal_everywhere():
    clip = moving_clip()
    values = means(clip, true_track(clip))
    ideal = dict(psnr=100, psnr_same=100, ssim=1, delta1=1, hand=1, tracked=1)                      # the others: 0
    assert {base(name) for name in values} == set(ev.METRICS) - {"fvd", "mmd"}
    assert 0.5 < values.pop("miou") < 1                           # its ceiling: masks are sampled by pixels
    for name, value in values.items():
        assert value == pytest.approx(ideal.get(base(name), 0), abs=1e-5), name
    path = true_track(clip)
    off = means(clip, path | {"opening": path["opening"] + 0.01, "lost": ~path["lost"]})
    assert [off[name] for name in ("opening", "lost", "tracked")] == pytest.approx([0.01, 1, 0])


NOISE = RNG(0).normal(0, 0.003, (2, 3, *SIZE, 3)).astype(np.float32)
SPOILT = [                                          # what is spoilt, and the figures that must get worse, and no others
    (lambda clip: {"rgb": RNG(0).integers(0, 255, clip["rgb"].shape).astype(np.uint8)},
     "psnr-n psnr-m psnr_same-n psnr_same-m ssim-n ssim-m"),
    (lambda clip: {"points": clip["points"] + np.float32([[0, 0.1, 0.1], [0, 0, 0]]).reshape(2, 1, 1, 1, 3)},
     "abs_rel-n points-n points_moving-n hand-n chamfer miou"),
    (lambda clip: {"points": clip["points"] + np.float32([[0, 0, 0], [0, 0, 0.5]]).reshape(2, 1, 1, 1, 3)},
     "abs_rel-m delta1-m points-m points_moving-m hand-m chamfer"),
    (lambda clip: {"points": clip["points"] + NOISE}, "points-n points-m points_moving-n points_moving-m still-n "
     "still-m chamfer abs_rel-n abs_rel-m miou"),
    (lambda clip: {"view_in_ref": clip["view_in_ref"] @ pose((0.1, 0, 0), (0, 0.1, 0))}, "camera_m camera_deg"),
    (lambda clip: {"gripper": np.roll(clip["gripper"], 5, axis=2)}, "miou"),
    (lambda clip: {"true_gripper_in_ref": clip["true_gripper_in_ref"] @ pose((0.05, 0, 0), (0, 0.2, 0))},
     "tracked gripper_m gripper_deg"),
]


@pytest.mark.parametrize("change, figures", SPOILT)
def test_each_figure_gets_worse_when_it_should(change, figures):
    clip = moving_clip()
    trajectory = true_track(clip)
    best, got = means(clip, trajectory), means(clip | change(clip), trajectory)
    up = {name: 1 if "↑" in ev.METRICS[base(name)][0] else -1 for name in best}
    assert {name for name in best if (best[name] - got[name]) * up[name] > 1e-5} == set(figures.split())


def test_missing_keys_leave_their_figures_out():
    clip = moving_clip()
    without = lambda *keys: set(map(base, means({key: clip[key] for key in clip if key not in keys})))
    assert without() - without("true_gripper") == {"hand"}
    assert without() - without("gripper") == {"miou"}
    assert without("points", "valid", "view_in_ref") == {"psnr", "ssim", "psnr_same"}


def test_moving_pixels_expose_the_repeated_frame_and_own_points_the_camera():
    clip = moving_clip(step=0.1)
    clip["true_rgb"][:, :, :4] //= 2                                    # a shadow: no longer an unchanged pixel
    rows = {label: means(*make(clip)) for label, make in ev.baselines().items() if "truth" not in label}
    still, unmoved = rows["last frame repeated"], rows["own points unmoved"]
    assert still["points_moving-n"] > 3 * still["points-n"] > 0 and still["camera_m"] == 0
    assert still["still-m"] < 1e-6 and still["psnr_same-m"] > 50 > still["psnr-m"]
    assert still["tracked"] == 0 and still["gripper_m"] == pytest.approx(0.2)                      # .1, .2, .3
    assert unmoved["abs_rel-n"] == still["abs_rel-n"] and unmoved["abs_rel-m"] > 3 * still["abs_rel-m"]
    assert unmoved["camera_m"] > 0.1


def test_miou_of_hands_that_were_found_in_one_view_or_in_none():
    clip = moving_clip()
    for view in (1, 0):
        clip["gripper"][view] = False
        assert means(clip)["miou"] == 0
    clip["true_gripper"][:] = False                                     # and none was in sight
    assert np.isnan(means(clip)["miou"])


def test_only_hands_that_move_and_are_seen_count():
    clip = moving_clip()
    path = true_track(clip)
    path["gripper_in_ref"] = path["gripper_in_ref"].copy()
    path["gripper_in_ref"][:, 1, 0, 3] += 1                             # the parked arm
    assert means(clip, path)["gripper_m"] == 0
    path["gripper_in_ref"][2, 0, 0, 3] += 1
    assert means(clip, path)["tracked"] == pytest.approx(2 / 3)
    clip["true_gripper"][:, 1] = False                                  # out of sight just then
    values = ev.score(clip, path)
    assert np.isnan(values["tracked"]).tolist() == [False, True, False] and ev.mean(values["tracked"]) == 1


def test_spread_over_seeds_and_horizons_in_the_table():
    row = {"points-n": [1.5, 2.5], "fvd-n": [1.0, 2.0], "points-m": [1.0]}
    assert [ev.cell(row, name) for name in ("points-n", "psnr-n", "fvd-n", "points-m")] \
        == ["2000 ± 707", "", "2 ± 1", "1000"]
    clip = moving_clip(frames=10)
    clip["points"] = clip["points"] + np.float32([0, 0, 0, 1, 1, 0, 0, 0, 0, 1])[:, None, None, None]
    clip["true_gripper"][1] = False                                     # what is not known is left out
    scores, row = ev.score_row([("one", clip, None)])
    assert scores["one"] == row and "hand-n" in row and "hand-m" not in row
    hand = {figure: [value] for figure, value in row.items()}
    assert [ev.cell(hand, f"hand-n {horizon}") for horizon in ev.HORIZONS] == ["1.00", "0.33", "0.80"]
    table = ev.markdown({"ours": hand, "theirs": {}}, ["a note"])
    line = next(line for line in table.split("\n") if "hand within 30 mm ↑ (n 3-5 s)" in line)
    assert [x.strip() for x in line.split("|")[2:4]] == ["0.80", ""] and "paper: ours" in table and "- a note" in table


# ------------------------------------------------------------------------------------------------ commands

def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
    return ev.main()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One recorded episode, two cameras, packed at the tiny preset's size."""
    folder = tmp_path_factory.mktemp("recorded")
    data.pack_folder(RECORDED, 1, folder, (64, 80))
    return folder


@pytest.fixture
def fake_run(tmp_path, monkeypatch):
    """A run folder whose generator adds noise to the truth, 1 cm times its weight, and whose code halves the size."""
    weight, calls = torch.nn.Parameter(torch.ones(1)), []

    class Code(torch.nn.Module):
        encode_latents = lambda self, x: torch.nn.functional.avg_pool2d(x, 2)
        decode_latents = lambda self, z, frames: torch.nn.functional.interpolate(z, scale_factor=2)

    def load(folder):
        net = torch.nn.ParameterDict({"weight": weight})
        net.preset, net.rgb_only = SimpleNamespace(height=64, width=80), "svd" in str(folder)
        return SimpleNamespace(model=net, vaes={"rgb": Code(), "pointmap": Code()}, clip=None, info={"step": 1},
                               folder=Path(folder), device="cpu", dtype=torch.float32)

    def predict(run, clip, frames=10, steps=None, seed=0):
        calls.append((seed, frames))
        row = data.truth_row(clip)
        if run.model.rgb_only:
            return {key: row[key] for key in row if key not in ("points", "valid", "view_in_ref")}
        off = weight.item() * RNG(seed).normal(0, 0.01, (*row["points"].shape[:2], 1, 1, 3))
        return row | {"points": (row["points"] + off).astype(np.float32)}

    monkeypatch.setattr(ev, "load", load)
    monkeypatch.setattr(ev.sample, "predict", predict)
    (tmp_path / "run").mkdir()
    return SimpleNamespace(folder=tmp_path / "run", weight=weight, calls=calls)


def test_task_command_with_the_real_tracker(recorded, fake_run, monkeypatch, capsys):
    run(monkeypatch, "--task", 1, "--data", recorded, "--run", fake_run.folder, "--clips", 1, "--frames", 4)
    out = fake_run.folder / "evaluation"
    results = json.loads((out / "results.json").read_text())["rows"]
    assert list(results) == ["ours", *ev.baselines(), "truth through the code"]
    ours, truth = results["ours"], results["truth, tracked"]
    assert len(ours["points-m"]) == 2 and ours["points-m"][0] != ours["points-m"][1] and truth["points-m"] == [0]
    assert 0.01 < np.mean(ours["points-m"]) < 0.025
    assert truth["tracked"][0] >= 0.5 and truth["lost"][0] == 1 - truth["tracked"][0] and truth["miou"][0] > 0.2
    assert results["truth through the code"]["psnr-n"][0] < 40
    said = capsys.readouterr().out
    assert (out / "results.md").read_text() in said and "paper: ours" in said


def test_predictions_of_any_method(tmp_path, monkeypatch):
    monkeypatch.setattr(ev.track, "track", true_track)
    monkeypatch.setattr(ev, "hand_masks", lambda clip, trajectory: clip["true_gripper"].any(2))
    for name, error in (("seed_0/x", 0.01), ("seed_1/x", 0.1)):         # equal names below two folders are two clips
        clip = moving_clip()
        clip |= {"points": clip["points"] + np.float32(error), "gripper": np.roll(clip["gripper"], 20, axis=3)}
        data.write_npz(tmp_path / "method" / name / "prediction.npz", clip)
    run(monkeypatch, "--predictions", tmp_path / "method", "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"]["method"]["points-n"] == pytest.approx([np.sqrt(3) * (0.01 + 0.1) / 2], rel=1e-3)
    per_clip = results["per_clip"]["method"][0]
    assert per_clip["seed_1/x"]["points-n"] > per_clip["seed_0/x"]["points-n"]
    mious = [results["rows"][label]["miou"][0] for label in ("method", "truth, tracked")]
    assert mious[0] < 0.5 < mious[1]                                    # their own masks; the baselines' are ours


@pytest.mark.parametrize("change, message", [           # others in tests/test_faults.py
    (dict(points=np.zeros((1, 3, *SIZE, 3), np.float32)), "'points' has shape"), (dict(true_rgb=None), "no 'true_rgb'"),
    (dict(gripper=np.zeros((3, *SIZE), bool)), "'gripper' has shape")])
def test_bad_predictions_are_one_line(change, message, tmp_path, monkeypatch):
    clip = {key: value for key, value in (moving_clip() | change).items() if value is not None}
    data.write_npz(tmp_path / "a" / "prediction.npz", clip)
    with pytest.raises(ValueError, match=f"a/prediction.npz: .*{message}"):
        run(monkeypatch, "--predictions", tmp_path)


@pytest.mark.parametrize("words, message", [
    ("", "say --task"), ("--task 1 --rollout 0", "--rollout 0"),
    ("--task 1 --rollout 2 --clips 3", "--clips does nothing"),
    ("--task 1 --rollout 2 --seeds 3", "--seeds does nothing"), ("--task 1 --execute 3", "--execute does nothing"),
    ("--task 1 --clips 0", "--clips 0"), ("--task 1 --execute 3 --ablation --minutes 3", "--execute does nothing"),
    ("--predictions X --views 3", "--views does nothing"), ("--task 1 --rollout 1 --execute 11", "only 10 frames"),
    ("--task 1 --rollout 1 --frames 4 --execute 5", "only 4 frames"), ("--task 1 --views 1", "--views 1: at least 2"),
])
def test_flags_are_honoured_or_refused(words, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *words.split())


def test_ablation_trains_four_rows_alike(recorded, fake_run, monkeypatch):
    commands = []
    monkeypatch.setattr(ev.track, "track", true_track)
    returns = lambda code: lambda words: commands.append(words) or subprocess.CompletedProcess(words, code)
    monkeypatch.setattr(ev.subprocess, "run", returns(0))
    run(monkeypatch, "--task", 1, "--data", recorded, "--run", fake_run.folder, "--frames", 1, "--clips", 1,
        "--seeds", 3, "--ablation", "--steps", 7)
    assert [[word for word in words if word in ("--rgb_only", "--mv_attention", "none", "rgb")] for words in commands] \
        == list(ev.ABLATION.values())
    for words in commands:
        assert f"--vae {fake_run.folder} --seed 3" in " ".join(words) and "--steps 7" in " ".join(words)
    rows = json.loads((fake_run.folder / "ablation" / "results.json").read_text())["rows"]
    assert list(rows)[:4] == list(ev.ABLATION) and "points-m" in rows["ours"] and "points-m" not in rows["SVD"]
    monkeypatch.setattr(ev.subprocess, "run", returns(1))
    with pytest.raises(ValueError, match="train.py stopped"):
        ev.train_ablation(1, recorded, fake_run.folder, [0])


# ------------------------------------------------------------------------------------------------ closed loop

oracle = lambda *now: [ev.scripted_future(*now, 10)]


@pytest.fixture
def perfect_tracker(monkeypatch):
    monkeypatch.setattr(ev.track, "track", true_track)
    monkeypatch.setattr(ev, "CANDIDATES", 2)                            # no choice of cameras: it takes seconds


@pytest.mark.parametrize("task, acted", [(1, 4), (2, 3), (3, 10)])
def test_rollout_of_the_true_future_succeeds(task, acted, perfect_tracker):
    looks = []
    attempt = lambda imagine: ev.rollout(task, ev.ROLLOUT_SEED, (16, 20), imagine, False, acted=acted)
    assert attempt(lambda *now: looks.append(now[1]) or oracle(*now)) == "success"
    assert looks == list(range(0, looks[-1] + 1, acted * ev.STRIDE)) and len(looks) * acted > 10


def test_a_lost_hand_heads_for_where_it_is_found_next(perfect_tracker, monkeypatch):
    world = data.World(1)
    world.reset(ev.ROLLOUT_SEED)
    first, moves = world.gripper_in_world, np.stack([pose((0, 0, 0.01 * t), (0, 0, 0.1 * t)) for t in (0, 0, 0, 3, 3)])
    path = dict(gripper_in_ref=first @ moves[:, None], opening=np.array([[0.08], [0.02], [0.02], [0.06], [0.06]]),
                closed=np.zeros((5, 1), bool), lost=np.array([[0], [1], [1], [0], [1]], bool))
    for t, along, width in ((1, 0.01, 0.08), (2, 0.02, 0.08), (3, 0.03, 0.06), (4, 0.03, 0.06)):
        ev.execute(world, path, first, t)                               # lost at last: it stays
        assert world.gripper_in_world[0] == pytest.approx(first[0] @ pose((0, 0, along), (0, 0, 10 * along)), abs=1e-9)
        assert world.opening[0] == pytest.approx(width)                 # fingers wait until they are seen
    looks, look = [], lambda *now: looks.append(now[1]) or oracle(*now)
    monkeypatch.setattr(ev.track, "track", lambda clip, model: true_track(clip) | {"lost": np.ones((11, 1), bool)})
    ev.rollout(1, ev.ROLLOUT_SEED, (16, 20), look, True, acted=4)
    assert len(looks) > 3 and set(np.diff(looks)) == {4 * ev.STRIDE}    # never found: another look


def test_a_hand_that_rests_acts_on_until_it_has_done_something(perfect_tracker, monkeypatch):
    def rests(clip, model):
        path, moves = true_track(clip), np.stack([pose((0, 0, 0.02 * max(t - 2, 0))) for t in range(11)])
        return path | {"gripper_in_ref": path["gripper_in_ref"][:1] @ moves[:, None],
                       "opening": path["opening"][:1].repeat(11, 0), "closed": np.zeros((11, 1), bool)}

    looks, look = [], lambda *now: looks.append(now[1]) or oracle(*now)
    monkeypatch.setattr(ev.track, "track", rests)
    ev.rollout(1, ev.ROLLOUT_SEED, (16, 20), look, True, acted=1)
    assert len(looks) > 3 and set(np.diff(looks)) == {3 * ev.STRIDE}
    closes = lambda clip, model: rests(clip, model) | {
        "opening": clip["true_opening"][0] - 0.01 * np.arange(11)[:, None]}
    monkeypatch.setattr(ev.track, "track", closes)                      # fingers that move are an act too
    looks.clear()
    ev.rollout(1, ev.ROLLOUT_SEED, (16, 20), look, True, acted=1)
    assert looks[:4] == [0, ev.STRIDE, 2 * ev.STRIDE, 3 * ev.STRIDE]


def test_failures_are_sorted(perfect_tracker, monkeypatch):
    moved = lambda clip, model: true_track(clip) | {"gripper_in_ref": np.concatenate(
        [clip["true_gripper_in_ref"][:1], clip["true_gripper_in_ref"][1:] @ pose((0.1, 0.1, 0.1))])}
    attempt = lambda generated: ev.rollout(1, ev.ROLLOUT_SEED, (16, 20), oracle, generated)
    monkeypatch.setattr(ev.track, "track", moved)
    assert attempt(generated=True) == "generation" and attempt(generated=False) == "tracking"
    monkeypatch.setattr(ev.track, "track", lambda clip, model: moved(clip, model) | {
        "lost": (np.arange(11) == 5)[:, None]})
    assert attempt(generated=True) == "tracking"
    monkeypatch.setattr(ev.track, "track", lambda clip, model: true_track(clip) | {
        "opening": np.full((11, 1), 0.08), "closed": np.zeros((11, 1), bool)})
    assert attempt(generated=True) == "execution"                       # it never grasps


def test_execution_needs_no_camera_pose_and_lets_go_before_it_leaves():
    world = data.World(1)
    for frame in (np.eye(4), pose((3, 1, 2), (0.3, 0.2, 0.1))):
        world.reset(ev.ROLLOUT_SEED)
        start = world.gripper_in_world
        path = np.stack([frame @ start @ pose((0, 0, 0.01 * t)) for t in range(4)])
        never, first = np.zeros((4, 1), bool), world.gripper_in_world
        for t in (1, 2):
            ev.execute(world, dict(gripper_in_ref=path, opening=np.full((4, 1), 0.06), closed=never, lost=never), first, t)
        assert world.gripper_in_world == pytest.approx(start @ pose((0, 0, 0.02)), abs=1e-9)
    start, steps = world.gripper_in_world, []
    world.step = lambda in_world, opening: steps.append((np.linalg.norm((in_world - start)[0, :3, 3]), opening[0]))
    wider = dict(gripper_in_ref=path, opening=world.opening + 0.02 * np.arange(4)[:, None], lost=never)
    ev.execute(world, wider | dict(closed=never), start, 1)
    moved, width = zip(*steps)
    assert moved[1] == 0 and moved[-1] == pytest.approx(0.01) and width[2] == pytest.approx(world.opening[0] + 0.02)
    steps.clear()
    ev.execute(world, wider | dict(closed=~never), start, 1)                   # until they are stopped
    assert steps[-1][1] == 0


def test_cameras_are_placed_to_see_the_hand(monkeypatch):
    monkeypatch.setattr(ev, "CANDIDATES", 6)
    world, size = data.World(1), (32, 40)
    world.reset(ev.ROLLOUT_SEED)
    cameras, script = ev.place_cameras(world, RNG(0), size, 3), world.demonstration
    assert np.allclose(world.gripper_in_world, script[0][0])            # the script was played in a copy
    drawn = data.sample_cameras(RNG(0), script[0][..., :3, 3] + data.TCP * script[0][..., :3, 2], size, 6)
    hand = []                                                           # pixels (frames, cameras)
    for t, step in enumerate(zip(*script)):
        world.step(*step)
        if t % ev.STRIDE == 0:
            hand.append((world.film(*drawn, size)[2] == data.RIGHT_GRIPPER).sum((1, 2)))
    first, second, third = (next(i for i in range(6) if np.allclose(camera, drawn[1][i])) for camera in cameras[1])
    least, pairs = np.min(hand, 0), np.maximum(hand, np.array(hand)[:, [first]]).min(0)
    assert least[first] == least.max() > least.min() and pairs[second] == pairs.max() and third not in (first, second)


def test_every_camera_is_the_reference_once(monkeypatch):
    world, seen = data.World(1), []
    world.reset(ev.ROLLOUT_SEED)
    cameras = data.sample_cameras(RNG(0), world.demonstration[0][..., :3, 3], (16, 20), 3)
    monkeypatch.setattr(ev.sample, "predict", lambda run, clip, frames, steps, seed: seen.append(seed) or clip)
    clips = ev.predict_in_turn(None, world, 40, cameras, (16, 20))
    assert seen == [40] * 3
    for first, clip in enumerate(clips):
        order = [first, (first + 1) % 3, (first + 2) % 3]
        assert np.array_equal(clip["observed_rgb"], clips[0]["observed_rgb"][order])
        assert np.array_equal(clip["ref_in_world"], cameras[1][first])


def test_rollout_command(perfect_tracker, fake_run, monkeypatch, capsys):
    still = lambda clip, key: {"true_" + key: np.stack([clip["observed_" + key]] * 11)}
    monkeypatch.setattr(ev.sample, "predict", lambda run, clip, **_: clip | still(clip, "gripper_in_ref")
                        | still(clip, "opening"))
    run(monkeypatch, "--task", 1, "--rollout", 1, "--run", fake_run.folder, "--execute", 5)
    results = json.loads((fake_run.folder / "rollout" / "rollouts.json").read_text())
    assert results == {"ours": ["generation"], "oracle: the true future": ["success"]}
    said = capsys.readouterr().out
    assert "| 0/1 = 0.00 | 0.00-0.79 | 1 | 0 | 0 |" in said and "| 1/1 = 1.00 | 0.21-1.00 | 0 | 0 | 0 |" in said
    with pytest.raises(ValueError, match="RGB only"):
        run(monkeypatch, "--task", 1, "--rollout", 1, "--run", "svd")
