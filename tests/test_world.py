"""The renderer against surfaces with a known depth, and the synthetic world: its pictures agree with each other, its
demonstrations do the task, success means something."""
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import data

TASKS = list(data.TASKS)
H, W = 61, 83
INTRINSICS = np.array([[70.0, 0, 40.3], [0, 75.0, 29.1], [0, 0, 1]])
DIRECTIONS = data.pixel_rays(H, W, INTRINSICS)


def test_plane_that_passes_below_the_camera():
    """A floor that reaches behind the camera: nothing to clip, and its depth is that of the plane in every pixel."""
    draw = np.random.default_rng(0)
    corners = np.array([(-9, -9, 0), (9, -9, 0), (9, 9, 0), (-9, 9, 0)], float)
    for _ in range(20):
        cam_in_world = data.look_at(draw.uniform((-1, -1, 0.3), (1, 1, 1.5)), draw.uniform((-3, -3, 0), (3, 3, 0.5)))
        corners_in_cam = data.transform(corners, data.invert(cam_in_world))[None]
        depth, face = data.rasterize(corners_in_cam, [(0, 1, 2), (0, 2, 3)], INTRINSICS, H, W)
        ray = DIRECTIONS @ cam_in_world[:3, :3].T
        true = -cam_in_world[2, 3] / np.where(ray[..., 2] < 0, ray[..., 2], np.nan)
        on = data.transform(DIRECTIONS * true[..., None], cam_in_world)
        hit = np.isfinite(true) & (np.abs(on[..., :2]) < 9).all(-1)
        assert hit.sum() > 500 and np.array_equal(depth[0] > 0, hit) and np.array_equal(face[0] >= 0, hit)
        np.testing.assert_allclose(depth[0][hit], true[hit], rtol=1e-6)


def test_box():
    """A box in 20 pictures at once: the same pixels are hit as by the rays through their centres, and as deep."""
    draw = np.random.default_rng(1)
    size, rotations = draw.uniform(0.1, 0.6, 3), Rotation.random(20, random_state=1).as_matrix()
    vertices, faces = data.box(size)
    world_in_cam = data.pose(draw.uniform((-0.1, -0.1, 1), (0.1, 0.1, 1), (20, 3)), rotations)      # at any roll
    vertices_in_cam = data.transform(np.broadcast_to(vertices, (20, *vertices.shape)), world_in_cam)
    cam_in_world = data.invert(world_in_cam)[:, None, None]                                         # (20,1,1,4,4)
    ray, eye = (cam_in_world[..., :3, :3] @ DIRECTIONS[..., None])[..., 0], cam_in_world[..., :3, 3]
    crossings = np.sort([(sign * size / 2 - eye) / ray for sign in (-1, 1)], axis=0)                # (2,20,H,W,3) slabs
    enter, leave = crossings[0].max(-1), crossings[1].min(-1)
    for cull in (False, True):
        depth, face = data.rasterize(vertices_in_cam, faces, INTRINSICS, H, W, cull=cull)
        assert np.array_equal(depth > 0, enter < leave) and np.array_equal(face >= 0, enter < leave)
        np.testing.assert_allclose(depth[depth > 0], enter[depth > 0], rtol=1e-6)


def test_primitives_are_closed_and_point_outward():
    """Every edge of a solid is shared by two faces in opposite directions, and its signed volume is positive."""
    for vertices, faces in (data.box((1, 2, 3)), data.capsule(0.4, 0.1), *data.gripper_mesh().values(),
                            data.lathe((1, 0), (1, 1), (0.9, 1), (0.9, 0.1))):
        edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        there, back = (set(map(tuple, e)) for e in (edges, edges[:, ::-1]))
        assert there == back and len(there) == len(edges)
        a, b, c = vertices[faces].transpose(1, 0, 2)
        assert (a * np.cross(b, c)).sum() > 0


