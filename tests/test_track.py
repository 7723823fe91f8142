"""The tracker on problems with a known answer: clouds moved by a known motion, and a rendered hand on a known path."""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import data
import evaluate
import track
from data import invert, pose_errors, transform

SIZE = 96, 120
DOWN = Rotation.from_euler("xyz", [180, 0, 20], degrees=True).as_matrix()


def motion(degrees, shift, axis=(0.3, -0.5, 0.8)):
    turn = Rotation.from_rotvec(np.radians(degrees) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    return data.pose(np.array(shift, float), turn)


def bumpy(count, seed):
    """Points and normals of an ellipsoid with three different axes: no rotation maps it onto itself but half turns."""
    p = np.random.default_rng(seed).standard_normal((count, 3))
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    axes = np.array([0.10, 0.07, 0.05])
    return p * axes, p / axes / np.linalg.norm(p / axes, axis=1, keepdims=True)


@pytest.mark.parametrize("planes", ["none", "target", "source"])
def test_icp_recovers_the_motion_that_was_put_in(planes):
    target, normals = bumpy(1500, 0)
    truth = motion(4, (0.004, -0.003, 0.002))
    source, turned = transform(target, invert(truth)), normals @ truth[:3, :3]
    more = dict(none={}, target=dict(target_normals=normals), source=dict(source_normals=turned))[planes]
    got, fitness, rmse = track.icp(source, target, max_correspondence_distance=0.03, max_iteration=200, **more)
    assert np.array(pose_errors(got, truth)).max() < 1e-5 and fitness == 1 and rmse < 1e-5


def test_icp_resampled_with_outliers_and_many_starts():
    target, normals = bumpy(3000, 0)
    truth = motion(5, (0.003, 0.004, -0.002))
    junk = np.random.default_rng(2).uniform(-0.2, 0.2, (200, 3))
    source = np.concatenate([transform(bumpy(800, 1)[0], invert(truth)), junk])
    starts = np.stack([motion(d, (s, 0, 0)) for d in (0, 10) for s in (0, 0.01)])
    call = lambda start: track.icp(source, target, normals, start, 0.02, 60)
    got, fitness, rmse = call(starts)
    off, turn = pose_errors(got, truth[None])
    assert got.shape == (4, 4, 4) and off.max() < 1e-3 and turn.max() < 1
    assert 0.75 < fitness.min() and fitness.max() < 0.95          # 800 of 1000 lie on the target, and a few by chance
    assert np.abs(call(starts[0])[0] - got[0]).max() < 1e-4       # a batch is its members


def test_icp_that_goes_round_in_a_circle_ends():
    target, normals = bumpy(1500, 0)
    source, draw = bumpy(1500, 11)[0], np.random.default_rng(10)
    target, source = (p + 0.0005 * draw.standard_normal(p.shape) for p in (target, source))
    left, right = target[:, 0] > -0.03, source[:, 0] < 0.03        # they have a part in common
    truth, tree, asked = motion(3, (0.003, 0.002, -0.003)), cKDTree(target[left]), []
    counting = SimpleNamespace(query=lambda *a, **b: asked.append(1) or tree.query(*a, **b))
    got = track.icp(transform(source[right], invert(truth)), target[left], normals[left], None, 0.02, 50, tree=counting)
    assert pose_errors(got[0], truth)[0] < 1e-3 and len(asked) < 20  # some neighbours change for ever


def test_icp_leaves_out_points_of_weight_zero():
    target, normals = bumpy(500, 0)
    source, weight = target + 0, np.ones(500)
    source[:100] += 0.01
    weight[:100] = 0
    got, fitness, _ = track.icp(source, target, normals, motion(2, (0.002, 0, 0)), 0.05, 100, weight=weight)
    assert np.abs(got - np.eye(4)).max() < 1e-4 and fitness == 1
    assert np.abs(track.icp(source, target, normals, None, 0.05, 100)[0] - np.eye(4)).max() > 1e-4


def test_a_fit_of_one_plane_does_not_slide_with_the_noise():
    draw = np.random.default_rng(0)
    points = draw.uniform(-0.1, 0.1, (1, 300, 3)) * (1, 1, 0)
    normals = np.array([0, 0, 1.0]) + 0.01 * draw.standard_normal(points.shape) * (1, 1, 0)
    target = points + (0, 0, 0.005) + 0.001 * draw.standard_normal(points.shape) * (0, 0, 1)
    fit = lambda slip: track.gauss_newton(points, target, normals, np.ones((1, 300)), np.zeros((1, 3)), slip)[0, :3, 3]
    (x, y, z), free = fit(track.SLIP), fit(0.0)
    assert np.hypot(x, y) < 1e-4 < 1e-3 < np.hypot(*free[:2]) and 0.004 < z < 0.0055


# ------------------------------------------------------------------------------------------------- a rendered hand

CAMERAS = np.stack([data.look_at(np.array(place), np.array([0, 0, 0.12]))
                    for place in ((0.75, -0.35, 0.75), (0.55, 0.6, 0.7))])
INTRINSICS = np.tile([[[100, 0, (SIZE[1] - 1) / 2], [0, 100, (SIZE[0] - 1) / 2], [0, 0, 1.0]]], (2, 1, 1))


def path():
    """Seven frames: the hand points down, moves by up to 12 cm and 20 degrees a frame, closes and opens again."""
    x = [0.0, 0.04, 0.12, 0.12, 0.10, 0.0, -0.1]
    z = [0.30, 0.28, 0.24, 0.20, 0.26, 0.28, 0.30]
    turn = [0, 5, 20, 30, 30, 20, 0]
    rotation = np.stack([Rotation.from_euler("zx", [t, t / 3], degrees=True).as_matrix() @ DOWN for t in turn])
    return data.pose(np.stack([x, np.linspace(-0.05, 0.1, 7), z], 1), rotation), \
        np.array([0.078, 0.078, 0.078, 0.03, 0.03, 0.07, 0.078])


def clip_of(hands, bodies=None):
    """A clip of hands (poses (F,4,4) in the world, openings (F,)), each with an arm above it, on a table.

    bodies(t): what else there is, a list of meshes; the first of them is the object."""
    model, table = track.hand_model(), data.box((2, 2, 0.02), (0, 0, -0.01))
    arm = data.box((0.09, 0.09, 0.3), (0, 0, -0.16))
    depth, body = [], []
    for t in range(len(hands[0][0])):
        meshes = list(bodies(t)) if bodies else []
        kinds = [3] + [4] * (len(meshes) - 1) if meshes else []
        for a, (poses, openings) in enumerate(hands):
            if np.isfinite(poses[t]).all():
                opened = model.vertices + np.outer(openings[t] * model.vertex_slide, (0, 1, 0))
                meshes += [(transform(opened, poses[t]), model.faces), (transform(arm[0], poses[t]), arm[1])]
                kinds += [1 + a, 0]
        vertices, faces = data.merge(*meshes, table)
        kinds = np.repeat([*kinds, 0], [len(f) for _, f in (*meshes, table)])
        z, face = data.rasterize(np.stack([transform(vertices, invert(c)) for c in CAMERAS]), faces, INTRINSICS, *SIZE)
        depth.append(z)
        body.append(np.where(face >= 0, kinds[face], 0))
    depth, body = np.stack(depth, 1), np.stack(body, 1)                                      # (V,F,H,W)
    view_in_ref = invert(CAMERAS[0]) @ CAMERAS
    own, valid = data.point_maps(depth, INTRINSICS[:, None])
    rgb = np.repeat((60 * body).astype(np.uint8)[..., None], 3, -1)
    grippers = invert(CAMERAS[0]) @ np.stack([poses for poses, _ in hands], 1)
    return dict(rgb=rgb[:, 1:], points=transform(own, view_in_ref).astype(np.float32)[:, 1:], valid=valid[:, 1:],
                view_in_ref=view_in_ref, intrinsics=INTRINSICS, fps=2.0, observed_rgb=rgb[:, 0],
                observed_depth=depth[:, 0], observed_object=body[:, 0] == 3, observed_gripper_in_ref=grippers[0],
                observed_gripper=np.stack([body[:, 0] == 1 + a for a in range(len(hands))], 1),
                observed_opening=np.array([openings[0] for _, openings in hands]),
                true_gripper_in_ref=grippers, true_opening=np.stack([openings for _, openings in hands], 1))


@pytest.fixture(scope="module")
def video():
    return clip_of([path()])


@pytest.fixture(scope="module")
def tracked(video):
    return track.track(video)


def off(result, clip, a=0):
    return pose_errors(result["gripper_in_ref"][:, a], clip["true_gripper_in_ref"][:, a])


def scene_of(clip):
    return track.make_scene(clip["observed_depth"], clip["intrinsics"], clip["view_in_ref"])


def test_path_opening_and_keys(video, tracked):
    shift, turn = off(tracked, video)
    assert not tracked["lost"].any() and shift.max() < 0.01 and np.median(shift) < 0.003
    assert turn.max() < 5 and np.median(turn) < 2
    assert np.abs(tracked["opening"] - video["true_opening"]).max() < 0.008
    assert tracked["closed"][:, 0].tolist() == [False, False, False, True, True, False, False]
    assert {key: value.shape for key, value in tracked.items()} == dict(
        gripper_in_ref=(7, 1, 4, 4), gripper_motion=(6, 1, 4, 4),
        profile=(7, 1, len(track.WIDTHS)),
        **dict.fromkeys(("opening", "closed", "lost", "why", "fitness", "inlier_rmse"), (7, 1)))
    assert tracked["fitness"].min() > 0.5 and tracked["inlier_rmse"].max() < 0.6 * track.AGREE


def test_motion_is_in_the_grippers_own_frame(tracked):
    """Executed from the first pose it gives the path, in whatever frame that pose is written: no calibration."""
    world = motion(50, (1, 2, 3))
    first = world @ tracked["gripper_in_ref"][0]
    assert np.abs(first @ tracked["gripper_motion"] - world @ tracked["gripper_in_ref"][1:]).max() < 1e-9


def test_a_dead_camera_is_one_camera_less(video):
    views = {key for key, (axes, _) in data.CLIP.items() if axes.startswith("V") and key in video}
    alone = track.track({**video, **{key: video[key][:1] for key in views}})
    shift, _ = off(alone, video)
    assert np.median(shift) < 0.005 and (shift[~alone["lost"][:, 0]] < 0.02).all()
    valid, depth = video["valid"].copy(), video["observed_depth"].copy()
    valid[1], depth[1] = False, 0
    dead = track.track({**video, "valid": valid, "observed_depth": depth})
    assert np.array_equal(dead["lost"], alone["lost"])
    assert np.abs(dead["gripper_in_ref"] - alone["gripper_in_ref"]).max() < 1e-6


def test_unmeasured_pixels_say_nothing(video):
    draw = np.random.default_rng(0)
    valid = video["valid"] & (draw.random(video["valid"].shape) > 0.3)
    depth = video["observed_depth"] * (draw.random(video["observed_depth"].shape) > 0.3)
    result = track.track({**video, "valid": valid, "observed_depth": depth})
    assert not result["lost"].any() and off(result, video)[0].max() < 0.01
    nan, wild = video["points"].copy(), video["points"].copy()
    nan[~valid], wild[~valid] = np.nan, 1e3
    for points, v in ((nan, video["valid"]), (wild, valid)):
        same = track.track({**video, "points": points, "valid": v, "observed_depth": depth})
        assert np.array_equal(same["gripper_in_ref"], result["gripper_in_ref"])


def test_small_holes_in_what_was_observed_stay_scenery(video):
    depth, holes = video["observed_depth"].copy(), np.zeros(video["observed_depth"].shape, bool)
    holes[:, ::2, ::2] = True
    scenes = [track.read_frame(video["points"][:, 2], video["valid"][:, 2], scene_of({**video, "observed_depth": d}),
                               np.zeros(holes.shape, bool)) for d in (depth, depth * ~holes)]
    before, after = (np.mean(scene.still) for scene in scenes)
    assert before > 0.5 and after > 0.98 * before


def generated(clip, sigma):
    """The clip's points as a generator makes them: noise along the ray, mixed edges, the second view 1 cm off."""
    draw, view_in_ref = np.random.default_rng(0), clip["view_in_ref"].astype(np.float32)
    own = transform(clip["points"], invert(view_in_ref))
    z = gaussian_filter(own[..., 2], (0, 0, 0.7, 0.7)) + sigma * draw.standard_normal(own.shape[:-1])
    points = transform((own / own[..., 2:] * z[..., None]).astype(np.float32), view_in_ref)
    points[1] += np.float32([0.006, -0.008, 0])
    return {**clip, "points": points}


def test_noisy_depth_is_mended_and_clean_depth_is_left(video):
    observed, here = scene_of(video), np.zeros(video["observed_depth"].shape, bool)
    read = lambda clip: track.read_frame(clip["points"][:, 2], clip["valid"][:, 2], observed, here)
    good, true = video["valid"][1, 2], video["points"][1, 2]
    error = lambda points: np.median(np.linalg.norm(points - true, axis=-1)[good])
    noisy = generated(video, 0.005)
    assert error(read(video).points[1]) < 1e-5 and read(video).noise.max() < track.NOISY
    assert error(noisy["points"][1, 2]) > 0.009 and error(read(noisy).points[1]) < 0.004


def test_a_generators_points_are_tracked(video):
    result = track.track(generated(video, 0.005))
    shift, turn = off(result, video)
    assert np.median(shift) < 0.01 and np.median(turn) < 5 and (shift[~result["lost"][:, 0]] < 0.03).all()


def test_fingers_of_a_generated_hand_count_only_while_it_rests():
    """A generator draws what moves as a blur: there, other than in a true video, closing is not believed at once."""
    x = np.array([0.0, 0.06, 0.12, 0.12])
    poses = data.pose(np.stack([x, 0 * x, 0 * x + 0.25], 1), np.stack([DOWN] * 4))
    clip = clip_of([(poses, np.array([0.078, 0.03, 0.03, 0.03]))])
    short = lambda clip, frames: {key: value[:, :frames] if key in ("rgb", "points", "valid") else value
                                  for key, value in clip.items() if "true" not in key}
    read = lambda clip, frames: track.track(short(clip, frames))["opening"][-1, 0]
    assert abs(read(clip, 2) - 0.03) < 0.01
    for sigma in (0.002, 0.0001):                             # points near their measured places fluctuate by as little
        noisy = generated(clip, sigma)
        assert read(noisy, 2) > 0.07 and read(noisy, 3) < 0.06


def test_a_blur_of_a_hand_is_lost():
    """The mean of three frames, as a squared error asks for: a hand is found in it where it is, or not at all."""
    size, good, lost = (64, 80), [], []
    for seed in (2_000_001, 2_000_002):
        (world := data.World(1)).reset(seed)
        tips = world.demonstration[0][..., :3, 3] + data.TCP * world.demonstration[0][..., :3, 2]
        cameras = data.sample_cameras(np.random.default_rng(0), tips, size, 2)
        true = evaluate.scripted_future(world, 0, cameras, size)
        points = np.pad(true["points"], [(0, 0), (1, 1), *[(0, 0)] * 3], "edge")
        blur = (points[:, :-2] + points[:, 1:-1] + points[:, 2:]) / 3
        result = track.track(true | dict(points=blur))
        shift, turn = pose_errors(result["gripper_in_ref"], true["true_gripper_in_ref"])
        good.append((shift < 0.02) & (turn < 10) | result["lost"])
        lost.append(result["lost"])
    assert np.mean(good) > 0.9 and np.mean(lost) > 0.5    # 0.95, 0.86


def test_what_the_hand_uncovers_is_scenery(video):
    """The table that the hand hid at first has the hand's outline, and is no hand."""
    observed, t = scene_of(video), 5
    here = video["observed_gripper"][:, 0]
    scene = track.read_frame(video["points"][:, t], video["valid"][:, t], observed, here)
    bare = here & (scene.depth > observed.depth + 0.05)
    assert bare.sum() > 50 and scene.still[bare].mean() > 0.9
    assert not scene.still[video["rgb"][:, t, ..., 0] == 60].any()                          # the hand itself
    drawn = generated(video, 0.001)
    view_in_ref = video["view_in_ref"].astype(np.float32)
    own = transform(drawn["points"][:, t], invert(view_in_ref)[:, None])
    drawn["points"][:, t] = transform(np.where(bare[..., None], 0.99 * own, own), view_in_ref[:, None])
    scene = track.read_frame(drawn["points"][:, t], video["valid"][:, t], observed, here)
    assert scene.still[bare].mean() > 0.7                                                   # guessed, 2 cm off


def test_depth_that_tells_nothing_loses_the_hand(video):
    result = track.track(generated(video, 0.06))
    assert result["lost"][1:].all() and "fluctuates" in result["why"][-1, 0]
    assert np.array_equal(result["gripper_in_ref"][1:], result["gripper_in_ref"][:1].repeat(6, 0))      # held


def test_a_missing_hand_is_lost_and_found_again(video, capsys):
    near = np.linalg.norm(video["points"] - video["true_gripper_in_ref"][1:, 0, None, None, :3, 3], axis=-1) < 0.25
    near[:, [0, 1, 4, 5]] = False
    result = track.track({**video, "valid": video["valid"] & ~near})
    assert result["lost"][:, 0].tolist() == [False, False, False, True, True, False, False]
    assert np.array_equal(result["gripper_in_ref"][4], result["gripper_in_ref"][2])         # held, not guessed
    assert off(result, video)[0][5:].max() < 0.01
    track.report(video, result)
    said = capsys.readouterr().out
    assert "4 of 6 predicted frames tracked" in said and "lost at +1.5 s: " + result["why"][3, 0] in said


def test_hands_do_not_share_a_place():
    """One hand rests; the other, beside it, is gone after the first frame and must not be found on the first."""
    poses = data.pose(np.tile([0.0, -0.06, 0.25], (3, 1)), DOWN)
    other = data.pose(np.tile([0.0, 0.17, 0.25], (3, 1)), DOWN)
    there = clip_of([(poses, np.full(3, 0.078)), (other, np.full(3, 0.078))])
    assert not track.track(there)["lost"].any()
    gone = clip_of([(poses, np.full(3, 0.078)), (np.where(np.arange(3)[:, None, None] > 0, np.nan, other),
                                                 np.full(3, 0.078))])
    result = track.track({key: value for key, value in gone.items() if not key.startswith("true_")})
    assert not result["lost"][:, 0].any() and result["lost"][1:, 1].all()


def test_first_pose_from_the_mask(video):
    pose, opening = track.register(track.hand_model(), scene_of(video), video["observed_gripper"][:, 0])
    truth = video["true_gripper_in_ref"][0, 0]
    shift, turn = min((pose_errors(pose, true) for true in (truth, truth @ track.HALF_TURN)), key=lambda off: off[1])
    assert shift < 0.01 and turn < 5 and abs(opening - 0.078) < 0.01
    masks = video["observed_gripper"] & np.array([False, True])[:, None, None, None]  # one view shows it alone
    pose, _ = track.register(track.hand_model(), scene_of(video), masks[:, 0])
    assert np.linalg.norm(pose[:3, 3] - truth[:3, 3]) < 0.015
    nothing = track.track({**video, "observed_gripper": masks & False}, "mask")
    assert nothing["lost"].all() and not nothing["fitness"].any()
    assert set(nothing["why"].ravel()) == {"no mask shows enough of it"}


def test_a_given_pose_that_is_looked_through_is_lost_at_once(video):
    wrong = video["observed_gripper_in_ref"] @ motion(0, (0.1, 0, -0.1))
    result = track.track({**video, "observed_gripper_in_ref": wrong})
    assert result["lost"][0, 0] and "look through" in result["why"][0, 0]


def test_wrong_poses_are_not_believed(video):
    truth, model = video["true_gripper_in_ref"][0, 0], track.hand_model()
    wrong = [motion(0, (0.05, 0, 0)), motion(60, (0, 0, 0)), motion(0, (0, 0, -0.1))]
    poses = np.stack([truth, *(truth @ w for w in wrong)])
    for anew in (False, True):
        seen = track.judge(model, scene_of(video), poses, 0.078, lambda poses: np.zeros(4), anew)
        assert seen.sure.tolist() == [True, False, False, False] and seen.worth.argmax() == 0


def test_a_right_outline_does_not_contradict(video):
    scene, truth = scene_of(video), video["true_gripper_in_ref"][0, 0]
    poses = np.stack([truth @ motion(0, shift) for shift in 0.003 * np.r_[np.eye(3), -np.eye(3)]])
    look = lambda: track.compare(track.hand_model(), scene, poses, np.full(6, 0.078))
    assert not look().through.any()
    scene.near = np.full_like(scene.depth, np.inf)        # no pixel has a neighbour
    assert look().through.any()


def test_closed_follows_events_not_noise():
    noise = 0.002 * np.sin(np.arange(40))
    wide = np.r_[np.full(10, 0.078), np.full(10, 0.067), np.full(10, 0.075), np.full(10, 0.01)] + noise
    assert track.closed_flags(wide[:, None])[:, 0].tolist() == ([False] * 10 + [True] * 10) * 2


@pytest.mark.parametrize("widths, closed", [
    ((0.055, 0.055, 0.078), (True, True, False)),       # an apple is held at first, and let go
    ((0.060, 0.030, 0.060), (False, True, False)),      # a hand that opens to 6 cm
    ((0.067, 0.067, 0.067), (True, True, True)),        # held throughout
    ((0.078, 0.078, 0.078), (False, False, False))])
def test_closed_from_any_starting_frame(widths, closed):
    assert tuple(track.closed_flags(np.array(widths)[:, None])[:, 0]) == closed


def seen_at(width, points=20):
    """A profile: `points` finger points agree at `width`, m, fewer beside it."""
    return points * np.exp(-((track.WIDTHS - width) / 0.005)**2)


def test_opening_path_follows_what_is_seen():
    true = np.r_[np.full(6, 0.07), np.full(6, 0.02)]
    profiles = [seen_at(w + 0.002 * d) for w, d in zip(true, np.random.default_rng(0).standard_normal(12))]
    profiles[3] = seen_at(0.03, 5)                        # an outlier that a frame before and a frame after deny
    assert np.abs(track.opening_path(profiles, np.zeros(11), 0.07) - true).max() < 0.005


def test_an_unseen_closing_is_put_where_the_hand_rests():
    profiles = [seen_at(0.07)] * 2 + [np.zeros(len(track.WIDTHS))] * 4 + [seen_at(0.02)] * 2
    way = np.full(7, 0.1)
    way[3] = 0.0                                          # between frames 3 and 4
    path = track.opening_path(profiles, way, 0.07)
    assert np.abs(path - np.r_[np.full(4, 0.07), np.full(4, 0.02)]).max() < 0.003


def test_a_lost_hand_is_no_hand_at_rest():
    position, lost = np.zeros((7, 3)), np.array([0, 0, 0, 1, 1, 0, 1], bool)
    position[:, 0] = 0, 0, 0.1, 0.1, 0.1, 0.4, 0.4        # held where it is lost
    assert track.way_of(position, lost) == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, track.TRAVEL[0]])
    assert track.way_of(position * np.nan, lost | True) == pytest.approx(np.full(6, track.TRAVEL[0]))


