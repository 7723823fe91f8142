"""The tracker on problems with a known answer: clouds moved by a known motion, and a rendered hand on a known path."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

import data
import track

SCRIPT = Path(track.__file__)
SIZE = 96, 120
FRAMES = 7


def motion(degrees, shift, axis=(0.3, -0.5, 0.8)):
    axis = np.array(axis) / np.linalg.norm(axis)
    return track.rigid(
        Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix()[None], np.array(shift, float)[None]
    )[0]


def angle(a, b):
    cosine = (np.einsum("...ij,...ij->...", a[..., :3, :3], b[..., :3, :3]) - 1) / 2
    return np.degrees(np.arccos(cosine.clip(-1, 1)))


def distance(a, b):
    return np.linalg.norm(a[..., :3, 3] - b[..., :3, 3], axis=-1)


def bumpy(count, seed):
    """Points and normals of an ellipsoid with three different axes: no rotation maps it onto itself but half turns."""
    p = np.random.default_rng(seed).standard_normal((count, 3))
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    axes = np.array([0.10, 0.07, 0.05])
    normal = p / axes
    return p * axes, normal / np.linalg.norm(normal, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------- ICP

@pytest.mark.parametrize("planes", ["none", "target", "source"])
def test_icp_recovers_the_motion_that_was_put_in(planes):
    target, normals = bumpy(1500, 0)
    truth = motion(4, (0.004, -0.003, 0.002))
    source = data.transform(target, data.invert(truth))
    kwargs = dict(target=dict(target_normals=normals), none={}, source=dict(source_normals=normals @ truth[:3, :3]))[
        planes
    ]
    got, fitness, rmse = track.icp(
        source, target, max_correspondence_distance=0.03, max_iteration=200, tolerance=1e-10, **kwargs
    )
    assert distance(got, truth) < 1e-5 and angle(got, truth) < 1e-2
    assert fitness == 1 and rmse < 1e-5


def test_icp_resampled_with_outliers_and_many_starts():
    target, normals = bumpy(3000, 0)
    source, _ = bumpy(800, 1)
    truth = motion(5, (0.003, 0.004, -0.002))
    source = data.transform(source, data.invert(truth))
    junk = np.random.default_rng(2).uniform(-0.2, 0.2, (200, 3))
    starts = np.stack([motion(d, (s, 0, 0)) for d in (0, 10) for s in (0, 0.01)])
    got, fitness, rmse = track.icp(np.concatenate([source, junk]), target, normals, starts, 0.02, 60, trim=0.95)
    assert got.shape == (4, 4, 4) and fitness.shape == rmse.shape == (4,)
    assert distance(got, truth).max() < 1e-3 and angle(got, truth).max() < 0.5
    # 800 of 1000 points lie on the target, and a few by chance
    assert 0.75 < fitness.min() and fitness.max() < 0.9
    one, _, _ = track.icp(np.concatenate([source, junk]), target, normals, starts[0], 0.02, 60, trim=0.95)
    assert np.abs(one - got[0]).max() < 1e-4                     # a batch is its members
    unjudged = track.icp(np.concatenate([source, junk]), target, normals, starts, 0.02, 60, trim=0.95, judge=False)
    assert np.array_equal(unjudged[0], got) and unjudged[1:] == (None, None)


def test_kabsch_ignores_points_of_weight_zero():
    source, _ = bumpy(50, 0)
    truth = motion(70, (0.3, 0.2, -0.1))
    target = data.transform(source, truth)
    target[:10] += 1
    weight = np.r_[np.zeros(10), np.ones(40)]
    assert np.abs(track.kabsch(source[None], target[None], weight[None])[0] - truth).max() < 1e-12


def test_icp_refuses_empty_clouds():
    with pytest.raises(ValueError, match="neither empty"):
        track.icp(np.zeros((0, 3)), np.ones((5, 3)))


# ------------------------------------------------------------------------------------------------- a rendered hand

def look_at(position):
    return data.look_at(np.array(position, float), np.array([0.0, 0.0, 0.12]))


CAMERAS = np.stack([look_at((0.75, -0.35, 0.75)), look_at((0.55, 0.6, 0.7))])
INTRINSICS = np.tile([[[100, 0, (SIZE[1] - 1) / 2], [0, 100, (SIZE[0] - 1) / 2], [0, 0, 1.0]]], (2, 1, 1))


def path():
    """Seven frames at 2 Hz: the hand points down, moves by up to 12 cm and 20 degrees a frame, closes and opens
    again."""
    down = Rotation.from_euler("xyz", [180, 0, 20], degrees=True).as_matrix()
    x = [0.0, 0.04, 0.12, 0.12, 0.10, 0.0, -0.1]
    z = [0.30, 0.28, 0.24, 0.20, 0.26, 0.28, 0.30]
    turn = [0, 5, 20, 30, 30, 20, 0]
    rotation = np.stack([Rotation.from_euler("zx", [t, t / 3], degrees=True).as_matrix() @ down for t in turn])
    return (track.rigid(rotation, np.stack([x, np.linspace(-0.05, 0.1, FRAMES), z], 1)),
            np.array([0.078, 0.078, 0.078, 0.03, 0.03, 0.07, 0.078]))


def film(poses, openings):
    """Depth (V,F,H,W) m, gripper masks and RGB of the built-in hand, an arm above it, and a table."""
    model = track.hand_model()
    arm = data.box((0.09, 0.09, 0.3), (0, 0, -0.16))
    table = data.box((2, 2, 0.02), (0, 0, -0.01))
    faces = np.concatenate([model.faces, arm[1] + len(model.vertices), table[1] + len(model.vertices) + len(arm[0])])
    starts = np.cumsum([0, len(model.faces), len(arm[1])])
    colors = np.array([(20, 20, 20), (230, 230, 230), (60, 70, 90), (150, 110, 70)], np.uint8)
    depth, body = [], []
    for pose, opening in zip(poses, openings):
        hand = model.vertices.copy()
        hand[:, 1] += opening * model.vertex_slide
        world = np.concatenate([data.transform(hand, pose), data.transform(arm[0], pose), table[0]])
        z, face = data.rasterize(
            np.stack([data.transform(world, data.invert(c)) for c in CAMERAS]), faces, INTRINSICS, *SIZE
        )
        depth.append(z)
        body.append(np.where(face >= 0, np.searchsorted(starts, face, "right"), 0))      # 1 hand, 2 arm, 3 table
    body = np.stack(body, 1)
    return np.stack(depth, 1), body == 1, colors[body]


def prediction_of(poses, openings):
    depth, mask, rgb = film(poses, openings)
    world_in_ref = data.invert(CAMERAS[0])
    view_in_ref = world_in_ref @ CAMERAS
    own, valid = data.point_maps(depth, INTRINSICS[:, None])
    points = data.transform(own, view_in_ref).astype(np.float32)
    grippers = (world_in_ref @ poses)[:, None]
    return dict(points=points[:, 1:], valid=valid[:, 1:], intrinsics=INTRINSICS, view_in_ref=view_in_ref, fps=2.0,
                observed_depth=depth[:, 0], observed_gripper=mask[:, 0][:, None], observed_gripper_in_ref=grippers[0],
                observed_opening=openings[:1], observed_rgb=rgb[:, 0], rgb=rgb[:, 1:],
                true_gripper_in_ref=grippers, true_opening=openings[:, None])


@pytest.fixture(scope="module")
def video():
    return prediction_of(*path())


@pytest.fixture(scope="module")
def tracked(video):
    return track.track(video)


def test_path_and_opening(video, tracked):
    truth = video["true_gripper_in_ref"]
    assert not tracked["lost"].any()
    assert (
        np.median(distance(tracked["gripper_in_ref"], truth)) < 0.003
        and distance(tracked["gripper_in_ref"], truth).max() < 0.01
    )
    assert np.median(angle(tracked["gripper_in_ref"], truth)) < 2 and angle(tracked["gripper_in_ref"], truth).max() < 5
    assert np.abs(tracked["opening"] - video["true_opening"]).max() < 0.008
    assert tracked["closed"][:, 0].tolist() == [False, False, False, True, True, False, False]


def test_motion_is_in_the_grippers_own_frame(video, tracked):
    """Executed from the first pose it gives the path, in whatever frame that pose is written: no calibration is
    needed."""
    world = motion(50, (1, 2, 3))
    first = world @ tracked["gripper_in_ref"][0]
    assert np.abs(first @ tracked["gripper_motion"] - world @ tracked["gripper_in_ref"][1:]).max() < 1e-9


def test_one_view_is_enough(video):
    per_view = ("rgb", "points", "valid", "intrinsics", "view_in_ref",
                "observed_rgb", "observed_depth", "observed_gripper")
    alone = track.track({**video, **{key: video[key][:1] for key in per_view}})
    off = distance(alone["gripper_in_ref"], video["true_gripper_in_ref"])
    assert np.median(off) < 0.005 and (off[~alone["lost"]] < 0.02).all()


def test_a_hand_that_draws_back_is_not_scenery():
    """Where it comes to lie was its own arm, as far from the cameras: depth alone says that nothing has changed."""
    down = Rotation.from_euler("xyz", [180, 0, 20], degrees=True).as_matrix()
    heights = [0.2, 0.2, 0.33, 0.33, 0.36]
    poses = track.rigid(np.repeat(down[None], 5, 0), np.stack([np.zeros(5), np.zeros(5), heights], 1))
    result = track.track(drawn := prediction_of(poses, np.full(5, 0.078)))
    assert not result["lost"].any()
    assert distance(result["gripper_in_ref"], drawn["true_gripper_in_ref"]).max() < 0.005


def generated(video):
    """The video's points as a generator makes them: 5 mm of noise, mixed edges, the second view 1 cm off."""
    draw = np.random.default_rng(0)
    own = data.transform(video["points"], data.invert(video["view_in_ref"]).astype(np.float32))
    z = gaussian_filter(own[..., 2], (0, 0, 0.7, 0.7)) + 0.005 * draw.standard_normal(own.shape[:-1])
    points = data.transform(own / own[..., 2:] * z[..., None], video["view_in_ref"]).astype(np.float32)
    points[1] += np.float32([0.006, -0.008, 0])
    return {**video, "points": points}