def test_shadow_of_a_ball_on_a_table():
    """A pixel of the table is in the shade exactly where the ball stands between it and the lamp."""
    lamp, centre, radius, turn = np.array([0.5, -0.6, 1.8]), np.array([0.05, 0.1, 0.3]), 0.15, np.linspace(0, np.pi, 40)
    ball = data.lathe(*zip(radius * np.sin(turn), -radius * np.cos(turn)), segments=60)
    placed = [(data.Body(data.box((2, 2, 0.1), (0, 0, -0.05)), data.plain((0.8, 0.8, 0.8))), np.eye(4)),
              (data.Body(ball, data.plain((1, 0, 0)), data.OBJECT), data.pose(centre))]
    camera = data.look_at((0.7, 0.4, 1.0), (0, 0, 0))
    rgb, depth, label = (x[0] for x in data.render(placed, INTRINSICS[None], camera[None], (H, W), lamp))
    points = data.transform(data.unproject(depth, INTRINSICS), camera)
    table = (label == data.OTHER) & (depth > 0) & (np.abs(points[..., :2]) < 0.7).all(-1)
    assert np.allclose(points[table][:, 2], 0, atol=1e-5)
    to_lamp = lamp - points[table]
    to_lamp /= np.linalg.norm(to_lamp, axis=1, keepdims=True)
    off_axis = np.linalg.norm(np.cross(centre - points[table], to_lamp), axis=1)
    dark = rgb[table].max(1) < 125
    assert dark[off_axis < radius - 0.012].all() and (off_axis < radius - 0.012).sum() > 100
    assert not dark[off_axis > radius + 0.012].any()
    assert (rgb[label == data.OBJECT][:, 1:] == 0).all() and (label == data.OBJECT).sum() > 100