def test_paths_of_one_future_are_joined():
    far = motion(50, (3, 1, 2))                             # the other camera's frame
    moves = [np.stack([motion(degrees * t, (x * t, 0, 0)) for t in range(5)])[:, None]
             for degrees, x in ((4, 0.01), (8, 0.03))]
    speaks = lambda points: np.stack([seen_at(0.07, points)] + [seen_at(0.07 - 0.05 * (t > 1), points)
                                                                for t in range(1, 5)])[:, None]
    path = lambda moved, lost, profile: dict(
        gripper_in_ref=moved, lost=np.array(lost, bool)[:, None], profile=profile, opening=np.full((5, 1), 0.07))
    one, two = path(moves[0], (0, 0, 0, 1, 1), speaks(20)), path(far @ moves[1], (0, 0, 1, 0, 1), speaks(20))
    got = track.joined([one, two])
    by_hand = [motion(0, (0, 0, 0)), motion(6, (0.02, 0, 0)), moves[0][2, 0], moves[1][3, 0], moves[1][3, 0]]
    assert np.abs(got["gripper_in_ref"][:, 0] - by_hand).max() < 1e-9 and got["lost"][:, 0].tolist() == [0, 0, 0, 0, 1]
    assert np.abs(got["opening"][:, 0] - [0.07, 0.07, 0.02, 0.02, 0.02]).max() < 0.003 and got["closed"][-1]
    alone = track.joined([one])
    assert np.abs(alone["gripper_in_ref"][:3] - moves[0][:3]).max() < 1e-9
    for points, closed in (0.7, [False, False, True]), (1, [False, True, True]):
        counts = [track.joined([path(moves[0], np.zeros(5), speaks(points))] * n) for n in (1, 2, 4)]
        assert [joined["opening"][-1, 0] < 0.045 for joined in counts] == closed  # two: more than one, less than twice