def test_noisy_depth_is_mended_and_clean_depth_is_left(video):
    own, valid = data.point_maps(video["observed_depth"], video["intrinsics"])
    observed = track.make_scene(data.transform(own, video["view_in_ref"]), valid, video["intrinsics"],
                                video["view_in_ref"])
    points, valid = video["points"][:, 2], video["valid"][:, 2]
    assert np.array_equal(track.steady(points, valid, observed), points)
    noisy = generated(video)["points"][:, 2]
    off = lambda p: np.median(np.linalg.norm(p[1] - points[1], axis=-1)[valid[1] & (observed.depth[1] > 0)])
    assert off(noisy) > 0.009 and off(track.steady(noisy, valid, observed)) < 0.003


def test_a_generators_points_are_tracked(video):
    result, truth = track.track(generated(video)), video["true_gripper_in_ref"]
    off = distance(result["gripper_in_ref"], truth)
    assert np.median(off) < 0.01 and np.median(angle(result["gripper_in_ref"], truth)) < 5
    assert (off[~result["lost"]] < 0.03).all()


def test_depth_that_tells_nothing_loses_the_hand(video):
    noise = 0.04 * np.random.default_rng(0).standard_normal(video["points"].shape[:-1])
    own = data.transform(video["points"], data.invert(video["view_in_ref"]).astype(np.float32))
    own = own * (1 + noise / own[..., 2].clip(0.05))[..., None]
    points = data.transform(own, video["view_in_ref"]).astype(np.float32)
    result = track.track({**video, "points": points})
    assert result["lost"][1:].all() and (result["fluctuation"][1:] > track.HOPELESS).all()
    assert np.array_equal(result["gripper_in_ref"][1:], result["gripper_in_ref"][:1].repeat(FRAMES - 1, 0))    # held


