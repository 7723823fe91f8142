"""data.py's geometry, files, clips and packed episodes. tests/data/recorded holds one recorded episode of task 1 in the
public layout: two cameras, 11 frames at 2 Hz, 128 x 160 pixels, MuJoCo physics."""
import os
import re
import resource
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from scipy.spatial.transform import Rotation

import data

RECORDED = Path(__file__).parent / "data" / "recorded"
PROCESSED = next(RECORDED.rglob("processed"))
NAME = "2025-03-31T10-00-00+00-00_episode_0"
SIZE = (64, 80)
RIGHT = "robot__actual__poses__right::panda__", "robot__actual__grippers__right::panda_hand"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    assert data.pack_folder(RECORDED, 1, folder, (128, 160)) == [NAME]
    return folder


@pytest.fixture(scope="module")
def episode(packed):
    return data.load_episode(packed / NAME)


@pytest.fixture
def recording(tmp_path):
    """A copy of the recorded episode, and a function that changes arrays of one of its files (None: leaves one out)."""
    folder = tmp_path / "lab" / "session_1" / "demo"
    shutil.copytree(PROCESSED, folder)

    def change(name, **arrays):
        arrays = data.read_npz(folder / f"{name}.npz") | arrays
        np.savez(folder / f"{name}.npz", **{key: array for key, array in arrays.items() if array is not None})
    return folder, change


def random_pose(draw, *batch):
    rotations = Rotation.random(int(np.prod(batch)), random_state=draw.integers(99)).as_matrix()
    return data.pose(draw.standard_normal((*batch, 3)), rotations.reshape(*batch, 3, 3))