@pytest.fixture
def world():
    """A synthetic scene, two cameras of it, and what they see as track.make_scene has it."""
    world = data.World(1)
    world.reset(0)
    tips = world.demonstration[0][..., :3, 3]
    cameras = data.sample_cameras(np.random.default_rng(0), tips, (64, 80), 2)

    def look():
        seen = world.observe(*cameras, (64, 80))
        return seen, track.make_scene(seen["observed_depth"], cameras[0], invert(cameras[1][0]) @ cameras[1])
    return world, cameras, look


def test_the_mount_is_as_long_as_the_arms_last_link(world):
    seen, scene = world[2]()
    models = [track.add_mount(track.hand_model(link=link), scene, seen["observed_gripper_in_ref"][0], 0.08)
              for link in (track.FLANGE, data.WRIST)]
    short, long = (np.linalg.norm(model.points[model.mount], axis=1) for model in models)
    assert 10 < len(short) < len(long) and short.max() < track.FLANGE < long.max() < data.WRIST


def test_what_is_held_says_whether_fingers_have_opened(world, monkeypatch):
    world, cameras, look = world
    held_by = lambda seen, scene: track.held_by(track.hand_model(), scene, seen["observed_object"],
                                                seen["observed_gripper_in_ref"][0], seen["observed_opening"][0])
    assert held_by(*look()) is None                       # open, and far from it
    script = list(zip(*world.demonstration))
    for now in script[:30]:
        world.step(*now)
    assert world.holders
    seen, scene = look()
    held, wide = held_by(seen, scene), track.WIDTHS > 0.07
    says = lambda scene: track.held_profile(held, scene, seen["observed_gripper_in_ref"][0], seen["observed_opening"][0])
    assert says(scene)[0] == 0 and (says(scene)[wide] == -track.HELD[0]).all()
    world.object_in_world = data.shift(world.object_in_world, (0, 0, -2))
    assert says(look()[1])[0] == 0 and (says(look()[1])[wide] > 0).all()

    world.reset(0)
    for now in script[:30]:
        world.step(*now)
    clip, asked, real = evaluate.scripted_future(world, 29, cameras, (64, 80), 3), [], track.held_profile
    monkeypatch.setattr(track, "held_profile", lambda *a: asked.append(a) or real(*a))
    track.track(clip)
    assert not asked                                      # true fingers speak for themselves
    track.track(generated(clip, 0.001))
    assert asked