@pytest.mark.parametrize("thing, told", [("goes", 1), ("stays", -1), ("none", 0)])
def test_what_comes_along_is_held(thing, told):
    """A stick between the fingers of a hand that moves goes with it, or stays, or there is none."""
    down = Rotation.from_euler("xyz", [180, 0, 20], degrees=True).as_matrix()
    poses = track.rigid(np.repeat(down[None], 2, 0), np.array([[0, 0, 0.3], [0.05, 0.03, 0.33]]))
    model, scenes = track.hand_model(), []
    stick = data.box((0.02, 0.03, 0.12), (0, 0, 0.15))
    table = data.box((2, 2, 0.02), (0, 0, -0.01))
    opened = 0.03
    for pose in poses:
        hand = model.vertices + [0, opened, 0] * model.vertex_slide[:, None]
        bodies = [(data.transform(hand, pose), model.faces), table]
        if thing != "none":
            place = poses[0] if thing == "stays" else pose
            bodies.append((data.transform(stick[0], place), stick[1]))
        vertices, faces = data.merge(*bodies)
        depth, _ = data.rasterize(np.stack([data.transform(vertices, data.invert(c)) for c in CAMERAS]), faces,
                                  INTRINSICS, *SIZE)
        own, valid = data.point_maps(depth, INTRINSICS)
        scenes.append(track.make_scene(data.transform(own, CAMERAS), valid, INTRINSICS, CAMERAS))
    states = [track.first_state(pose, opened) for pose in poses]
    assert track.comes_along(model, *scenes, *states) == told
    states[1].lost = True
    assert track.comes_along(model, *scenes, *states) == 0