def played(task, seed, script=None, until=None):
    """A world after `until` frames of a script (the demonstration), and the states that it went through."""
    world, states = data.World(task), []
    world.reset(seed)
    for step in list(zip(*(script or world.demonstration)))[:until]:
        world.step(*step)
        states.append((world.gripper_in_world, world.opening))
    return world, [np.stack(values) for values in zip(*states)]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_observed_is_a_clip(task):
    """With depth, masks and hand poses that belong together."""
    world, size = played(task, 2, until=20)[0], (64, 80)
    cam_in_world = np.stack([data.look_at(at, (0, 0, 0.1)) for at in ((0.55, 0.35, 0.8), (0.3, -0.4, 0.95))])
    intrinsics = np.array([[[64, 0, 39.5], [0, 64, 31.5], [0, 0, 1]]] * 2)
    clip = world.observe(intrinsics, cam_in_world, size)
    arms = 1 + (task == 3)
    assert data.check_clip(clip, ("observed", "pose", "mask"))["observed_gripper"].shape == (2, arms, *size)
    world.step(*(values[5] for values in world.demonstration))
    assert (world.observe(intrinsics, cam_in_world, size)["observed_rgb"] != clip["observed_rgb"]).any()
    world = played(task, 2, until=20)[0]                    # drawn anew: nothing of another frame stays in a picture
    rgb, depth, label = world.film(intrinsics, cam_in_world, size)
    assert np.array_equal(clip["observed_rgb"], rgb) and np.array_equal(clip["observed_depth"], depth)
    assert np.array_equal(clip["observed_object"], label == data.OBJECT)
    points = data.transform(data.point_maps(depth[0], intrinsics[0])[0], clip["ref_in_world"])
    in_object = data.transform(points[clip["observed_object"][0]], data.invert(world.object_in_world))
    low, high = (f(world.scene.object.mesh[0], axis=0) for f in (np.min, np.max))
    assert len(in_object) > 3 and (in_object > low - 1e-4).all() and (in_object < high + 1e-4).all()
    for arm in range(arms):
        in_hand = data.transform(points[clip["observed_gripper"][0, arm]], data.invert(world.gripper_in_world[arm]))
        assert len(in_hand) > 10 and np.abs(in_hand).max() < 0.11
        in_world = clip["ref_in_world"] @ clip["observed_gripper_in_ref"][arm]
        np.testing.assert_allclose(in_world, world.gripper_in_world[arm], atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_success_means_something(task):
    """As recorded it succeeds; with open hands, 5 cm beside along the fingers, not released or not begun it fails."""
    for seed in range(4):
        world, (grippers, openings) = played(task, seed)
        assert world.success()
        for script, success in (((grippers, openings), True), ((grippers, np.full_like(openings, data.OPEN)), False),
                                ((grippers @ data.pose((0, 0.05, 0)), openings), False),
                                ((grippers[:-25], openings[:-25]), False), ((grippers[:1], openings[:1]), False)):
            assert played(task, seed, script)[0].success() == success


def test_what_is_held_moves_with_the_hand_and_falls_when_released():
    world, relative = data.World(1), []
    world.reset(0)
    for step in zip(*world.demonstration):
        world.step(*step)
        if world.holders:
            relative.append(data.invert(world.gripper_in_world[0]) @ world.object_in_world)
            assert world.opening[0] >= world.scene.solid[0][1] * 2 - 0.002          # fingers stop at the box's sides
    assert len(relative) > 20 and np.allclose(relative, relative[:1], rtol=0, atol=1e-9)

    world = played(1, 0, until=30)[0]                                           # in the air
    assert world.holders and world.object_in_world[2, 3] > 0.3
    aside = data.shift(world.gripper_in_world[0], (-0.3, 0, 0))
    aside[:3, :3] = data.turn("x", 0.2) @ aside[:3, :3]
    for opening in (0.0, data.OPEN):
        world.step(aside[None], [opening])
    lowest = data.transform(world.scene.object.mesh[0], world.object_in_world)[:, 2].min()
    assert not world.holders and lowest == pytest.approx(0, abs=1e-9)
    assert np.abs(world.object_in_world[2, :3]).max() == pytest.approx(1)       # standing, not tilted in the air


@pytest.mark.parametrize("task", TASKS)
def test_demonstrations_are_smooth_and_in_the_cameras(task):
    world = data.World(task)
    for seed in range(3):
        world.reset(seed)
        grippers, openings = world.demonstration
        assert 51 <= len(grippers) <= 80 and grippers.shape[1:] == (1 + (task == 3), 4, 4)
        assert np.linalg.norm(np.diff(grippers[..., :3, 3], axis=0), axis=-1).max() < 0.12          # 1.2 m/s
        assert openings.min() >= 0 and openings.max() <= data.OPEN
        before = world.object_in_world.copy()
        world.step(world.gripper_in_world, world.opening)                       # it rests on shelf, in crock or bowl
        np.testing.assert_allclose(world.object_in_world, before, atol=1e-9)
    tips = grippers[..., :3, 3] + data.TCP * grippers[..., :3, 2]
    intrinsics, cam_in_world = data.sample_cameras(np.random.default_rng(0), tips, (64, 80))
    distance = np.linalg.norm(cam_in_world[:, :3, 3], axis=1)
    assert len(cam_in_world) == 16 and distance.min() >= 0.7 and distance.max() <= 1.2
    tips_in_cam = data.transform(np.broadcast_to(tips, (16, *tips.shape)), data.invert(cam_in_world))
    pixel, z = data.project(tips_in_cam, intrinsics[:, None, None])
    assert ((pixel >= 0) & (pixel <= (79, 63))).all(-1).mean(1).min() > 0.85 and z.min() > 0


def test_frames_are_left_out_of_rendered_episodes_alone(monkeypatch):
    monkeypatch.setattr("sys.argv", "data.py --source hub --every 5".split())
    with pytest.raises(ValueError, match="--every"):
        data.main()


def test_episodes_on_disk(tmp_path):
    """Packed like recorded ones, the same from any number of processes; what is there stays, what misfits is named."""
    size, names = (16, 20), ["synthetic_01000", "synthetic_01001"]
    assert data.make_synthetic(1, tmp_path / "a", 1, size, seed=1, workers=1) == names[:1]
    assert data.make_synthetic(1, tmp_path / "b", 2, size, seed=1, workers=2) == names
    a, b = (data.load_episode(tmp_path / name / names[0]) for name in "ab")
    for name in ("rgb", "depth", "label", "intrinsics", "cam_in_world", "gripper_in_world", "gripper_opening"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.cameras, a.gripper_opening.shape, a.size, a.rate_hz, a.stride) == (16, (a.frames, 1), size, 10, 5)
    assert a.depth.dtype == np.uint16 and 300 < np.median(a.depth) < 2000
    assert not np.allclose(data.load_episode(tmp_path / "b" / names[1]).cam_in_world[:, 0], a.cam_in_world[:, 0])
    clips = {split: data.Clips(tmp_path / "b", split, size) for split in ("train", "test")}
    used = {split: {int(n) for i in range(9) for n in c.clip(i)["name"].split()[-1].split("-")}
            for split, c in clips.items()}
    assert used["train"] <= set(range(1, 13)) and used["test"] <= set(range(13, 17))

    data.make_synthetic(1, tmp_path / "c", 2, size, seed=1, workers=1, every=5)     # the 2 Hz of clips, and no more
    for first, name in zip((0, 4), names):
        every, fifth = (data.load_episode(tmp_path / folder / name) for folder in "bc")
        np.testing.assert_array_equal(every.rgb[:, first::5], fifth.rgb)
        np.testing.assert_array_equal(every.gripper_in_world[first::5], fifth.gripper_in_world)
        assert (fifth.rate_hz, fifth.stride) == (2, 1) and data.moving_starts(fifth)

    assert data.make_synthetic(1, tmp_path / "a", 1, size, seed=1, workers=1) == []
    for task, other_size in ((2, size), (1, (32, 40))):
        with pytest.raises(ValueError, match=f"{names[0]} is synthetic.*another --out"):
            data.make_synthetic(task, tmp_path / "a", 1, other_size, seed=1, workers=1)
