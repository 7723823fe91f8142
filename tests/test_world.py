"""The synthetic world: its pictures agree with each other, its demonstrations do the task, success means something."""
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import data

TASKS = list(data.TASKS)


def played(task, seed, until=None):
    """A world after the first `until` frames of its demonstration."""
    world = data.World(task)
    world.reset(seed)
    for gripper_in_world, opening in list(zip(*world.demonstration))[:until]:
        world.step(gripper_in_world, opening)
    return world


def recorded(world):
    """The hand poses and openings that the demonstration really reached."""
    states = []
    for gripper_in_world, opening in zip(*world.demonstration):
        world.step(gripper_in_world, opening)
        states.append((world.gripper_in_world, world.opening))
    return tuple(np.stack(values) for values in zip(*states))


def replayed(task, seed, change):
    """Whether the recorded demonstration, changed by change(grippers, openings), succeeds in a fresh world."""
    world = data.World(task)
    world.reset(seed)
    path = recorded(world)
    assert world.success()
    world.reset(seed)
    for gripper_in_world, opening in zip(*change(*path)):
        world.step(gripper_in_world, opening)
    return world.success()


def two_cameras(size=(128, 160)):
    cam_in_world = np.stack([data.look_at((0.55, 0.35, 0.8), (0, 0, 0.1)),
                             data.look_at((0.3, -0.4, 0.95), (0, 0, 0.1))])
    intrinsics = np.array([[0.8 * size[1], 0, (size[1] - 1) / 2], [0, 0.8 * size[1], (size[0] - 1) / 2], [0, 0, 1]])
    return np.stack([intrinsics, intrinsics]), cam_in_world, size


@pytest.mark.parametrize("task", TASKS)
def test_two_views_agree_in_the_world(task):
    """Points of one view lie on the surfaces that the other view sees, to less than a millimetre."""
    world = played(task, 3, 30)
    intrinsics, cam_in_world, size = two_cameras()
    _, depth, label, normal = world.observe(intrinsics, cam_in_world, size)
    points = data.transform(data.unproject(depth, intrinsics), cam_in_world)    # (2,H,W,3) in the world
    pixel, _ = data.project(data.transform(points[0], data.invert(cam_in_world[1])), intrinsics[1])
    u, v = np.moveaxis(pixel.round().astype(int), -1, 0)
    inside = (u >= 0) & (u < size[1]) & (v >= 0) & (v < size[0])
    u, v = u[inside], v[inside]
    offset = points[1][v, u] - points[0][inside]
    same_facet = (normal[0][inside] * normal[1][v, u]).sum(1) > 0.9999
    seen_by_both = same_facet & (np.linalg.norm(offset, axis=1) < 0.03)
    distance = np.abs((offset * normal[1][v, u]).sum(1))[seen_by_both]
    assert seen_by_both.sum() > 5000 and np.quantile(distance, 0.99) < 0.001
    labels = label[0][inside][seen_by_both] == label[1][v, u][seen_by_both]
    assert labels.mean() > 0.995


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_where_the_hand_and_the_object_are(task):
    world = played(task, 1, 25)
    intrinsics, cam_in_world, size = two_cameras()
    rgb, depth, label, _ = world.observe(intrinsics, cam_in_world, size)
    assert rgb.dtype == np.uint8 and label.dtype == np.uint8 and depth.dtype == np.float32
    points = data.transform(data.unproject(depth, intrinsics), cam_in_world)
    bounds = {data.OBJECT: (world.object_in_world, *(f(world.scene.object.mesh[0], axis=0) for f in (np.min, np.max)))}
    for arm, pose in enumerate(world.gripper_in_world):
        bounds[(data.RIGHT_GRIPPER, data.LEFT_GRIPPER)[arm]] = (
            pose, (-0.0316, -0.1035, -0.013), (0.0316, 0.1035, 0.1064))
    assert set(np.unique(label)) == {data.OTHER, *bounds}
    for number, (pose, low, high) in bounds.items():
        local = data.transform(points[label == number], data.invert(pose))
        assert len(local) > 20
        assert (local > np.array(low) - 1e-4).all() and (local < np.array(high) + 1e-4).all()