def test_a_missing_hand_is_lost_and_found_again(video):
    near = np.linalg.norm(video["points"] - video["true_gripper_in_ref"][1:, 0, None, None, :3, 3], axis=-1) < 0.25
    gone = np.zeros_like(video["valid"])
    gone[:, 2:4] = near[:, 2:4]
    result = track.track({**video, "valid": video["valid"] & ~gone})
    assert result["lost"][:, 0].tolist() == [False, False, False, True, True, False, False]
    assert np.array_equal(result["gripper_in_ref"][4], result["gripper_in_ref"][2])     # held, not guessed
    assert distance(result["gripper_in_ref"], video["true_gripper_in_ref"])[5:].max() < 0.01


def test_first_pose_from_the_mask(video):
    own, valid = data.point_maps(video["observed_depth"], video["intrinsics"])
    scene = track.make_scene(
        data.transform(own, video["view_in_ref"]), valid, video["intrinsics"], video["view_in_ref"]
    )
    poses, opening, scores = track.register(track.hand_model(), scene, video["observed_gripper"][:, 0])
    truth = video["true_gripper_in_ref"][0, 0]
    assert scores[0] >= scores[1]
    errors = [(distance(p, t), angle(p, t)) for p in poses for t in (truth, truth @ track.HALF_TURN)]
    assert min(errors)[0] < 0.01 and min(errors)[1] < 5
    assert angle(poses[0], poses[1] @ track.HALF_TURN) < 20      # both solutions are kept, half a turn apart
    assert abs(opening - 0.078) < 0.01


def test_a_wrong_pose_is_not_believed(video):
    own, valid = data.point_maps(video["observed_depth"], video["intrinsics"])
    scene = track.make_scene(
        data.transform(own, video["view_in_ref"]), valid, video["intrinsics"], video["view_in_ref"]
    )
    truth, model = video["true_gripper_in_ref"][0, 0], track.hand_model()
    wrong = [truth @ motion(0, (0.05, 0, 0)), truth @ motion(60, (0, 0, 0)), truth @ motion(0, (0, 0, -0.1))]
    seen = track.evidence(track.compare(model, scene, np.stack([truth, *wrong]), np.full(4, 0.078), shell=True))
    for anew in (False, True):
        assert track.believed(seen, np.zeros(4), anew).tolist() == [True, False, False, False]


