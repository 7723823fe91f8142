"""Geometry, recorded episodes, packing and clips (data.py). tests/data/recorded holds one recorded episode of task 1 in
the public layout: two cameras, 11 frames at 2 Hz, 128 x 160 pixels, MuJoCo physics."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import data as D

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "data" / "recorded"
PROCESSED = next(RECORDED.rglob("processed"))
SIZE = (64, 80)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    D.pack_folder(RECORDED, 1, folder, (128, 160))
    return folder


def random_pose(draw, batch=()):
    rotation = np.linalg.qr(draw.standard_normal((*batch, 3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))[..., None, None]
    pose = np.zeros((*batch, 4, 4))
    pose[..., :3, :3], pose[..., :3, 3], pose[..., 3, 3] = rotation, draw.standard_normal((*batch, 3)), 1
    return pose


# ---- geometry

@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_project_undoes_unproject(kind):
    draw = np.random.default_rng(0)
    depth = draw.uniform(0.3, 2, (2, 5, 7))
    intrinsics = np.array([[[40.0, 0, 3.1], [0, 42, 2.2], [0, 0, 1]], [[30.0, 0, 2.5], [0, 33, 1.7], [0, 0, 1]]])
    points = D.unproject(kind(depth), kind(intrinsics))
    pixels, z = D.project(points, kind(intrinsics)[:, None, None])
    v, u = np.meshgrid(np.arange(5), np.arange(7), indexing="ij")
    assert np.allclose(z, depth, atol=1e-12)
    assert np.allclose(pixels, np.stack([u, v], -1), atol=1e-10)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_transform_batches_and_inverse(kind):
    draw = np.random.default_rng(1)
    a_in_b, points = random_pose(draw, (3,)), draw.standard_normal((3, 4, 5, 3))
    moved = D.transform(kind(points), kind(a_in_b))
    assert moved.shape == (3, 4, 5, 3)
    by_hand = points[1, 2, 3] @ a_in_b[1, :3, :3].T + a_in_b[1, :3, 3]
    assert np.allclose(moved[1, 2, 3], by_hand, atol=1e-12)
    assert np.allclose(D.transform(moved, D.invert(kind(a_in_b))), points, atol=1e-12)


def test_float32_stays_float32():
    depth, intrinsics = np.ones((4, 5), np.float32), np.eye(3, dtype=np.float32)
    assert all(x.dtype == np.float32 for x in (D.unproject(depth, intrinsics), D.point_maps(depth, intrinsics)[0]))


def test_normalisation_maps_the_stated_range():
    assert np.allclose(D.normalize_points(np.array([-1.0, 0.5, 2.0])), [-1, 0, 1])
    assert np.allclose(D.denormalize_points(D.normalize_points(np.array([0.123, 3.0]))), [0.123, 3.0])


def test_invalid_depth_goes_to_the_far_plane_and_never_to_the_camera():
    depth = np.array([[0.0, 1.0], [2.5, 2.0]])
    points, valid = D.point_maps(depth, np.array([[50.0, 0, 0.5], [0, 50, 0.5], [0, 0, 1]]))
    assert (valid == [[False, True], [False, True]]).all()
    assert np.allclose(points[..., 2], [[2, 1], [2, 2]])
    assert np.allclose(points[0, 0, :2], [-0.5 / 50 * 2] * 2)               # along the pixel's own ray


def test_scaled_intrinsics_see_the_same_ray():
    intrinsics = np.array([[300.0, 0, 159.5], [0, 310, 127.5], [0, 0, 1]])
    scaled = D.scale_intrinsics(intrinsics, (256, 320), (64, 80))
    point = np.array([0.2, -0.1, 1.0])
    (u, v), _ = D.project(point, intrinsics)
    assert np.allclose(D.project(point, scaled)[0], [(u + 0.5) / 4 - 0.5, (v + 0.5) / 4 - 0.5])


def test_depth_resize_invents_no_value():
    depth = np.random.default_rng(0).choice([800, 1100], (1, 96, 120)).astype(np.uint16)
    assert set(np.unique(D.resize(depth, SIZE, "depth"))) <= {800, 1100}
    assert D.resize(np.full((1, 96, 120, 3), 77, np.uint8), SIZE, "rgb").mean() == 77


def test_rotation_from_6d():
    rotation = random_pose(np.random.default_rng(2))[:3, :3]
    assert np.allclose(D.rotation_from_6d(rotation[:2].reshape(6)), rotation)


# ---- recorded episodes

def test_recorded_clouds_of_two_cameras_agree_in_the_world(packed):
    """What stands on the table, seen by both cameras: nearest neighbours are closer than pixels (7 mm) are apart."""
    episode = D.load_episode(D.episode_folders(packed)[0])
    worlds = []
    for camera in range(2):
        points, valid = D.point_maps(episode.depth[camera, 0] / 1000, episode.intrinsics[camera])
        worlds.append(D.transform(points, episode.cam_in_world[camera, 0])[valid])
    seen_by_1 = worlds[1][worlds[1][:, 2] > 0.005]
    pixels, z = D.project(D.transform(seen_by_1, D.invert(episode.cam_in_world[0, 0])), episode.intrinsics[0])
    u, v = pixels.round().astype(int).T
    inside = (z > 0) & (u >= 0) & (u < 160) & (v >= 0) & (v < 128)
    hidden = np.ones(len(z), bool)
    hidden[inside] = z[inside] > episode.depth[0, 0][v[inside], u[inside]] / 1000 + 0.02
    distance = cKDTree(worlds[0]).query(seen_by_1[~hidden])[0]
    assert len(distance) > 500 and np.median(distance) < 0.005


def test_recorded_points_of_one_view_land_on_the_other(packed):
    """transform(unproject(view m)) projected into view n meets the depth n measured there, where nothing is between."""
    episode = D.load_episode(D.episode_folders(packed)[0])
    m_points, m_valid = D.point_maps(episode.depth[1, 0] / 1000, episode.intrinsics[1])
    m_in_n = D.invert(episode.cam_in_world[0, 0]) @ episode.cam_in_world[1, 0]
    pixels, z = D.project(D.transform(m_points, m_in_n)[m_valid], episode.intrinsics[0])
    u, v = pixels.round().astype(int).T
    inside = (z > 0) & (u >= 0) & (u < 160) & (v >= 0) & (v < 128)
    n_depth = episode.depth[0, 0][v[inside], u[inside]] / 1000
    difference = np.abs(n_depth - z[inside])[n_depth > 0]
    assert np.median(difference) < 0.005
    wrong = D.transform(m_points, D.invert(m_in_n))[m_valid]                # the test can fail: the inverse pose misses
    assert np.median(np.abs(wrong[:, 2] - z)) > 0.05


def test_recorded_gripper_pose_lies_inside_its_own_mask(packed):
    episode = D.load_episode(D.episode_folders(packed)[0])
    points, valid = D.point_maps(episode.depth[0, 0] / 1000, episode.intrinsics[0])
    world = D.transform(points, episode.cam_in_world[0, 0])
    for arm, label in ((0, D.RIGHT_GRIPPER), (1, D.LEFT_GRIPPER)):
        mask = valid & (episode.label[0, 0] == label)
        if mask.sum() > 20:
            in_hand = D.transform(world[mask], D.invert(episode.gripper_in_world[0, arm]))
            assert (np.abs(np.median(in_hand, 0)) < [0.06, 0.11, 0.13]).all()
    assert (episode.label[0, 0] == D.RIGHT_GRIPPER).any() or (episode.label[1, 0] == D.RIGHT_GRIPPER).any()
    assert episode.rate_hz == 2 and (episode.label == D.OBJECT).any()


def test_labels_follow_names_and_fall_back_to_public_ids():
    names = {"label_names": {11: "right_hand", 12: "right_finger_left", 21: "left_hand", 31: "cereal_box", 41: "shelf"}}
    assert D.label_ids(names, 1) == {D.RIGHT_GRIPPER: (11, 12), D.LEFT_GRIPPER: (21,), D.OBJECT: (31,)}
    assert D.label_ids({}, 1) == {D.RIGHT_GRIPPER: (29, 30, 31), D.LEFT_GRIPPER: (33, 34, 35), D.OBJECT: (39,)}


def test_packing_twice_adds_nothing(packed):
    assert D.pack_folder(RECORDED, 1, packed, (128, 160)) == 1
    assert len(D.episode_folders(packed)) == 1


def break_file(folder, name, **changes):
    with np.load(folder / name) as file:
        arrays = dict(file)
    for key, value in changes.items():
        arrays.pop(key, None)
        if value is not None:
            arrays[key] = value(arrays) if callable(value) else value
    np.savez(folder / name, **arrays)


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "extrinsics.npz").unlink(), "extrinsics.npz is missing"),
    (lambda f: (f / "intrinsics.npz").write_bytes(b"PK nonsense"), "damaged"),
    (lambda f: break_file(f, "observations.npz", scene_3_depth=None), "no array 'scene_3_depth'"),
    (lambda f: break_file(f, "observations.npz", scene_8_label=np.zeros((11, 4, 4))),
     "'scene_8_label' has shape (11, 4, 4)"),
    (lambda f: break_file(f, "observations.npz", scene_8=None), "has 1 cameras"),
])
def test_damaged_recordings_are_named(tmp_path, damage, says):
    processed = tmp_path / "episode_0" / "processed"
    shutil.copytree(PROCESSED, processed)
    damage(processed)
    with pytest.raises(ValueError) as error:
        D.pack_recorded(processed, tmp_path / "out", 1, SIZE)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_commands_fail_in_one_line(tmp_path):
    for arguments, says in ((["--source", str(tmp_path / "nowhere")], "no such folder"),
                            (["--source", str(tmp_path)], "holds no processed/observations.npz"),
                            (["--source", str(RECORDED), "--task", "2"], "of task 2"),
                            (["--episodes", "-1"], "--episodes must be at least 1"),
                            (["--size", "64"], "HEIGHTxWIDTH")):
        run = subprocess.run([sys.executable, ROOT / "data.py", "--out", tmp_path / "out", *arguments],
                             capture_output=True, text=True)
        assert run.returncode and says in run.stderr and "Traceback" not in run.stderr


def test_damaged_packed_episodes_are_named(packed, tmp_path):
    folder = tmp_path / "episode_000"
    shutil.copytree(D.episode_folders(packed)[0], folder)
    (folder / "depth.npy").write_bytes((folder / "depth.npy").read_bytes()[:1000])
    with pytest.raises(ValueError, match="episode_000 is damaged"):
        D.load_episode(folder)
    (folder / "rgb.npy").unlink()
    with pytest.raises(ValueError, match="rgb.npy is missing"):
        D.load_episode(folder)


# ---- clips

def test_a_clip_is_a_function_of_seed_and_number(packed):
    clips = [D.Clips(packed, "train", SIZE, seed=seed) for seed in (3, 3, 4)]
    first, again, other = (c[17] for c in clips)
    assert all(torch.equal(first[key], again[key]) for key in first if torch.is_tensor(first[key]))
    assert any(not torch.equal(clips[0][i]["rgb"], clips[2][i]["rgb"]) for i in range(8))


def test_a_clip_is_what_it_says(packed):
    clip = D.Clips(packed, "train", SIZE)[0]
    assert clip["rgb"].shape == clip["points"].shape == (2, 11, 3, *SIZE) and clip["valid"].shape == (2, 11, *SIZE)
    assert clip["gripper"].shape == (2, 11, *SIZE, 2) and clip["gripper_in_ref"].shape == (11, 2, 4, 4)
    assert torch.allclose(clip["view_in_ref"][0], torch.eye(4), atol=1e-6)
    # the reference's points are its own; the other view's own points, moved by its pose, are its points in reference
    assert torch.allclose(clip["points"][0, 0], clip["own_points"][0], atol=1e-5)
    own = D.denormalize_points(clip["own_points"][1]).permute(1, 2, 0)
    moved = D.transform(own, clip["view_in_ref"][1]).permute(2, 0, 1)
    assert torch.allclose(D.normalize_points(moved), clip["points"][1, 0], atol=1e-5)
    assert not torch.allclose(clip["points"][1, 0], clip["own_points"][1], atol=0.05)


def test_a_single_frame_is_one_of_the_clips(packed):
    for i in range(5):
        whole, single = D.Clips(packed, "train", SIZE)[i], D.Clips(packed, "train", SIZE, single=True)[i]
        t = int(single["frame_index"])
        assert single["rgb"].shape[1] == 2 and 0 <= t < 10
        if single["name"] == whole["name"]:
            assert torch.equal(single["points"][:, 1], whole["points"][:, 1 + t])


def test_static_clips_are_left_out(packed, tmp_path):
    episode = D.load_episode(D.episode_folders(packed)[0])
    still = np.repeat(episode.gripper_in_world[:1], 11, axis=0)
    assert D.moving_starts(episode, 10) == [0]
    arguments = [episode.rgb, episode.depth, episode.label, episode.intrinsics, episode.cam_in_world, still,
                 episode.gripper_opening, episode.time, episode.info]
    D.save_episode(tmp_path / "episode_000", *arguments)
    with pytest.raises(ValueError, match="moving clip"):
        D.Clips(tmp_path, "train", SIZE)


def test_recordings_at_10_hz_are_strided(packed, tmp_path):
    episode = D.load_episode(D.episode_folders(packed)[0])
    slow = [np.repeat(x, 5, axis=axis) for x, axis in ((episode.rgb, 1), (episode.depth, 1), (episode.label, 1))]
    D.save_episode(tmp_path / "episode_000", *slow, episode.intrinsics, np.repeat(episode.cam_in_world, 5, 1),
                   np.repeat(episode.gripper_in_world, 5, 0), np.repeat(episode.gripper_opening, 5, 0),
                   np.arange(55) / 10, dict(episode.info, rate_hz=10))
    starts = D.moving_starts(D.load_episode(tmp_path / "episode_000"), 10)
    assert starts == [0, 1, 2, 3, 4]
    fast, slow = (D.read_clip(D.load_episode(folder), 0, [0, 1], range(10), SIZE)
                  for folder in (D.episode_folders(packed)[0], tmp_path / "episode_000"))
    assert torch.equal(fast["rgb"], slow["rgb"]) and torch.equal(fast["gripper_in_ref"], slow["gripper_in_ref"])


def test_held_out_episodes_and_cameras_are_disjoint():
    train, test = D.episode_split(25, seed=0)
    assert len(test) == 5 and not set(train) & set(test) and sorted(train + test) == list(range(25))
    assert D.episode_split(25, seed=0) == (train, test) != D.episode_split(25, seed=1)
    assert not set(D.TRAIN_CAMERAS) & set(D.TEST_CAMERAS)


def test_too_small_a_packing_is_refused(packed):
    with pytest.raises(ValueError, match="packed at 128x160, smaller than the 256x320"):
        D.Clips(packed, "train", (256, 320))


def test_preview_is_a_picture(packed, tmp_path):
    D.preview(packed, tmp_path / "preview.png")
    assert (tmp_path / "preview.png").stat().st_size > 20_000


def test_command_packs_and_previews(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "data.py", "--source", RECORDED, "--out", tmp_path / "d",
                          "--size", "64x80", "--preview"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert ((tmp_path / "d" / "preview.png").exists()
            and json.loads((tmp_path / "d" / "episode_000" / "episode.json").read_text())["task"] == 1)