def test_what_does_not_move_may_be_drawn_before():
    """The backdrop is a shortcut: all bodies drawn at once give the same picture."""
    world = played(3, 2, 40)
    cameras = two_cameras((64, 80))
    world.observe(*cameras)
    world.step(*(values[55] for values in world.demonstration))             # the arms of frame 40 must not stay in it
    quick = world.observe(*cameras)
    bodies = [world.scene.object, *sum(world.arms, [])]
    poses = [[world.object_in_world],
             *(data.arm_poses(*arm) for arm in zip(world.scene.bases, world.gripper_in_world, world.opening))]
    fixed, fixed_poses = zip(*world.fixed)
    whole = data.render(bodies + list(fixed), np.concatenate(poses + [fixed_poses]), *cameras, world.lamp)
    np.testing.assert_array_equal(quick[1], whole[1])
    np.testing.assert_array_equal(quick[2], whole[2])
    assert (quick[0] != whole[0]).mean() < 0.001


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(4))
def test_replaying_a_demonstration_succeeds(task, seed):
    assert replayed(task, seed, lambda grippers, openings: (grippers, openings))


@pytest.mark.parametrize("task", TASKS)
def test_success_means_something(task):
    seeds = range(5)

    def open_hand(grippers, openings):
        return grippers, np.full_like(openings, data.OPEN)

    def beside(grippers, openings):
        moved = grippers.copy()
        moved[..., :3, 3] += 0.05 * moved[..., :3, 1]                           # 5 cm along the fingers' axis
        return moved, openings

    def not_released(grippers, openings):
        return grippers[:-25], openings[:-25]

    assert not any(replayed(task, seed, change) for seed in seeds for change in (open_hand, beside, not_released))
    world = data.World(task)
    for seed in seeds:
        world.reset(seed)
        assert not world.success()


def test_a_little_noise_does_no_harm():
    """3 mm and 2 degrees in every frame: nearly all demonstrations still succeed."""
    draw = np.random.default_rng(0)

    def noisy(grippers, openings):
        moved = grippers.copy()
        moved[..., :3, 3] += draw.normal(0, 0.003, moved.shape[:2] + (3,))
        turn = Rotation.from_rotvec(draw.normal(0, np.deg2rad(2), (len(moved) * moved.shape[1], 3))).as_matrix()
        moved[..., :3, :3] = turn.reshape(*moved.shape[:2], 3, 3) @ moved[..., :3, :3]
        return moved, openings
    assert sum(replayed(task, seed, noisy) for task in TASKS for seed in range(4)) >= 10


@pytest.mark.parametrize("task", TASKS)
def test_demonstrations_are_smooth_and_of_the_right_length(task):
    for seed in range(5):
        world = data.World(task)
        world.reset(seed)
        grippers, openings = world.demonstration
        assert (51 <= len(grippers) <= 80
                and grippers.shape[1:] == (data.TASKS[task].name.startswith("PlaceApple") + 1, 4, 4))
        np.testing.assert_allclose(grippers[..., :3, :3] @ grippers[..., :3, :3].mT,
                                   np.broadcast_to(np.eye(3), (*openings.shape, 3, 3)), atol=1e-9)
        assert np.linalg.norm(np.diff(grippers[..., :3, 3], axis=0), axis=-1).max() < 0.12      # 1.2 m/s
        assert openings.min() >= 0 and openings.max() <= data.OPEN
        world.reset(seed)
        np.testing.assert_array_equal(world.demonstration[0], grippers)


def test_what_is_held_moves_with_the_hand_and_falls_when_released():
    world = data.World(1)
    world.reset(0)
    relative, held = [], []
    for gripper_in_world, opening in zip(*world.demonstration):
        world.step(gripper_in_world, opening)
        if world.holders:
            relative.append(data.invert(world.gripper_in_world[0]) @ world.object_in_world)
            held.append(world.opening[0])
    assert len(relative) > 20
    np.testing.assert_allclose(relative, np.broadcast_to(relative[0], np.shape(relative)), atol=1e-9)
    assert np.allclose(held[:20], world.scene.solid[0][1] * 2, atol=0.002)      # fingers stop at the box's sides

    world = played(1, 0, 30)                                                    # in the air
    assert world.holders and world.object_in_world[2, 3] > 0.3
    aside = data.shift(world.gripper_in_world[0], (-0.3, 0, 0))[None]
    aside[0, :3, :3] = data.turn("x", 0.2) @ aside[0, :3, :3]
    world.step(aside, [0.0])
    world.step(aside, [data.OPEN])
    lowest = data.transform(world.scene.object.mesh[0], world.object_in_world)[:, 2].min()
    assert not world.holders and lowest == pytest.approx(0, abs=1e-9)
    assert np.abs(world.object_in_world[2, :3]).max() == pytest.approx(1)       # standing, not tilted in the air


