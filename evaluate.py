"""Scores 4D predictions: the paper's metrics, its baselines, its ablation, and a closed loop in the synthetic world.

    python evaluate.py --task 1 --clips 8                 # sample, track and score held-out clips
    python evaluate.py --predictions DIR                  # score every prediction.npz below DIR, whoever made it
    python evaluate.py --task 1 --ablation --minutes 30   # train the four rows of the paper's table alike, score them
    python evaluate.py --task 1 --rollout 20 --execute 5  # observe, generate, track, act on 5 frames, observe again

Most of a tabletop stands still, where repeating the last frame is hard to beat: read that column beside every method,
and the lines of what moves, of the hand, and of what stays. The truth's columns say what tracker and code can reach.

Letters   V views (0 is the reference, n in the paper; the others are m), T predicted frames, F = T + 1 with the
          observed one, A arms, H W pixels, N anything, D features
Units     metres, degrees, dB and pixels in every function; the tables print millimetres

References: SSIM, Wang et al. 2004; AbsRel and delta, arXiv 1406.2283; FVD, arXiv 1812.01717; MMD with a polynomial
kernel, arXiv 1801.01401.
"""
import argparse
import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from tqdm import tqdm

import data
import sample
import track
from data import invert, pose_errors, read_npz, transform, truth_row, write_json, write_npz

SAME_COLOUR = 10            # of 255, up to which a still pixel's colour counts as unchanged: no shadow came or went
NEAR = 0.03                 # m within which a point is on the hand
TRACKED = 0.02, 10          # m and degrees within which a hand counts as tracked
FEWEST_SEEN = 10            # gripper pixels that make a frame one that shows the hand
HORIZONS = {"0.5-1 s": slice(0, 2), "1.5-2.5 s": slice(2, 5), "3-5 s": slice(5, 10)}  # predicted frames at 2 Hz


# ------------------------------------ images and depths

def mean(values, axis=None):
    """Mean of what is known; NaN, without a warning, where nothing is."""
    values = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def psnr(pred, true, valid=...):
    """10 log10(1 / MSE) in dB of pictures (H, W, 3) in [0, 1], over valid (H, W) if given. Identical ones have 100 dB,
    so that means stay finite."""
    error = (pred[valid] - true[valid]) ** 2
    return -10 * np.log10(max(error.mean(), 1e-10)) if error.size else np.nan


def ssim(pred, true):
    """Structural similarity (Wang et al. 2004, eq. 13) of pictures (H, W, 3) in [0, 1]; 1 is identical. Gaussian
    window, sigma 1.5, 11 x 11; mean over the pixels whose whole window is in the picture."""
    c_1, c_2 = 0.01 ** 2, 0.03 ** 2
    blur = lambda x: gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]
    mu_x, mu_y = blur(pred), blur(true)
    var_x, var_y, cov = blur(pred ** 2) - mu_x ** 2, blur(true ** 2) - mu_y ** 2, blur(pred * true) - mu_x * mu_y
    alike = (2 * mu_x * mu_y + c_1) * (2 * cov + c_2) / ((mu_x ** 2 + mu_y ** 2 + c_1) * (var_x + var_y + c_2))
    return alike.mean()


def depth_pairs(pred_z, true_z, valid):
    """The scored depths as two vectors: where the truth is positive and `valid` holds."""
    p, g = np.asarray(pred_z, np.float64), np.asarray(true_z, np.float64)
    chosen = (g > 0) & valid
    return p[chosen], g[chosen]


def abs_rel(pred_z, true_z, valid=True):
    """mean |pred - true| / true over valid pixels, any shape; 0 is ideal. A wrong sign counts like any error."""
    p, g = depth_pairs(pred_z, true_z, valid)
    return mean(np.abs(p - g) / g)


def delta1(pred_z, true_z, valid=True):
    """Share of valid pixels with max(pred / true, true / pred) < 1.25; 1 is ideal."""
    p, g = depth_pairs(pred_z, true_z, valid)
    return mean((p < 1.25 * g) & (g < 1.25 * p))  # as products: of a p < 0 both quotients are below 1.25