# ----------------------------------------------------------------------------------------------- files and commands

def run(*args):
    return subprocess.run([sys.executable, track.__file__, *map(str, args)], capture_output=True, text=True)


def test_an_episode_on_the_command_line(tmp_path, video):
    poses, openings = path()
    rgb = np.concatenate([video["observed_rgb"][:, None], video["rgb"]], 1)
    z = transform(video["points"], invert(video["view_in_ref"]))[..., 2] * video["valid"]
    depth = np.concatenate([video["observed_depth"][:, None], z], 1)
    data.save_episode(tmp_path / "episode", rgb, (1000 * depth).round().astype(np.uint16),
                      (rgb[..., 0] == 60).astype(np.uint8), INTRINSICS, CAMERAS, poses[:, None], openings[:, None],
                      dict(task=1, source="test", rate_hz=2))
    done = run("--episode", tmp_path / "episode", "--cameras", 1, 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 predicted frames tracked" in done.stdout and "off by" in done.stdout
    result = data.read_npz(tmp_path / "out/trajectory.npz")
    assert pose_errors(result["gripper_in_world"][:, 0], poses)[0].max() < 0.01
    with Image.open(tmp_path / "out/overlay.gif") as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 500
        shown = np.asarray(gif.convert("RGB")).astype(int)
    assert (np.abs(shown - (255, 120, 0)).max(-1) < 60).sum() > 100         # the outline is drawn
    done = run("--episode", tmp_path / "episode", "--cameras", 1, 3)
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1


def test_another_rigid_thing_is_tracked_from_its_mask(tmp_path):
    """An L of two boxes goes up, along and around, while no hand is there."""
    thing = data.merge(data.box((0.14, 0.06, 0.04)), data.box((0.04, 0.06, 0.1), (0.05, 0, 0.07)))
    turns = Rotation.from_euler("z", [[0], [10], [25], [40], [40]], degrees=True).as_matrix()
    poses = data.pose(np.stack([[0, 0.03, 0.1, 0.14, 0.14], np.zeros(5), [0.02, 0.08, 0.15, 0.15, 0.1]], 1), turns)
    clip = clip_of([(np.full((5, 4, 4), np.nan), np.zeros(5))],
                   lambda t: [(transform(thing[0], poses[t]), thing[1])])
    clip = {key: value for key, value in clip.items() if "gripper" not in key and "opening" not in key}
    data.write_npz(tmp_path / "prediction.npz", clip)
    (tmp_path / "thing.obj").write_text("".join("v {} {} {}\n".format(*v) for v in thing[0])
                                        + "".join("f {} {} {}\n".format(*f) for f in thing[1] + 1))
    done = run("--prediction", tmp_path / "prediction.npz", "--object", tmp_path / "thing.obj")
    assert done.returncode == 0 and "4 of 4 predicted frames tracked" in done.stdout, done.stdout + done.stderr
    got = data.read_npz(tmp_path / "trajectory.npz")["gripper_in_ref"][:, 0]
    shift, turn = pose_errors(got, invert(CAMERAS[0]) @ poses)
    assert shift.max() < 0.01 and turn.max() < 6


def test_one_line_errors(tmp_path, video):
    done = run("--prediction", tmp_path / "no.npz")
    assert done.returncode != 0 and "no.npz is missing" in done.stderr and len(done.stderr.splitlines()) == 1
    without = lambda key: {k: v for k, v in video.items() if k != key}
    for key, init in (("points", "auto"), ("view_in_ref", "auto"), ("observed_gripper_in_ref", "pose"),
                      ("observed_gripper", "mask")):
        with pytest.raises(ValueError, match=f"no '{key}'"):
            track.track(without(key), init)
    with pytest.raises(ValueError, match="'valid' has shape"):
        track.track({**video, "valid": video["valid"][:1]})
    with pytest.raises(ValueError, match="--hand and --finger"):
        track.hand_model(hand="hand.obj")
    with pytest.raises(ValueError, match="STROKE"):
        track.track({**video, "observed_opening": np.array([0.12])})


def test_an_unknown_first_opening_is_looked_for():
    clip = clip_of([tuple(x[3:5] for x in path())])                         # closed at first
    del clip["observed_opening"]
    assert np.abs(track.track(clip)["opening"] - 0.03).max() < 0.005