def test_a_right_outline_does_not_contradict(video, monkeypatch):
    monkeypatch.setattr(track, "COARSE", 1.0)                    # neighbours do not speak for a pixel
    own, valid = data.point_maps(video["observed_depth"], video["intrinsics"])
    scene = track.make_scene(
        data.transform(own, video["view_in_ref"]), valid, video["intrinsics"], video["view_in_ref"]
    )
    truth, model = video["true_gripper_in_ref"][0, 0], track.hand_model()
    poses = np.stack([truth @ motion(0, shift) for shift in 0.003 * np.r_[np.eye(3), -np.eye(3)]])
    look = lambda: track.evidence(track.compare(model, scene, poses, np.full(len(poses), 0.078)))
    assert (look().contradict < 0.01 * look().in_view).all()
    scene.near = np.full_like(scene.depth, np.inf)               # no pixel has a neighbour
    assert (look().contradict > 0.02 * look().in_view).all()


# ------------------------------------------------------------------------------------------------------- openings

def test_hysteresis_follows_events_not_noise():
    noise = 0.002 * np.sin(np.arange(40))
    wide = np.r_[np.full(10, 0.078), np.full(10, 0.067), np.full(10, 0.075), np.full(10, 0.01)] + noise
    closed = track.closed_flags(wide[:, None])[:, 0]
    assert closed.tolist() == [False] * 10 + [True] * 10 + [False] * 10 + [True] * 10
    assert track.closed_flags(np.full((3, 1), 0.01)).all()       # it starts closed when it starts below half the stroke


def seen_at(width, points=20):
    """A profile: `points` finger points agree at `width`, m, fewer beside it."""
    return points * np.exp(-((track.WIDTHS - width) / 0.005)**2)


def test_opening_path_follows_what_is_seen():
    true = np.r_[np.full(6, 0.07), np.full(6, 0.02)]
    profiles = [seen_at(width + 0.002 * draw) for width, draw in
                zip(true, np.random.default_rng(0).standard_normal(12))]
    path = track.opening_path(profiles, np.zeros(11), 0.07)
    assert np.abs(path - true).max() < 0.004
    profiles[3] = seen_at(0.03, 5)                        # an outlier that a frame before and a frame after deny
    assert np.abs(track.opening_path(profiles, np.zeros(11), 0.07) - true).max() < 0.004


def test_an_unseen_closing_is_put_where_the_hand_rests():
    profiles = [seen_at(0.07)] * 2 + [np.zeros(len(track.WIDTHS))] * 4 + [seen_at(0.02)] * 2
    speed = np.full(7, 0.1)
    speed[3] = 0.0                                        # between frames 3 and 4
    path = track.opening_path(profiles, speed, 0.07)
    assert np.abs(path - np.r_[np.full(4, 0.07), np.full(4, 0.02)]).max() < 0.003


# ----------------------------------------------------------------------------------------------- files and commands

def run(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True)