def says(call, *words):
    """`call` is refused in one line with these words."""
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_pinhole_and_poses_undo_themselves(kind):
    draw = np.random.default_rng(0)
    depth = draw.uniform(0.3, 2, (2, 5, 7))
    intrinsics = np.array([[[40.0, 0, 3.1], [0, 42, 2.2], [0, 0, 1]], [[30.0, 0, 2.5], [0, 33, 1.7], [0, 0, 1]]])
    points, a_in_b = data.unproject(kind(depth), kind(intrinsics)), random_pose(draw, 2)
    for size, scale in (((5, 7), 1), ((15, 21), 3)):                                # the centre of pixel 1 is then at 4
        scaled = kind(data.scale_intrinsics(intrinsics, (5, 7), size))
        pixels, z = data.project(points, scaled[:, None, None])
        v, u = np.meshgrid(np.arange(5) * scale + scale // 2, np.arange(7) * scale + scale // 2, indexing="ij")
        assert np.allclose(z, depth, atol=1e-12) and np.allclose(pixels, np.stack([u, v], -1), atol=1e-10)
    moved = data.transform(points, kind(a_in_b))
    assert np.allclose(moved[1, 2, 3], np.asarray(points[1, 2, 3]) @ a_in_b[1, :3, :3].T + a_in_b[1, :3, 3], atol=1e-12)
    assert np.allclose(data.transform(moved, data.invert(kind(a_in_b))), points, atol=1e-12)
    assert np.allclose(data.denormalize_points(data.normalize_points(points)), points, atol=1e-12)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_invalid_depth_goes_to_the_far_plane_and_never_to_the_camera(kind):
    depth = kind(np.array([[0.0, 1, np.nan], [2.5, 2, np.inf], [-1, 0.1, -np.inf]], np.float32))
    points, valid = data.point_maps(depth, kind(np.array([[50, 0, 0.5], [0, 50, 0.5], [0, 0, 1]], np.float32)))
    assert np.array_equal(valid, [[False, True, False], [False, True, False], [False, True, False]])
    assert np.allclose(points[..., 2], [[2, 1, 2], [2, 2, 2], [2, 0.1, 2]]) and np.asarray(points).dtype == np.float32
    assert np.allclose(points[0, 0, :2], [-0.5 / 50 * 2] * 2)               # along the pixel's own ray


def test_rotations_and_rigid_fits():
    draw = np.random.default_rng(2)
    a = random_pose(draw)
    assert np.allclose(data.rotation_from_6d(a[:2, :3].reshape(6)), a[:3, :3])
    for angle in (1e-9, 0.3, np.pi - 1e-6):
        turned = Rotation.from_rotvec(angle * np.array([0.6, 0, 0.8])).as_matrix()
        metres, degrees = data.pose_errors(a, a @ data.pose((0, 0.03, 0), turned))
        assert metres == pytest.approx(0.03) and degrees == pytest.approx(np.rad2deg(angle), rel=1e-5)
    source, weights = draw.standard_normal((4, 20, 3)), np.ones((4, 20))
    source[1, :, 2] = 0                                                             # flat: a mirror image fits as well
    motion = random_pose(draw, 4)
    target = data.transform(source, motion)
    target[:, 0], weights[:, 0] = 9, 0                                              # an outlier without a say
    assert np.allclose(data.rigid_fit(source, target, weights), motion)


def test_files_are_named_with_what_is_wrong(tmp_path, monkeypatch):
    """Truncated, empty and wrong files of every script: tests/test_faults.py."""
    path = tmp_path / "a.npz"
    data.write_npz(path, {"x": np.arange(1000)})
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 255
    np.save(tmp_path / "b.npy", np.arange(3))
    for content, word in ((bytes(flipped), "or delete it"), (b"<html>", "begins with b'<html>'"),
                          ((tmp_path / "b.npy").read_bytes(), "NUMPY")):
        path.write_bytes(content)
        says(lambda: data.read_npz(path), "a.npz is damaged", word)
    np.savez(path, x=np.array([{}]))
    says(lambda: data.read_npz(path), "allow_pickle")
    for number, text in ((24, "Too many open files"), (13, "Permission denied")):
        monkeypatch.setattr(np, "load", Mock(side_effect=OSError(number, text)))
        says(lambda: data.read_npz(path), f"cannot read {path}: {text}")


def test_gifs_play_at_true_speed_with_a_clock(tmp_path):
    data.write_gif(tmp_path / "a.gif", np.zeros((3, 40, 60, 3), np.uint8), 2, seconds=(0, 0.5, 1))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["duration"] == 500
        shown = [np.asarray(picture.convert("L")) for picture in ImageSequence.Iterator(gif)]
    assert shown[1][:14].max() > 200 and (shown[1] != shown[2]).any() and not shown[1][14:].any()


def test_mesh_files(tmp_path):
    path = tmp_path / "a.obj"
    text = "\ufeff# Gr\u00f6\u00df\r\nv 0 0 0\nv 1 0 0\nv 1 \\\n1 0\nvn 0 0 1\nv 0 1 .5\nf 1/1/1 2//1 3 4\nf -4 -3 -2\n"
    for encoded in (text.encode(), text[1:].encode("latin-1")):
        path.write_bytes(encoded)
        vertices, faces = data.load_mesh(path)
        assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.5]]
        assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]]
    path.write_text(2 * "v 0 0 0\nv 1 0 0\nv 1 1 0\nf -3 -2 -1\n")         # back from the last one above the line
    assert data.load_mesh(path)[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_text("v 0 0 0\nv 200 0 0\nv 1 1 0\nf 1 2 3\n")
    says(lambda: data.load_mesh(path), "a.obj is 200 m long", "millimetres")
    for content in ("v 0 0 0\nv 1 0 0\n", "v 0 0 0\nf 1 2 3\n", "v 0 0 0\nv 1 0 0\nv 1 1 0\nf -4 2 1\n",
                    "v a b c\nf 1 1 1\n", "solid of an stl file", "v nan 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\n"):
        path.write_text(content)
        says(lambda: data.load_mesh(path), "a.obj")


def test_recorded_poses_depth_and_masks_agree(episode):
    """Points of view m, moved into view n, meet the depth that n measured there; the hand's lie in the hand."""
    assert set(np.unique(data.resize(episode.depth, SIZE, "depth"))) <= set(np.unique(episode.depth))  # none invented
    points, valid = data.point_maps(episode.depth[1, 0] / 1000, episode.intrinsics[1])
    m_in_n = data.invert(episode.cam_in_world[0, 0]) @ episode.cam_in_world[1, 0]
    pixels, z = data.project(data.transform(points, m_in_n)[valid], episode.intrinsics[0])
    u, v = pixels.round().astype(int).T
    inside = (z > 0) & (u >= 0) & (u < 160) & (v >= 0) & (v < 128)
    n_depth = episode.depth[0, 0][v[inside], u[inside]] / 1000
    assert np.median(np.abs(n_depth - z[inside])[n_depth > 0]) < 0.005
    mask = valid & (episode.label[1, 0] == data.RIGHT_GRIPPER)
    in_hand = data.transform(points[mask], data.invert(episode.gripper_in_world[0, 0]) @ episode.cam_in_world[1, 0])
    assert len(in_hand) > 20 and (np.abs(np.median(in_hand, 0)) < [0.06, 0.11, 0.13]).all()


def test_packing_overwrites_and_mixes_nothing(tmp_path, recording, capsys):
    source, out = recording[0].parents[1], tmp_path / "out"
    for k in (1, 2, 10):
        shutil.copytree(PROCESSED, source / "session_2" / "diffusion_spartan" / f"episode_{k}" / "processed")
    shutil.rmtree(recording[0])
    names = [f"session_2_episode_{k}" for k in (1, 2, 10)]
    assert data.pack_folder(source, 1, out, SIZE, episodes=2) == names[:2]
    assert data.pack_folder(source, 1, out, SIZE) == names[2:] and data.pack_folder(source, 1, out, SIZE) == []
    stamp = lambda: {name: (out / name / "rgb.npy").stat().st_mtime_ns for name in names[::2]}
    before = stamp()
    shutil.rmtree(out / names[1])
    assert data.pack_folder(source, 1, out, SIZE) == names[1:2] and stamp() == before
    assert f"2 of {source} were packed before: delete their folders in {out}" in capsys.readouterr().out
    says(lambda: data.pack_folder(source, 1, out, (32, 40)), "64x80", "32x40", "another --out")
    says(lambda: data.pack_folder(source, 2, out, SIZE), "task 1", "task 2")
    says(lambda: data.make_synthetic(1, out, 1, SIZE), "is recorded", "not synthetic")
    shutil.copytree(source / "session_2", source / "again" / "session_2")
    says(lambda: data.pack_folder(source, 1, tmp_path / "new", SIZE), "would both be packed as session_2_episode_1")
    says(lambda: data.save_episode(out / names[0], *[np.zeros(1)] * 7, {}), "cannot write")
    shutil.copytree(out / names[0], out / f"{names[0]}.partial")  # what a kill before the renaming leaves
    assert len(data.episode_folders(out)) == 3 and stamp() == before


def depth_forms(mm):
    holes = np.where(mm % 7 == 0, np.nan, mm / 1000)
    return {"float32 m": (mm / np.float32(1000), 0), "int32 mm": (mm.astype(np.int32) - (mm == 0), 0),
            "float64 m with holes": (holes, 7), "float mm": (mm.astype(float), "float64"),
            "quarter mm": (mm * 4, "uint16"), "fifths of mm": (mm * 5, "uint16"), "whole m": (mm // 1000, "uint16"),
            "boolean": (mm > 0, "bool")}


@pytest.mark.parametrize("form", depth_forms(np.zeros((1, 1), np.uint16)))
def test_depth_is_converted_or_refused(recording, tmp_path, form):
    folder, change = recording
    mm = data.read_npz(folder / "observations.npz")["scene_8_depth"]
    depth, result = depth_forms(mm)[form]
    change("observations", scene_8_depth=depth)
    pack = lambda: data.pack_recorded(folder, tmp_path / "out", 1, (128, 160))
    if isinstance(result, str):
        return says(pack, "scene_8_depth", result, "millimetres")
    pack()
    assert np.array_equal(data.load_episode(tmp_path / "out").depth[1], np.where(mm % (result or 1e9) == 0, 0, mm))


@pytest.mark.parametrize("name, key, array, words", [
    ("intrinsics", "scene_3", [[1400.0, 0, 960], [0, 1400, 540], [0, 0, 1]], "128x160 picture"),    # of full HD
    ("intrinsics", "scene_3", [[66.0, 0, 40], [0, 66, 32], [0, 0, 1]], "pixels"),                   # of half the size
    ("intrinsics", "scene_3", [[0.84, 0, 0.5], [0, 1.04, 0.5], [0, 0, 1]], "pixels"),               # normalised
    ("intrinsics", "scene_3", [[133.7, 0, 0], [0, 133.7, 0], [79.5, 63.5, 1]], "pixels"),           # transposed
    ("intrinsics", "scene_3", np.zeros((3, 3)), "0 to 0"), ("intrinsics", "scene_3", np.full((3, 3), np.nan), "finite"),
    ("intrinsics", "scene_3", np.eye(4), "(4, 4), expected (3, 3)"), ("intrinsics", "scene_3", None, "no array"),
    ("extrinsics", "scene_8", np.eye(4)[None].repeat(9, 0), "(9, 4, 4)"),
    ("extrinsics", "scene_8", 1000 * np.eye(4), "rigid"), ("extrinsics", "scene_8", np.ones((4, 4)), "rigid"),
    ("observations", "scene_3", np.zeros((11, 128, 160, 3), np.float32), "float32 0 to 0: expected colours"),
    ("observations", "scene_3", np.zeros((11, 128, 160), np.uint8), "(any, any, any, 3)"),
    ("observations", "scene_3_depth", None, "no array 'scene_3_depth'"),
    ("observations", "scene_3_label", None, "no array 'scene_3_label'"),
    ("observations", "scene_8_label", np.zeros((11, 4, 4)), "(11, 4, 4)"),
    ("observations", RIGHT[0] + "rot_6d", None, "no array"),
    ("observations", RIGHT[0] + "xyz", np.ones((11, 2)), "(11, 2)"),
    ("observations", RIGHT[0] + "xyz", np.full((11, 3), 450.0), "xyz"),                             # millimetres
    ("observations", RIGHT[1], np.full((11, 1), 80.0), "fingers"),
])
def test_wrong_recordings_are_refused_by_name(recording, tmp_path, name, key, array, words):
    folder, change = recording
    change(name, **{key: array if array is None else np.array(array)})
    says(lambda: data.pack_recorded(folder, tmp_path / "out", 1, SIZE), f"{name}.npz", key, words)
    assert not [*tmp_path.glob("out*")]


@pytest.mark.parametrize("rate, fits", [(5, 0), (3, 0), (1, 0), (7, 0), (0, 0), (2, 1), (10, 5), (30, 15), (29.97, 15)])
def test_frames_of_a_clip_are_half_a_second_apart(recording, tmp_path, rate, fits):
    folder, pack = recording[0], lambda: data.pack_recorded(recording[0], tmp_path / "out", 1, SIZE)
    (folder / "metadata.yaml").write_text(f"rate_hz: {rate}")
    if not fits:
        return says(pack, "frames a second", "multiple of 2")
    pack()
    episode = data.load_episode(tmp_path / "out")
    assert episode.stride == fits
    if fits == 5:
        assert np.array_equal(data.read_clip(episode, 0, [0, 1], [0, 1])["true_rgb"][1], episode.rgb[1, [5, 10]])


def test_any_camera_names_one_arm_and_no_labels(recording, tmp_path, capsys):
    folder, change = recording
    for name in ("observations", "intrinsics", "extrinsics"):
        old = data.read_npz(folder / f"{name}.npz")
        new = {key.replace("scene_3", "wrist").replace("scene_8", "front view"): old[key] for key in old
               if "label" not in key and "left" not in key}
        change(name, **(dict.fromkeys(old) | new))
    change("extrinsics", **{"front view": new["front view"][0]})                                    # (4, 4): it stands
    change("observations", **{RIGHT[1]: data.read_npz(folder / "observations.npz")[RIGHT[1]][:, 0]})
    (folder / "metadata.yaml").write_text("rate_hz: 2")
    data.prepare(1, tmp_path / "out", folder.parents[1], SIZE)
    episode = data.load_episode(tmp_path / "out" / "session_1_demo")
    said = capsys.readouterr().out
    assert "2 cameras at 64x80, 11 frames at 2 Hz, 1 moving clips; depth in" in said and "1 hands, not labelled" in said
    assert "camera  1 front view" in said and "camera  2 wrist" in said and "check its extrinsics" not in said
    assert episode.info["cameras"] == ["front view", "wrist"] and episode.gripper_opening.shape == (11, 1)
    clips = data.Clips(tmp_path / "out", "train", SIZE)
    assert "observed_gripper" not in clips.clip(0) and not clips[0]["gripper"].any()

    change("extrinsics", wrist=data.invert(new["wrist"]))                                           # world to camera
    data.prepare(1, tmp_path / "turned", folder.parents[1], SIZE)
    assert "<- check its extrinsics" in capsys.readouterr().out
    change("observations", **{"wrist_depth": None})
    says(lambda: data.pack_recorded(folder, tmp_path / "none", 1, SIZE), "has 1 cameras")


def test_labels_are_held_against_the_hands(recording, tmp_path, capsys):
    folder, _ = recording
    data.prepare(1, tmp_path / "right", folder.parents[1], SIZE)
    assert "hand 2:" in (said := capsys.readouterr().out) and "check label_names" not in said
    (folder / "metadata.yaml").write_text("rate_hz: 2")                      # without names, the public ids are meant
    data.prepare(1, tmp_path / "wrong", folder.parents[1], SIZE)
    assert "<- check label_names" in capsys.readouterr().out


def test_damaged_still_and_small_episodes_are_named(packed, episode, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(packed / NAME, folder)
    os.truncate(folder / "depth.npy", 9999)
    says(lambda: data.load_episode(folder).depth, "depth.npy is damaged", "run data.py again")
    (folder / "rgb.npy").unlink()
    says(lambda: data.load_episode(folder), "rgb.npy is missing")
    still = np.repeat(episode.gripper_in_world[:1], 11, axis=0)
    data.save_episode(tmp_path / "two" / "still", episode.rgb, episode.depth, episode.label, episode.intrinsics,
                      episode.cam_in_world, still, episode.gripper_opening, episode.info)
    says(lambda: data.Clips(tmp_path / "two", "train", SIZE), "moving clip")
    says(lambda: data.Clips(packed, "train", (256, 320)), "128x160", "256x320")


def test_a_clip_is_what_it_says(packed, episode):
    clips = data.Clips(packed, "train", SIZE)
    clip, item = clips.clip(0), clips[0]
    assert {key: np.shape(clip[key]) for key in data.CLIP if key in clip} == dict(
        observed_rgb=(2, 64, 80, 3), observed_depth=(2, 64, 80), observed_gripper=(2, 2, 64, 80),
        observed_object=(2, 64, 80), intrinsics=(2, 3, 3), observed_gripper_in_ref=(2, 4, 4), observed_opening=(2,),
        ref_in_world=(4, 4), true_rgb=(2, 10, 64, 80, 3), true_points=(2, 10, 64, 80, 3), true_valid=(2, 10, 64, 80),
        true_view_in_ref=(2, 4, 4), true_gripper=(2, 10, 2, 64, 80), true_gripper_in_ref=(11, 2, 4, 4),
        true_opening=(11, 2), frame_index=(10,), fps=())
    checked = data.check_clip(clip, ("observed", "pose", "mask", "truth"))
    assert all(np.array_equal(checked[key], clip[key]) for key in data.CLIP if key in clip)
    assert item["rgb"].shape == item["points"].shape == (2, 11, 3, *SIZE) and item["valid"].shape == (2, 11, *SIZE)
    assert item["gripper"].shape == (2, 11, *SIZE) and 0.005 < item["moving"].float().mean() < 0.2
    assert item["rgb"].abs().max() <= 1 and item["rgb"].std() > 0.1
    own = data.denormalize_points(item["own_points"].permute(0, 2, 3, 1))
    moved = data.transform(own, torch.as_tensor(clip["true_view_in_ref"]).float())
    assert torch.allclose(data.normalize_points(moved).permute(0, 3, 1, 2), item["points"][:, 0], atol=1e-5)
    true = data.normalize_points(clip["true_points"]).transpose(0, 1, 4, 2, 3)
    assert np.allclose(true, item["points"][:, 1:], atol=1e-5)
    far = (item["points"][:, 1:] - item["points"][:, :1]).mul(1.5).norm(dim=2) > data.MOVED
    assert torch.equal(item["moving"], item["valid"][:, 1:] & (far | ~item["valid"][:, :1]))
    assert torch.equal(item["gripper"][:, 0], torch.as_tensor(clip["observed_gripper"]).any(1))
    truth = data.check_clip(data.truth_row(clip), ("prediction",))
    assert all(np.array_equal(truth[key], clip["true_" + key]) for key in ("rgb", "points", "valid", "view_in_ref"))
    says(lambda: data.read_clip(episode, 1, [0, 1]), "11 frames", "to 11")
    says(lambda: data.read_clip(episode, 0, [0, 2]), "2 cameras", "1, 3")
    seen = data.to_tensors({key: value for key, value in clip.items() if not key.startswith("true_")})
    assert set(seen) == {"rgb", "valid", "gripper", "own_points"} and seen["rgb"].shape[1] == 1
    assert all(torch.equal(seen[key], item[key][:, :1]) for key in ("rgb", "valid", "gripper"))


def test_clips_depend_on_seed_and_number_alone(packed):
    first, again, other = (data.Clips(packed, "train", SIZE, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[17][key], again[17][key]) for key in first[17])
    assert any(not torch.equal(first[i]["rgb"], other[i]["rgb"]) for i in range(8))
    single, seen = data.Clips(packed, "train", SIZE, seed=3, single=True), []
    for i in range(30):
        item, clip = single[i], first.clip(i)
        seen.append(t := int(item["frame_index"][0]))
        assert item["rgb"].shape[1] == 2 and single.clip(i)["name"] == clip["name"]
        assert torch.equal(item["points"][:, 1], data.to_tensors(clip)["points"][:, 1 + t])
    assert len(set(seen)) > 5 and np.mean(seen) < 3.6          # the nearer of two: 2.85, not 4.5


def test_single_frames_can_start_where_no_clip_fits(packed):
    """Of 11 frames at 2 Hz a whole clip fits at the first alone, and a frame follows on ten."""
    single, seen = data.Clips(packed, "train", SIZE, single=True, late=0.5), []
    for i in range(80):
        item, name = single[i], single.clip(i)["name"]
        start, *cameras = map(int, re.search(r" t(\d+) cameras (\d+)-(\d+)", name).groups())
        seen.append((start, t := int(item["frame_index"][0])))
        clip = data.read_clip(single.cuts[0][0], start, np.array(cameras) - 1, [t], SIZE)
        assert torch.equal(item["points"], data.to_tensors(clip)["points"])
    start, t = np.array(seen).T
    assert max(start + t) == 9 and max(start) == 9 and max(t[start == 0]) > 5
    assert 0.4 < (start == 0).mean() < 0.7                      # 0.55: a half, and a tenth of the other


def test_splits_depend_on_names_alone_and_need_few_open_files(packed, tmp_path):
    for k in range(30):
        shutil.copytree(packed / NAME, tmp_path / f"synthetic_{k:05d}", copy_function=os.link)
    train, test = (data.Clips(tmp_path, split, SIZE) for split in ("train", "test"))
    names = [{cut[0].folder.name for cut in clips.cuts} for clips in (train, test)]
    assert train.held_out and not names[0] & names[1] and len(names[0] | names[1]) == 30
    assert names[1] == {name for name in os.listdir(tmp_path) if data.split_of(name) == "test"} and len(names[1]) == 9
    assert not data.Clips(packed, "test", SIZE).held_out
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 8, limit[1]))
        assert [data.Clips(tmp_path, split, SIZE).clip(i) for split in ("train", "test") for i in range(9)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize("saved", [lambda m: m, lambda m: m.astype(np.uint8), lambda m: m * np.uint8(255),
                                   lambda m: m * 0.9 + 0.05, lambda m: m[:, 0]])
def test_masks_are_taken_as_people_save_them(episode, saved):
    clip = data.read_clip(episode, 0, [0, 1])
    mask = clip["observed_gripper"]
    one = {key: clip[key] for key in data.NEEDS["observed"]} | {"observed_gripper": saved(mask[:, :1])}
    checked = data.check_clip(one, ("observed", "mask"))["observed_gripper"]
    assert checked.dtype == bool and np.array_equal(checked, mask[:, :1])


@pytest.mark.parametrize("key, change, words", [
    ("observed_rgb", lambda x: x / 255, "uint8 0 to 255"), ("observed_rgb", lambda x: x[..., :2], "(V, H, W, 3)"),
    ("observed_rgb", lambda x: None, "no 'observed_rgb'"), ("observed_rgb", lambda x: x[:0], "shape (0, "),
    ("rgb", lambda x: x / 255, "float64 0"),
    ("observed_depth", lambda x: x * 0.01, "0.05 m"), ("observed_depth", lambda x: x[:, :50], "H = 64"),
    ("observed_gripper", lambda x: x[..., :50], "(V, A, H, W)"), ("points", lambda x: x * 1000, "metres"),
    ("observed_gripper", lambda x: np.cumsum(x, 1) + x, "a mask"), ("points", lambda x: x[:, :5], "T = 10"),
    ("intrinsics", lambda x: x * 3, "64x80"), ("intrinsics", lambda x: x.mT, "64x80"),
    ("observed_opening", lambda x: x * 1000, "fingers"), ("true_opening", lambda x: x[1:], "F = 11"),
    ("view_in_ref", lambda x: x * 2, "rigid"), ("observed_gripper_in_ref", lambda x: x[:1], "A = 2"),
    ("observed_gripper_in_ref", lambda x: np.nan * x, "finite"), ("true_valid", lambda x: "yes", "shape ()"),
])
def test_bad_clips_are_refused_by_key(episode, key, change, words):
    clip = data.truth_row(data.read_clip(episode, 0, [0, 1], size=SIZE))
    clip[key] = change(clip[key])
    clip = {key: value for key, value in clip.items() if value is not None}
    says(lambda: data.check_clip(clip, ("observed", "prediction")), key, words)


def test_holes_are_nan_inf_or_zero(episode):
    clip = data.truth_row(data.read_clip(episode, 0, [0, 1]))
    depth, points = clip["observed_depth"].copy(), clip["points"].copy()
    depth[0, :3], points[1, 2, :2] = [[np.nan], [np.inf], [-1]], [[[np.nan] * 3], [[np.inf] * 3]]
    clip |= dict(observed_depth=depth, points=points, valid=np.ones_like(clip["valid"]))
    checked = data.check_clip(clip, ("observed", "prediction"))
    assert not checked["observed_depth"][0, :3].any() and checked["observed_depth"][0, 3:].any()
    assert not checked["valid"][1, 2, :2].any() and checked["valid"].mean() > 0.9
    assert np.isfinite(checked["points"]).all()
    assert not data.check_clip(clip | {"observed_depth": np.zeros((2, 128, 160), np.uint16)})["observed_depth"].any()


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the two hub calls in use: three episodes, with files that nobody needs beside them."""
    hub = SimpleNamespace(fetched=[], fail_at=None)
    session, names = f"{data.TASKS[1].folder}/2025-01-01/diffusion_spartan", [path.name for path in PROCESSED.iterdir()]
    tree = [f"{session}/episode_{k}/{name}" for k in (10, 2, 1)                                     # not in order
            for name in ("raw/observations.npz", "processed/video.mp4", *(f"processed/{n}" for n in names))]
    tree += [f"{folder}/2/processed/observations.npz" for folder in (data.TASKS[2].folder, "new_real_tasks")]

    def fetch(repo, *, repo_type, local_dir, allow_patterns):
        for name in tree:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                if hub.fail_at == len(hub.fetched):
                    raise ConnectionError("the line went dead\nfor good")
                if not (target := Path(local_dir) / name).exists():   # as the client does: nothing is fetched twice
                    hub.fetched.append(name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(PROCESSED / target.name, target)
    hub.list_repo_files, hub.snapshot_download = Mock(return_value=tree), fetch
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_hub_episodes_are_fetched_packed_and_deleted_one_by_one(hub, tmp_path, capsys):
    names, files = [f"2025-01-01_episode_{k}" for k in (1, 2, 10)], len([*PROCESSED.iterdir()])
    data.prepare(1, tmp_path, "hub", (32, 40), episodes=1)
    assert "1 episodes of task 1" in capsys.readouterr().out and len(hub.fetched) == files
    hub.fail_at = 2 * files + 2                                       # in the middle of the third
    says(lambda: data.pack_folder("hub", 1, tmp_path, (32, 40)), "ConnectionError", "--source FOLDER", "hf auth login")
    hub.fail_at = None
    assert data.pack_folder("hub", 1, tmp_path, (32, 40)) == names[2:] and len(hub.fetched) == 3 * files
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    hub.list_repo_files.assert_called_with(data.HUB_DATASET, repo_type="dataset")
    error = huggingface_hub.errors.LocalEntryNotFoundError("a long story\nin many lines")          # a ValueError, too
    hub.list_repo_files.side_effect = [error, []]
    says(lambda: data.pack_folder("hub", 1, tmp_path, (32, 40)), "LocalEntryNotFoundError", "check the network")
    says(lambda: data.pack_folder("hub", 1, tmp_path, (32, 40)), "hub holds no observations.npz of task 1")


def test_commands(tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        data.main()
    command("--source", RECORDED, "--out", tmp_path / "d", "--size", "32x40")
    said = capsys.readouterr().out
    assert "1 episodes of task 1" in said and "scene_3" in said
    assert data.load_episode(tmp_path / "d" / NAME).size == (32, 40)
    assert (tmp_path / "d" / "preview.png").stat().st_size > 20_000
    says(lambda: command("--source", RECORDED, "--task", 2, "--out", tmp_path / "e"), "of task 2")
    with pytest.raises(SystemExit):
        command("--help")
    assert "[data/task_N]" in (said := capsys.readouterr().out) and "None" not in said