@pytest.mark.parametrize("beside, taken", [(0.0, True), (0.012, True), (0.035, False), (0.1, False)])
def test_only_what_is_between_the_fingers_is_gripped(beside, taken):
    world = data.World(1)
    world.reset(0)
    grip = data.hand((-world.scene.solid[0][0] + 0.025, beside, 0), (1, 0, 0), (0, 1, 0))        # gripper_in_object
    gripper_in_world = (world.object_in_world @ grip)[None]
    for opening in (data.OPEN, 0.03, data.SHUT):
        world.step(gripper_in_world, [opening])
    assert bool(world.holders) == taken
    if taken:                                                                   # and it was pushed to their middle
        assert (data.invert(world.gripper_in_world[0]) @ world.object_in_world)[1, 3] == pytest.approx(0, abs=0.001)


def test_things_rest_on_what_is_below_them():
    for task in TASKS:
        world = data.World(task)
        for seed in range(5):
            world.reset(seed)
            before = world.object_in_world.copy()
            world.step(world.gripper_in_world, world.opening)
            np.testing.assert_allclose(world.object_in_world, before, atol=1e-9)    # on the shelf, in crock or bowl


@pytest.mark.parametrize("task", TASKS)
def test_cameras(task):
    world = data.World(task)
    world.reset(5)
    grippers, _ = world.demonstration
    tips = grippers[..., :3, 3] + data.TCP * grippers[..., :3, 2]
    intrinsics, cam_in_world = data.sample_cameras(np.random.default_rng(0), tips, (64, 80))
    assert len(cam_in_world) == 16
    position = cam_in_world[:, :3, 3]
    assert (position >= (0.2, -0.5, 0.7)).all() and (position <= (0.6, 0.5, 1.2)).all()
    distance = np.linalg.norm(position, axis=1)
    assert distance.min() >= 0.7 and distance.max() <= 1.2
    for K, camera in zip(intrinsics, cam_in_world):
        pixel, z = data.project(data.transform(tips, data.invert(camera)), K)
        assert ((pixel >= 0) & (pixel <= (79, 63))).all(-1).mean(0).min() > 0.85 and z.min() > 0


def test_episodes_on_disk(tmp_path):
    """Packed like recorded ones, the same from any number of processes; what is there stays, what misfits is named."""
    size = (16, 20)
    assert data.make_synthetic(1, tmp_path / "a", episodes=1, size=size, seed=1, workers=1, samples=1) == 1
    assert data.make_synthetic(1, tmp_path / "b", episodes=2, size=size, seed=1, workers=2, samples=1) == 2
    a, b = (data.load_episode(tmp_path / name / "episode_000") for name in "ab")
    for name in ("rgb", "depth", "label", "intrinsics", "cam_in_world", "gripper_in_world", "gripper_opening"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    C, T, A = a.rgb.shape[0], *a.gripper_opening.shape
    assert (C, A) == (16, 1) and a.rgb.shape == (C, T, *size, 3) and a.depth.shape == a.label.shape == (C, T, *size)
    assert a.depth.dtype == np.uint16 and a.rate_hz == 10 and a.info["source"] == "synthetic"
    other = data.load_episode(tmp_path / "b" / "episode_001")
    assert not np.allclose(other.cam_in_world[:, 0], a.cam_in_world[:, 0])      # cameras are drawn anew per episode
    assert data.Clips(tmp_path / "b", "train", size)[0]["rgb"].shape == (2, 11, 3, *size)

    stamp = (tmp_path / "a" / "episode_000" / "rgb.npy").stat().st_mtime_ns
    assert data.make_synthetic(1, tmp_path / "a", episodes=1, size=size, seed=1, workers=1, samples=1) == 1
    assert (tmp_path / "a" / "episode_000" / "rgb.npy").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="episode_000"):
        data.make_synthetic(1, tmp_path / "a", episodes=1, size=size, seed=2, workers=1, samples=1)