def chamfer(a, b):
    """Mean distance (m) of clouds (N, 3), (M, 3) to the other's nearest point, average of both ways; large clouds are
    thinned evenly. NaN if one is empty."""
    if not len(a) or not len(b):
        return np.nan
    a, b = (cloud[np.linspace(0, len(cloud) - 1, min(len(cloud), 4000)).astype(int)] for cloud in (a, b))
    return (cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2


def still_error(pred, true, still):
    """Median distance (m) of still pixels' points (H, W, 3) from the truth, once the view's rigid drift is taken back:
    a view that lies wrong as a whole is the camera's error, this is what trembles on top of it."""
    chosen = np.flatnonzero(still)[::max(1, still.sum() // 1000)]
    if len(chosen) < 3:
        return np.nan
    true, pred = (x.reshape(-1, 3)[chosen] for x in (true, pred))  # (N, 3)
    drift = sample.recover_view_in_ref(true, np.ones(len(true), bool), pred[None])
    return np.median(np.linalg.norm(pred - transform(true, drift), axis=-1))


# ------------------------------------ videos and views

def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians fitted to features a (N, D), b (M, D) (arXiv 1706.08500):
    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S = X^T X the sample covariances of centred features X.

    The root's trace is the sum of the singular values of X_a X_b^T, whose squares are S_a S_b's eigenvalues: singular
    covariances (few clips, 400 features) lose no digits."""
    x_a, x_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    trace_of_root = np.linalg.svd(x_a @ x_b.T, compute_uv=False).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x_a ** 2).sum() + (x_b ** 2).sum() - 2 * trace_of_root
    return max(0.0, distance)  # rounding can leave -1e-13


def polynomial_mmd(a, b):
    """Unbiased squared MMD of paired features a, b (N, D), kernel (x.y / D + 1)^3 (arXiv 1801.01401). It does not fall
    as clips are added, as Frechet's does. Pairs (i, i) are left out: a clip and its truth are not independent."""
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # (N, N)
    h = kernel(a, a) + kernel(b, b) - kernel(a, b) - kernel(b, a)
    return (h.sum() - np.trace(h)) / (len(a) * (len(a) - 1))


def load_i3d(file):
    """The Kinetics-400 I3D that defines FVD, as TorchScript, if a file is given."""
    try:
        return torch.jit.load(file, map_location="cpu").eval() if file else None
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--i3d {file} is not a TorchScript file ({str(error).splitlines()[0]})") from None


@torch.no_grad()
def i3d_features(i3d, videos):
    """(N, 400) I3D logits of videos (N, T, H, W, 3) uint8, resized to 224 x 224, in [-1, 1]; T >= 10."""
    x = torch.from_numpy(videos).permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # (N, T, 3, H, W)
    x = [F.interpolate(video, (224, 224), mode="bilinear", antialias=True).transpose(0, 1)[None] for video in x]
    return torch.cat([i3d(video, rescale=False, resize=False, return_features=True) for video in x]).double().numpy()


def cross_view_miou(points, gripper_n, gripper_m, intrinsics_n, intrinsics_m, ref_in_m):
    """IoU of the gripper's mask in view n, carried into camera m by n's predicted points, with m's own mask: (T,),
    NaN where neither is there. points (T,H,W,3): view n's, reference frame; gripper_n, gripper_m (T,H,W) bool;
    ref_in_m (4,4): the true camera m, for scoring only.

    It tells whether two views agree about the hand, be it right or wrong. The truth scores far below 1: what only m
    sees of the hand is not covered, and a small mask is half boundary."""
    thirds = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(9, 1, 2) / 3  # of a pixel: to leave no holes
    ious = []
    for t, own in enumerate(gripper_m):
        hand = np.repeat(points[t][gripper_n[t]][None], 9, 0)                        # (9, N, 3)
        hand[..., :2] += thirds / (intrinsics_n[0, 0], intrinsics_n[1, 1]) * hand[..., 2:]
        hand_in_m = transform(hand, ref_in_m)
        pixels, _ = data.project(hand_in_m[hand_in_m[..., 2] > 1e-3], intrinsics_m)  # (N, 2)
        column, row = np.rint(pixels).astype(int).T
        inside = (column >= 0) & (column < own.shape[1]) & (row >= 0) & (row < own.shape[0])
        shown = np.zeros(own.shape, bool)
        shown[row[inside], column[inside]] = True
        union = (shown | own).sum()
        ious.append((shown & own).sum() / union if union else np.nan)
    return np.array(ious)


# ------------------------------------ scoring one clip

def score(clip, trajectory=None):
    """All that can be said of one prediction: {figure: (T,) values over the horizon, or one number}.

    clip: checked, with its truth; with `gripper` (V,T,H,W), the hand's mask in the generated views, mIoU too.
    trajectory: track.track's. `-n` is view 0, `-m` the mean of the others; a frame without such pixels has NaN."""
    views, frames = clip["rgb"].shape[:2]
    values = {} if trajectory is None else score_hands(trajectory, clip)

    def add(name, figure, *arrays):
        table = np.array([[figure(*(x[v, t] for x in arrays)) for t in range(frames)] for v in range(views)])
        values[name + "-n"], values[name + "-m"] = table[0], mean(table[1:], 0)

    rgb, true_rgb = clip["rgb"] / 255, clip["true_rgb"] / 255
    true, valid = clip["true_points"], clip["true_valid"]
    own, own_valid = data.point_maps(clip["observed_depth"], clip["intrinsics"])
    moved = np.linalg.norm(true - transform(own, clip["true_view_in_ref"])[:, None], axis=-1) > data.MOVED
    still, moving = (valid & own_valid[:, None] & chosen for chosen in (~moved, moved))  # (V, T, H, W)
    change = np.abs(clip["true_rgb"].astype(int) - clip["observed_rgb"][:, None]).max(-1)
    add("psnr", psnr, rgb, true_rgb)
    add("ssim", ssim, rgb, true_rgb)
    add("psnr_same", psnr, rgb, true_rgb, still & (change <= SAME_COLOUR))
    if "points" not in clip:
        return values
    points = clip["points"]
    off, average = np.linalg.norm(points - true, axis=-1), lambda x, chosen: mean(x[chosen])
    add("points", average, off, valid)
    add("points_moving", average, off, moving)
    add("abs_rel", abs_rel, points[..., 2], true[..., 2], valid)
    add("delta1", delta1, points[..., 2], true[..., 2], valid)
    add("still", still_error, points, true, still)
    if "true_gripper" in clip:
        add("hand", average, off < NEAR, valid & clip["true_gripper"].any(2))
        for view in "nm" if clip["fps"] == data.CLIP_HZ else "":
            values |= {f"hand-{view} {horizon}": values[f"hand-{view}"][part] for horizon, part in HORIZONS.items()}
    values["chamfer"] = np.array([chamfer(points[:, t][clip["valid"][:, t]], true[:, t][valid[:, t]])
                                  for t in range(frames)])
    apart = pose_errors(clip["view_in_ref"][1:], clip["true_view_in_ref"][1:])
    values["camera_m"], values["camera_deg"] = map(mean, apart)
    if "gripper" in clip and views > 1:
        mask, K, ref_in_view = clip["gripper"], clip["intrinsics"], invert(clip["true_view_in_ref"])
        ious = np.array([cross_view_miou(points[0], mask[0], mask[v], K[0], K[v], ref_in_view[v])
                         for v in range(1, views)])
        if "true_gripper" in clip:  # truly in sight and found in neither view: 0
            ious[np.isnan(ious) & clip["true_gripper"][1:].any((2, 3, 4))] = 0
        values["miou"] = mean(ious, 0)
    return values


def score_hands(trajectory, clip):
    """Errors of the tracked hands that move in the truth (a parked arm would halve every error), in the frames in which
    a view shows them: {figure: (T,) values}. A lost frame counts with the pose that the tracker held."""
    true = clip["true_gripper_in_ref"]  # (F, A, 4, 4)
    arms = np.flatnonzero((pose_errors(true, true[:1])[0] > data.MOVED).any(0))
    lost = trajectory["lost"][1:, arms]  # (T, A')
    metres, degrees = pose_errors(trajectory["gripper_in_ref"][1:, arms], true[1:, arms])
    figures = dict(tracked=~lost & (metres < TRACKED[0]) & (degrees < TRACKED[1]), lost=lost, gripper_m=metres,
                   gripper_deg=degrees, opening=np.abs(trajectory["opening"] - clip["true_opening"])[1:, arms])
    seen = np.ones_like(lost)
    if "true_gripper" in clip:
        seen = clip["true_gripper"][:, :, arms].sum((3, 4)).max(0) >= FEWEST_SEEN
    return {name: mean(np.where(seen, x, np.nan), 1) for name, x in figures.items()}


# ------------------------------------ rows

def tracked(clip):
    """(the clip with `gripper` (V,T,H,W), the hand's mask in each generated view; its trajectory, or None). Masks that
    the clip brings along, from SAM 2 for instance, are kept."""
    if "points" not in clip:
        return clip, None
    trajectory = track.track(clip)
    return {"gripper": hand_masks(clip, trajectory)} | clip, trajectory


def hand_masks(clip, trajectory):
    """Where each view shows the hand, (V,T,H,W) bool: the hand drawn where it was tracked, where the view's own points
    lie there to 3 cm. So views that disagree about where the hand is are caught."""
    masks, hand, ref_in_view = np.zeros(clip["valid"].shape, bool), track.hand_model(), invert(clip["view_in_ref"])
    z_seen = transform(clip["points"], ref_in_view)[..., 2]  # (V, T, H, W)
    for t, a in zip(*np.nonzero(~trajectory["lost"][1:])):
        vertices = hand.vertices + np.outer(trajectory["opening"][t + 1, a] * hand.vertex_slide, (0, 1, 0))
        in_view = [transform(vertices, one @ trajectory["gripper_in_ref"][t + 1, a]) for one in ref_in_view]
        z, _ = data.rasterize(in_view, hand.faces, clip["intrinsics"], *masks.shape[2:])  # (V, H, W)
        masks[:, t] |= (z > 0) & (np.abs(z - z_seen[:, t]) < NEAR)
    return masks


def last_frame_row(clip, told_poses=True):
    """The observed frame repeated and the hand held still, with the true camera poses, which a model is not told, or
    with each view's own points taken as they are."""
    view_in_ref = clip["true_view_in_ref"] if told_poses else np.tile(np.eye(4), (len(clip["rgb"]), 1, 1))
    own, valid = data.point_maps(clip["observed_depth"], clip["intrinsics"])
    seen = dict(rgb=clip["observed_rgb"], points=transform(own, view_in_ref), valid=valid)
    frames = clip["rgb"].shape[1]
    row = clip | {key: np.stack([x] * frames, 1) for key, x in seen.items()} | dict(view_in_ref=view_in_ref)
    if not told_poses:
        return row, None
    hand = dict(gripper_in_ref=clip["observed_gripper_in_ref"], opening=clip["observed_opening"],
                lost=np.zeros(len(clip["observed_opening"]), bool))
    still = {key: np.stack([x] * (frames + 1)) for key, x in hand.items()}
    return row | dict(gripper=hand_masks(row, still)), still


def code_row(clip, run):
    """The truth through the code and back, with the true cameras: no generator of these latents can do better."""
    tensors = data.to_tensors(clip)
    true = (tensors[key][None, :, 1:].to(run.device) for key in ("rgb", "points"))  # (1, V, T, 3, H, W)
    with torch.no_grad():
        rgb, points = (x[0].movedim(2, -1).cpu().numpy() for x in sample.decode(run, sample.encode_targets(run, *true)))
    return tracked(truth_row(clip) | dict(rgb=((rgb + 1) * 127.5).round().astype(np.uint8), points=points))


def baselines(run=None):
    """{label: make} of the rows that need no generator; make(clip) -> (clip, trajectory)."""
    rows = {"last frame repeated": last_frame_row, "own points unmoved": lambda clip: last_frame_row(clip, False),
            "truth, tracked": lambda clip: tracked(truth_row(clip))}
    if run is not None and not run.model.rgb_only:
        rows["truth through the code"] = lambda clip: code_row(clip, run)
    return rows


# ------------------------------------ tables

# figure, in the table's order: heading, factor to the table's unit, digits
METRICS = {
    "miou": ("mIoU ↑", 1, 2), "fvd": ("FVD ↓", 1, 0), "mmd": ("MMD ↓", 1, 1), "abs_rel": ("AbsRel ↓", 1, 3),
    "delta1": ("delta1 ↑", 1, 3), "points_moving": ("moving points, mm ↓", 1000, 0),
    "hand": ("hand within 30 mm ↑", 1, 2), "tracked": ("tracked ↑", 1, 2), "lost": ("lost ↓", 1, 2),
    "gripper_m": ("gripper, mm ↓", 1000, 0), "gripper_deg": ("gripper, deg ↓", 1, 1),
    "opening": ("opening, mm ↓", 1000, 1), "points": ("points, mm ↓", 1000, 0), "chamfer": ("chamfer, mm ↓", 1000, 1),
    "still": ("still pixels off, mm ↓", 1000, 1), "camera_m": ("camera, mm ↓", 1000, 0),
    "camera_deg": ("camera, deg ↓", 1, 1), "psnr": ("PSNR, dB ↑", 1, 1), "psnr_same": ("PSNR, unchanged, dB ↑", 1, 1),
    "ssim": ("SSIM ↑", 1, 3)}
# Table 1 of the paper: tasks 1 / 2 / 3, or ranges over them
PUBLISHED = {
    "paper: ours": {"miou": ".70 / .69 / .64", "fvd-n": "378-491", "fvd-m": "258-561", "abs_rel-n": ".03-.06",
                    "abs_rel-m": ".11 (task 1)", "delta1-n": ".95-.98"},
    "paper: w/o MV attention": {"miou": ".41 / .44 / .26", "fvd-n": "451-597", "fvd-m": "302-607",
                                "abs_rel-n": ".10-.15", "abs_rel-m": ".31 (task 1)", "delta1-n": ".75-.89"}}


def score_row(clips, i3d=None):
    """One seed of one method: (name, clip, trajectory)s -> {name: {figure: mean over frames}} and {figure: mean over
    clips, or a number of all of them}. What is not known is left out."""
    known = lambda values: {figure: float(x) for figure, x in values.items() if not np.isnan(x)}
    scores, features = {}, []
    for name, clip, trajectory in clips:
        scores[name] = known({figure: mean(x) for figure, x in score(clip, trajectory).items()})
        if i3d is not None and clip["rgb"].shape[1] >= 10:
            features.append([i3d_features(i3d, clip[key]) for key in ("rgb", "true_rgb")])
    figures = dict.fromkeys(figure for values in scores.values() for figure in values)
    row = {figure: mean([values.get(figure, np.nan) for values in scores.values()]) for figure in figures}
    for view, chosen in ("n", slice(0, 1)), ("m", slice(1, None)):
        if len(features) > 1:
            pred, true = (np.concatenate([x[chosen] for x in side]) for side in zip(*features))
            row |= {f"fvd-{view}": frechet_distance(pred, true), f"mmd-{view}": polynomial_mmd(pred, true)}
    return scores, known(row)


def cell(row, name):
    """'0.061 ± 0.004' in the table's unit: mean and sample standard deviation over seeds."""
    (_, factor, digits), values = METRICS[name.split("-")[0]], row.get(name, [])
    shown = ([np.mean(values)] if values else []) + ([np.std(values, ddof=1)] if values[1:] else [])
    return " ± ".join(f"{x * factor:.{digits}f}" for x in shown)


def markdown(rows, notes=()):
    """{label: {figure: values over seeds}} as a markdown table, a line a figure, the published values beside it."""
    table, order = [["", *rows, *PUBLISHED]], list(METRICS)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    for name in sorted(names, key=lambda name: order.index(name.split("-")[0])):
        figure, _, where = name.partition("-")  # of which view, and when
        table.append([METRICS[figure][0] + f" ({where})" * bool(where), *(cell(row, name) for row in rows.values()),
                      *(said.get(name, "") for said in PUBLISHED.values())])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"| {' | '.join(x.rjust(width) for x, width in zip(line, widths))} |" for line in table]
    return "\n".join([lines[0], "|---" * len(widths) + "|", *lines[1:], "", *(f"- {note}" for note in notes), ""])


def load_clip(folder):
    """folder/prediction.npz with all that scores and baselines need, checked."""
    clip = read_npz(path := folder / "prediction.npz")
    try:
        clip = data.check_clip(clip, ("observed", "rgb", "truth", "pose", "observed_opening", "true_gripper_in_ref",
                                      "true_opening") + ("view_in_ref",) * ("points" in clip))
        if "gripper" in clip:
            clip["gripper"] = data.canonical(clip["gripper"], "mask", "'gripper'")
            if clip["gripper"].shape != clip["rgb"].shape[:4]:
                raise ValueError(f"'gripper' has shape {clip['gripper'].shape}, expected {clip['rgb'].shape[:4]}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return clip


def compare(methods, out, network=None, run=None):
    """Scores methods {label: [{name: folder} of one seed, ...]} and baselines on the first's clips; writes results."""
    def clips_of(label, folders, make):
        for name, folder in tqdm(folders.items(), desc=f"scoring {label}", unit="clip"):
            clip = load_clip(folder)
            if make is not tracked:
                clip.pop("gripper", None)  # the method's
            yield name, *make(clip)

    first, *_ = next(iter(methods.values()))
    jobs = [(label, folders, tracked) for label, seeds in methods.items() for folders in seeds]
    jobs += [(label, first, make) for label, make in baselines(run).items()]
    rows, per_clip = {}, {}
    for label, folders, make in jobs:
        scores, row = score_row(clips_of(label, folders, make), network)
        per_clip.setdefault(label, []).append(scores)
        for figure, value in row.items():
            rows.setdefault(label, {}).setdefault(figure, []).append(value)
    write_results(out, "results", dict(rows=rows, per_clip=per_clip), markdown(rows, [
        f"{len(first)} clips; ±: standard deviation over seeds; n: the reference view, m: others; moving: by over "
        f"{1000 * data.MOVED:.0f} mm; unchanged: surface and colour.",
        f"Tracked: of the frames that show the hand, within {100 * TRACKED[0]:.0f} cm and {TRACKED[1]} degrees. Still "
        "pixels: median, after each view's rigid drift. The repeated frame is told the true cameras.",
        f"FVD of {len(first)} clips is far above its value for many: compare rows only." if network else
        "FVD, MMD: --i3d FILE; `hf download flateon/FVD-I3D-torchscript i3d_torchscript.pt` gets the file (25 MB)."]))


def write_results(out, name, values, text):
    """NAME.json and NAME.md, which is printed too."""
    write_json(out / f"{name}.json", values)
    with data.writing(out / f"{name}.md") as partial:
        partial.write_text(text)
    print(f"{text}\nwritten: {out}/{name}.json, {name}.md")


def sample_clips(run, folder, count, out, seed, views, frames, steps):
    """Samples held-out clips 0..count-1, numbered as by sample.py --clip: {name: folder below out}."""
    clips = data.Clips(folder, "test", (run.model.preset.height, run.model.preset.width), views, frames)
    if not clips.held_out:
        print(f"{folder} has episodes of one split only: the clips are not held out")
    made = {f"clip_{i:03d}": out / f"clip_{i:03d}" for i in range(count)}
    for i, path in enumerate(tqdm(made.values(), desc=f"sampling {out}", unit="clip")):
        prediction = sample.predict(run, clips.clip(i), frames=frames, steps=steps, seed=1000 * seed + i)
        write_npz(path / "prediction.npz", prediction)
    return made


# the four rows of the paper's table, as flags of train.py
ABLATION = {"ours": [], "w/o MV attention": ["--mv_attention", "none"], "SVD": ["--rgb_only", "--mv_attention", "none"],
            "SVD w/ MV attention": ["--rgb_only", "--mv_attention", "rgb"]}


def train_ablation(task, folder, run, seeds, flags=()):
    """Trains each row with each seed at the same budget, on the same codes: {label: run folders}. Each is a plain
    `python train.py`, which goes on where it was, and returns at once if it was done."""
    runs = {label: [] for label in ABLATION}
    for seed in seeds:
        for label, switches in ABLATION.items():
            out = run / "ablation" / f"{re.sub(r'[^a-z]+', '_', label.lower())}_seed_{seed}"
            words = "--task", task, "--data", folder, "--out", out, "--vae", run, "--seed", seed, *switches, *flags
            print("ablation: train.py", *words, flush=True)
            script = Path(__file__).with_name("train.py")
            if subprocess.run([sys.executable, *map(str, (script, *words))]).returncode:
                raise ValueError(f"--ablation: train.py stopped in {out} (see above)")
            runs[label].append(out)
    return runs


# ------------------------------------ closed loop

ROLLOUT_SEED = 1_000_000    # worlds of rollouts count from here; training episodes are numbered from 0
ASTRAY = 0.05               # m from the script's path at which a hand counts as having left it
STRIDE = data.HZ // data.CLIP_HZ  # steps of the world per frame of a clip
LIMIT = 30                  # frames that a try may last: fifteen seconds
CANDIDATES = 16             # cameras of which a try takes those that see most of the hand
FAILURES = ("generation", "tracking", "execution")
PUBLISHED_SUCCESS = {1: ".73", 2: ".67", 3: ".53"}


def place_cameras(world, draw, size, views=2):
    """Cameras that no episode was filmed with: intrinsics (V,3,3), cam_in_world (V,4,4). As a person would, each is
    chosen among random ones to show most of the hand in that frame of the script in which those before it show least.
    """
    world, script, seen, chosen = copy.deepcopy(world), world.demonstration, [], []
    tips = script[0][..., :3, 3] + data.TCP * script[0][..., :3, 2]
    intrinsics, cam_in_world = data.sample_cameras(draw, tips, size, CANDIDATES)
    small = data.scale_intrinsics(intrinsics, size, (32, 40)), cam_in_world, (32, 40)
    for t, step in enumerate(zip(*script)):
        world.step(*step)
        if t % STRIDE == 0:
            seen.append(world.observe(*small)["observed_gripper"].sum((2, 3)).T)
    seen = np.array(seen)  # (frames, arms, cameras)
    for _ in range(views):
        shown = {c: seen[..., [*chosen, c]].max(-1) for c in range(CANDIDATES) if c not in chosen}
        chosen.append(max(shown, key=lambda c: (shown[c].min(), shown[c].sum())))
    return intrinsics[chosen], cam_in_world[chosen]


def scripted_future(world, step, cameras, size, frames=10):
    """The clip of a perfect generator: the script played on from `step`, in a copy of the world as it is."""
    clip, world = world.observe(*cameras, size), copy.deepcopy(world)
    script, video, path = list(zip(*world.demonstration)), [], [(world.gripper_in_world, world.opening)]
    for t in range(step + 1, step + 1 + frames * STRIDE):
        world.step(*script[min(t, len(script) - 1)])
        if (t - step) % STRIDE == 0:
            video.append(world.film(*cameras, size)[:2])
            path.append((world.gripper_in_world, world.opening))
    rgb, depth = (np.stack(pictures, 1) for pictures in zip(*video))  # (V, T, H, W[, 3])
    gripper_in_world, opening = map(np.stack, zip(*path))
    points, valid = data.point_maps(depth, cameras[0][:, None])
    world_in_ref = invert(cameras[1][0])
    view_in_ref = world_in_ref @ cameras[1]
    return clip | dict(rgb=rgb, points=transform(points, view_in_ref), valid=valid, view_in_ref=view_in_ref,
                       true_gripper_in_ref=world_in_ref @ gripper_in_world, true_opening=opening)


def predict_in_turn(run, world, step, cameras, size, frames=10, steps=None):
    """One clip a camera, each of them the reference once: of the same future, and their errors differ."""
    turns = [[np.roll(values, -v, axis=0) for values in cameras] for v in range(len(cameras[1]))]
    return [sample.predict(run, world.observe(*views, size), frames=frames, steps=steps, seed=step) for views in turns]


def execute(world, path, first, t):
    """Moves the hands from where they are to frame t of a tracked path that began when they were at `first`
    (A, 4, 4), in straight lines, at the world's rate. A hand that is lost there heads for where it is found next.

    Only the motion since the observed frame is used, in each hand's own frame: no camera pose. Closed fingers close
    until they are stopped. Those that open by more than 3 mm do so before the hand moves on: half a second can hold a
    release and a departure."""
    start, width = world.gripper_in_world, np.array(world.opening)
    targets = first @ invert(path["gripper_in_ref"][0]) @ path["gripper_in_ref"]  # (F, A, 4, 4)
    goal, opening = start.copy(), width.copy()
    for a, lost in enumerate(path["lost"][t:].T):  # (F - t,)
        if not lost.all():
            ahead = np.argmin(lost)  # frames
            goal[a] = data.between(start[a], targets[t + ahead, a], 1 / (1 + ahead))
            if not ahead:
                opening[a] = 0 if path["closed"][t, a] else path["opening"][t, a]
    even, release = np.arange(1, STRIDE + 1)[:, None] / STRIDE, opening - width > 0.003
    hand, fingers = np.where(release, 2 * even - 1, even).clip(0), np.where(release, 2 * even, even).clip(max=1)
    for share, wide in zip(hand, width + fingers * (opening - width)):  # (A,), (A,)
        world.step(np.stack([data.between(*arm) for arm in zip(start, goal, share)]), wide)


def rollout(task, seed, size, imagine, generated, views=2, acted=10):
    """One try: observe, imagine, track, act on the first `acted` frames and, as a robot that stays sees the same again,
    on those after them until it has done something, and so on; it knows its arm's last link. 'success', or what failed
    first:

    tracking    the track left the script's path by more than 5 cm while lost, or in a true video;
    generation  it did so in a generated video, and was not lost while it was astray;
    execution   the hand followed the script, and still the object is not where it belongs.
    imagine(world, step, cameras, size) -> clips with a prediction each, of one future."""
    world, failure = data.World(task), None
    world.reset(seed)
    script = world.demonstration[0]
    cameras = place_cameras(world, np.random.default_rng([task, seed, 2]), size, views)
    hand, frame = track.hand_model(link=data.WRIST), 0
    while frame < LIMIT:
        paths = [track.track(clip, model=hand) for clip in imagine(world, frame * STRIDE, cameras, size)]
        path = track.joined(paths) if len(paths) > 1 else paths[0]
        first, opening = world.gripper_in_world, np.array(world.opening)
        for count in range(1, 1 + min(len(path["lost"]) - 1, LIMIT - frame)):
            execute(world, path, first, count)
            way = pose_errors(world.gripper_in_world, first)[0]  # (A,)
            if count >= acted and (way.max() > data.MOVED or np.abs(world.opening - opening).max() > track.EVENT):
                break
        else:
            count = acted
        if world.success():
            return "success"
        now = np.minimum(STRIDE * (frame + 1 + np.arange(count)), len(script) - 1)
        in_first, lost = invert(path["gripper_in_ref"][0]) @ path["gripper_in_ref"], path["lost"][1:count + 1]
        astray = pose_errors(first @ in_first[1:count + 1], script[now])[0] > ASTRAY  # (count, A)
        if failure is None and astray.any():
            failure = "generation" if generated and not (astray & lost).any() else "tracking"
        frame += count
    return failure or "execution"


def rollouts(run, task, count, out, views, acted, frames, steps):
    """Success of a run and of the oracle on the same worlds, with Wilson's interval; writes rollouts.json and .md."""
    from scipy.stats import binomtest
    if run.model.rgb_only:
        raise ValueError(f"{run.folder} generates RGB only: --rollout needs points to track")
    ours = lambda *now: predict_in_turn(run, *now, frames, steps)
    imagine = {"ours": ours, "oracle: the true future": lambda *now: [scripted_future(*now, frames)]}
    outcomes, size = {label: [] for label in imagine}, (run.model.preset.height, run.model.preset.width)
    for i in tqdm(range(count), desc="rollouts", unit="try"):
        for label, found in outcomes.items():
            found.append(rollout(task, ROLLOUT_SEED + i, size, imagine[label], label == "ours", views, acted))
        write_json(out / "rollouts.json", outcomes)  # what an interrupted command leaves
    lines = [f"| | success | Wilson 95 % | failed: {' | failed: '.join(FAILURES)} |", "|---" * 6 + "|"]
    for label, found in outcomes.items():
        won, failed = found.count("success"), " | ".join(str(found.count(reason)) for reason in FAILURES)
        low, high = binomtest(won, count).proportion_ci(method="wilson")
        lines.append(f"| {label} | {won}/{count} = {won / count:.2f} | {low:.2f}-{high:.2f} | {failed} |")
    lines += [f"| *paper: ours, 30 rollouts* | {PUBLISHED_SUCCESS[task]} | | | | |", "",
              f"- task {task}, {data.size_text(size)}, {views} views, each once the reference of a look, {acted} or "
              f"more of {frames} frames acted on", ""]
    write_results(out, "rollouts", outcomes, "\n".join(lines))


# ------------------------------------ commands

USELESS = {"predictions": "task data run clips views frames steps seeds execute", "rollout": "data clips seeds i3d",
           "ablation": "execute", "evaluation": "execute"}  # by what is done


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, command = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--task", type=int, choices=data.TASKS, help="; ".join(f"{n} {task.name}" for n, task in data.TASKS.items()))
    command.add_argument("--predictions", metavar="DIR", help="score every prediction.npz below DIR; an array gripper "
                         "(V,T,H,W) in it, from SAM 2, say, takes the place of the tracker's masks")
    command.add_argument("--ablation", nargs=argparse.REMAINDER, help="train and score the paper's four rows; what "
                         "follows are flags of train.py, such as --minutes 30")
    command.add_argument("--rollout", type=int, metavar="N", help="N closed-loop tries")
    add("--run", help="folder that train.py wrote [runs/task_N]")
    add("--data", help="packed episodes [data/task_N]")
    add("--out", help="folder of results [RUN/evaluation, /ablation, /rollout; DIR]")
    add("--clips", type=int, help="held-out clips to sample and score [24]")
    add("--views", type=int, help="views of a clip; the first is the reference, of tries each in turn [2]")
    add("--frames", type=int, help="frames to predict, two a second [10]")
    add("--steps", type=int, help="steps of the sampler [1 of the small presets, 8 of svd]")
    add("--seeds", type=int, nargs="+", help="of the sampler's noise, and of the training with --ablation [0 1]")
    add("--i3d", metavar="FILE", help="TorchScript I3D, for FVD and MMD")
    add("--execute", type=int, metavar="K", help="with --rollout: act on K frames or more, look again [--frames]")
    args = parser.parse_args()
    args.mode = next((mode for mode in list(USELESS)[:3] if getattr(args, mode) is not None), "evaluation")
    for name, value in vars(args).items():
        if value is not None and name in USELESS[args.mode].split():
            raise ValueError(f"--{name} does nothing for {args.mode}: leave it out")
        if type(value) is int and value < (least := 1 + (name == "views")):
            raise ValueError(f"--{name} {value}: at least {least} is needed")
    args.views, args.frames, args.seeds = args.views or 2, args.frames or 10, args.seeds or [0, 1]
    args.execute = args.execute or args.frames
    if args.execute > args.frames:
        raise ValueError(f"--execute {args.execute}: only {args.frames} frames are predicted (--frames)")
    if not args.predictions and not args.task:
        raise ValueError("say --task N, or --predictions DIR")
    return args


def load(folder):
    return sample.load_run(folder, *sample.fastest(sample.read_info(folder)["preset"]["clip"]))


def main():
    args = parse()
    i3d = load_i3d(args.i3d)  # first: what follows may train for hours
    if args.mode == "predictions":
        top = Path(args.predictions)
        found = {str(path.parent.relative_to(top)): path.parent for path in sorted(top.rglob("prediction.npz"))}
        if not found:
            raise ValueError(f"--predictions {top}: no prediction.npz anywhere below it")
        return compare({top.name or "predictions": [found]}, Path(args.out or top), i3d)
    run, folder = Path(args.run or f"runs/task_{args.task}"), Path(args.data or f"data/task_{args.task}")
    out = Path(args.out or run / args.mode)
    if args.mode == "rollout":
        return rollouts(load(run), args.task, args.rollout, out, args.views, args.execute, args.frames, args.steps)
    runs, methods = {"ours": [run] * len(args.seeds)}, {}
    if args.mode == "ablation":
        runs = train_ablation(args.task, folder, run, args.seeds, args.ablation)
    for label, trained in runs.items():
        for path, seed in zip(trained, args.seeds):
            target = (out if path == run else path / "evaluation") / f"seed_{seed}"
            methods.setdefault(label, []).append(sample_clips(
                load(path), folder, args.clips or 24, target, seed, args.views, args.frames, args.steps))
    compare(methods, out, i3d, load(runs["ours"][0]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"evaluate.py: {str(error) or 'interrupted'}")