def test_command_line(tmp_path, video):
    poses, openings = path()
    depth, mask, rgb = film(poses, openings)
    data.save_episode(
        tmp_path / "episode",
        rgb,
        (1000 * depth).round().astype(np.uint16),
        mask.astype(np.uint8),
        INTRINSICS,
        CAMERAS,
        poses[:, None],
        openings[:, None],
        np.arange(FRAMES) / 2,
        dict(task=1, source="test", rate_hz=2),
    )
    np.savez(tmp_path / "extrinsics.npz", ref_in_world=CAMERAS[0])
    done = run(
        "--episode",
        tmp_path / "episode",
        "--cameras",
        0,
        1,
        "--extrinsics",
        tmp_path / "extrinsics.npz",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert "7 of 7 frames tracked" in done.stdout
    with np.load(tmp_path / "out/trajectory.npz") as result:
        assert result["gripper_in_ref"].shape == (FRAMES, 1, 4, 4) and result["gripper_motion"].shape == (
            FRAMES - 1,
            1,
            4,
            4,
        )
        for key in ("opening", "closed", "fitness", "inlier_rmse", "lost"):
            assert result[key].shape == (FRAMES, 1)
        assert distance(result["gripper_in_world"][:, 0], poses).max() < 0.01
    assert (tmp_path / "out/overlay.gif").stat().st_size > 1000 and (tmp_path / "out/path.png").stat().st_size > 1000


def test_another_rigid_thing_is_tracked(tmp_path):
    """An L of two boxes goes up, along and around; first from its pose, then from its mask alone."""
    boxes = data.box((0.14, 0.06, 0.04), (0, 0, 0)), data.box((0.04, 0.06, 0.1), (0.05, 0, 0.07))
    table = data.box((2, 2, 0.02), (0, 0, -0.01))
    vertices = np.concatenate([v for v, _ in boxes])
    faces = np.concatenate([boxes[0][1], boxes[1][1] + len(boxes[0][0])])
    turns = Rotation.from_euler("z", [[0], [10], [25], [40], [40]], degrees=True).as_matrix()
    poses = track.rigid(turns, np.stack([[0, 0.03, 0.1, 0.14, 0.14], np.zeros(5), [0.02, 0.08, 0.15, 0.15, 0.1]], 1))
    seen = [data.rasterize(np.stack([data.transform(np.concatenate([data.transform(vertices, pose), table[0]]),
                                                    data.invert(c)) for c in CAMERAS]),
                           np.concatenate([faces, table[1] + len(vertices)]), INTRINSICS, *SIZE) for pose in poses]
    depth, face = (np.stack(x, 1) for x in zip(*seen))
    world_in_ref = data.invert(CAMERAS[0])
    own, valid = data.point_maps(depth, INTRINSICS[:, None])
    points = data.transform(own, world_in_ref @ CAMERAS).astype(np.float32)
    np.savez(tmp_path / "prediction.npz", points=points[:, 1:], valid=valid[:, 1:], intrinsics=INTRINSICS, fps=2.0,
             view_in_ref=world_in_ref @ CAMERAS, observed_depth=depth[:, 0],
             observed_object=(face[:, 0] >= 0) & (face[:, 0] < len(faces)),
             observed_rgb=np.zeros((2, *SIZE, 3), np.uint8), rgb=np.zeros((2, 4, *SIZE, 3), np.uint8))
    (tmp_path / "thing.obj").write_text("".join("v {} {} {}\n".format(*v) for v in vertices)
                                        + "".join("f {} {} {}\n".format(*f) for f in faces + 1))
    truth = world_in_ref @ poses
    np.savetxt(tmp_path / "pose.txt", truth[0])
    for flags in (("--object_pose", tmp_path / "pose.txt"), ()):
        done = run("--prediction", tmp_path / "prediction.npz", "--object", tmp_path / "thing.obj", *flags)
        assert done.returncode == 0 and "5 of 5 frames tracked" in done.stdout, done.stderr
        with np.load(tmp_path / "trajectory.npz") as result:
            assert distance(result["gripper_in_ref"][:, 0], truth).max() < 0.01
            assert angle(result["gripper_in_ref"][:, 0], truth).max() < 6
    np.savetxt(tmp_path / "pose.txt", truth[0, :3])
    done = run("--prediction", tmp_path / "prediction.npz", "--object", tmp_path / "thing.obj",
               "--object_pose", tmp_path / "pose.txt")
    assert done.returncode != 0 and "expected four lines of four numbers" in done.stderr


def test_one_line_errors(tmp_path, video):
    done = run("--prediction", tmp_path / "no.npz")
    assert (
        done.returncode != 0 and "no such file" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr
    with pytest.raises(ValueError, match="is missing"):
        track.episode_prediction(tmp_path, [0, 1])
    with pytest.raises(ValueError, match="observed_gripper_in_ref"):
        track.track({k: v for k, v in video.items() if k != "observed_gripper_in_ref"}, init="pose")
    with pytest.raises(ValueError, match="'points'"):
        track.track({k: v for k, v in video.items() if k != "points"})
    with pytest.raises(ValueError, match="'valid' has shape"):
        track.track({**video, "valid": video["valid"][:1]})
    with pytest.raises(ValueError, match="--hand and --finger"):
        track.hand_model(hand="hand.obj")
