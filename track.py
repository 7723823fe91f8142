"""The gripper's path out of a 4D video: render the hand, fit it by ICP, and say "lost" when it does not fit.

    python track.py --prediction runs/task_1/samples/NAME/prediction.npz   # trajectory.npz, overlay.gif
    python track.py --prediction P.npz --init mask                         # first pose from the observed masks
    python track.py --prediction P.npz --hand hand.obj --finger finger.obj # CAD meshes, not the built-in hand
    python track.py --prediction P.npz --object box.obj                    # another rigid thing, from its masks
    python track.py --episode data/task_1/NAME --cameras 13 14             # true pointmaps, and how far off

Letters   K hypotheses, N model points, M scene points, L look-ups (a hypothesis' point in a view), R starts of a
          search, O openings that are tried, V views, F = 1 observed + T predicted frames, A arms, H W pixels
Frames    ref: the reference camera (view 0); gripper: Franka's hand frame (z out of the palm, fingers slide along y)
Units     metres, seconds, pixels, degrees where said so; evidence is counted in model points

References: Besl and McKay 1992 (ICP); Chen and Medioni 1991 (point-to-plane); Tukey's biweight; Viterbi 1967;
FoundationPose, arXiv 2312.08344, which the paper uses here and which gives no word when it is lost.
"""
import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt, maximum_filter, median_filter, minimum_filter
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import data
from data import gripper_mesh, invert, load_mesh, pose_errors, rasterize, rigid_fit, transform, unproject
from sample import write_film

STROKE = 0.08                          # m, the hand's widest opening
WIDTHS = np.linspace(0, STROKE, 33)    # m, the openings that are tried
HALF_TURN = np.diag([-1.0, -1, 1, 1])  # about the approach axis: the hand onto itself, fingers swapped

# Tuned on recorded episodes; WELL and MIN_FIT also on synthetic ones at 64 x 80 and on the soft hands of a tiny model,
# NOISY, BARED, CHANGE and BLUR also on what a small model makes of the test scenes, which README scores, HELD on its
# first 20 closed loops
AGREE = 0.012                          # m along the ray: model and measurement are one surface; a finger's, half
NOISY = 1e-5                           # m: depth that fluctuates more is a generator's, and is mended
SIGMAS, STILL = 3, 0.0009              # of that fluctuation, and m: what changed by less is scenery
DRIFT, BARED = 0.05, 0.03              # m that a generated view may be off as a whole, and what comes to light in it
FLANGE = 0.09                          # m around the flange, behind the hand: what is there turns with it, a Franka's
SAMPLE = 4000                          # scene points, at most, that a fit uses
VOXEL, SEARCHED = 0.03, 60             # m and model points, of the search: as fine as ICP needs it
REACH, TURN = 0.3, 45                  # m and degrees a hand goes in half a second; twice as many seldom
PLACES = 16                            # the search hands to ICP without a turn; 2 of each turn, 1 of a large one
ROUNDS = (0.06, 19), (0.03, 12), (0.015, 3)  # m that a correspondence reaches in each round of ICP, and places left
FINE = ROUNDS[-1][0]
WIDE = 6                               # times as many places are left while a first pose is looked for, turned anyhow
SLIP = 0.1                             # resistance to sliding along the planes of a fit; a third in the last one
THROUGH = 5                            # points that one weighs which a camera looks through: occlusion is common
TRAVEL = 0.15, 30, 10                  # so many m or degrees from where a hand is expected cost so many points
MIN_AGREE, MIN_SHARE = 30, 0.75        # of a believed pose: points that agree, and their share of those in view
MIN_SCORE = 0.55, 0.7                  # its score a point in view; the same after a loss
MIN_FIT = 0.33                         # its score a point in view times how near measured points are; more in noise
WELL = 0.8, 0.3                        # score a point in view, share in view: needs no search
CHANGE = 3, 10                         # points that moving fingers cost while the hand rests, and while it moves
BLUR = 0.03                            # m in a frame: fingers of a generated hand that moves faster are not listened to
HELD = 6, 2, 0.1                       # points for what was held, if still there, if gone; share seen that is neither
EVENT = 0.007                          # m, the fingers' way beyond which they have closed or opened


# ------------------------------------------------------------------------------------------------------- the model

def sample_surface(vertices, faces, count):
    """`count` points (count,3) spread evenly over a mesh, and their outward normals (corners counter-clockwise)."""
    corners = vertices[faces]                                # (faces,3,3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area, draw = np.linalg.norm(normals, axis=1), np.random.default_rng(0)
    share = (np.arange(count) + draw.random(count)) / count  # one draw in each of `count` equal shares of the area
    face = np.searchsorted(np.cumsum(area) / area.sum(), share).clip(max=len(faces) - 1)
    points = (draw.dirichlet((1, 1, 1), count)[..., None] * corners[face]).sum(1)
    return points, normals[face] / area[face, None]


def make_model(bodies, counts, link=FLANGE):
    """Surface points of bodies (vertices, faces, slide) that slide along y as the hand opens.

    slide = dy / d(opening): 0 for the hand, +1/2 and -1/2 for the fingers. Returns a namespace: points, normals (N,3)
    at opening 0, slide (N,), mount (N,) bool: see add_mount; link: see hand_model; vertices, faces, vertex_slide of all
    as one mesh; reach, m, of the farthest point; spacing, m, between points.
    """
    points, normals = map(np.concatenate, zip(*(sample_surface(v, f, n) for (v, f, _), n in zip(bodies, counts))))
    vertices, faces = data.merge(*((v, f) for v, f, _ in bodies))
    slides = [slide for _, _, slide in bodies]
    return SimpleNamespace(points=points, normals=normals, slide=np.repeat(slides, counts),
                           mount=np.zeros(len(points), bool), link=link, vertices=vertices, faces=faces,
                           vertex_slide=np.repeat(slides, [len(v) for v, _, _ in bodies]),
                           reach=np.linalg.norm(points, axis=1).max() + max(slides) * STROKE,
                           spacing=2 * cKDTree(points).query(points, 2)[0][:, 1].mean())


def hand_model(hand=None, finger=None, link=FLANGE):
    """The gripper; from two mesh files (metres, hand frame; the left finger at opening 0), or the built-in one. link:
    so much of the arm behind its flange turns with it, m."""
    if (hand is None) != (finger is None):
        raise ValueError("--hand and --finger: give both mesh files, or neither")
    parts = {"hand": load_mesh(hand), "finger": load_mesh(finger)} if hand else gripper_mesh()
    (palm, palm_faces), (left, left_faces) = parts["hand"], parts["finger"]
    right = left @ HALF_TURN[:3, :3]
    bodies = (palm, palm_faces, 0.0), (left, left_faces, 0.5), (right, left_faces, -0.5)
    return make_model(bodies, [500, 150, 150], link)


def part(model, keep=slice(None), step=1):
    """The model with only every step-th of the points that `keep` chooses."""
    points = {key: vars(model)[key][keep][::step] for key in ("points", "normals", "slide", "mount")}
    return SimpleNamespace(**vars(model) | points | dict(spacing=model.spacing * np.sqrt(step)))


def at_opening(model, opening):
    """The model's points (K,N,3), in the gripper frame, at each opening (K,)."""
    points = np.repeat(model.points[None], len(opening), 0)
    points[..., 1] += np.asarray(opening)[:, None] * model.slide
    return points


def add_mount(model, scene, pose, opening):
    """The model with what is fixed to its flange, as the observed scene shows it: the arm's last link turns with the
    hand. Without it the arm's points, which no mesh explains, pull the hand's edge towards them."""
    if not model.slide.any() or (cloud := nearby(scene, pose[:3, 3], model.link)) is None:
        return model
    points = transform(cloud.data, invert(pose))  # in gripper
    away = cKDTree(at_opening(model, [opening])[0]).query(points)[0]
    close = np.flatnonzero((np.linalg.norm(points, axis=1) < model.link) & (points[:, 2] < 0) & (away > AGREE))
    cells = np.floor(points[close] / model.spacing).astype(int)
    one = close[np.unique(cells, axis=0, return_index=True)[1]]   # of each cell, as even as the mesh's
    around, points = points[cloud.query(cloud.data[one], 9)[1]], points[one]
    normals = np.linalg.svd(around - around.mean(1, keepdims=True))[2][:, 2]                 # where they vary least
    normals *= np.sign((normals * (points + (0, 0, model.link / 2))).sum(1, keepdims=True))  # outwards
    return SimpleNamespace(**vars(model) | dict(
        points=np.concatenate([model.points, points]), normals=np.concatenate([model.normals, normals]),
        slide=np.append(model.slide, np.zeros(len(one))), mount=np.append(model.mount, np.ones(len(one), bool))))


def held_by(model, scene, mask, pose, opening):
    """What a hand holds in the observed scene, as a model of its own: the measured points under `mask` (V,H,W), in the
    gripper's frame. None where the fingers are wide open, or it is not at their tips."""
    view, row, column = np.nonzero(mask & (scene.depth > 0))
    points = scene.points[view, row, column].astype(float)
    in_gripper, tips = transform(points, invert(pose)), (0, 0, model.points[:, 2].max())
    if opening > STROKE - EVENT or not (np.linalg.norm(in_gripper - tips, axis=1) < FLANGE / 2).any():
        return None
    one = np.unique(np.floor(in_gripper / model.spacing).astype(int), axis=0, return_index=True)[1]
    around = points[cKDTree(points).query(points[one], min(9, len(points)))[1]].reshape(len(one), -1, 3)
    normals = np.linalg.svd(around - around.mean(1, keepdims=True))[2][:, 2]
    towards = scene.view_in_ref[view[one], :3, 3] - points[one]  # the camera that saw it
    normals *= np.sign((normals * towards).sum(1, keepdims=True))
    return SimpleNamespace(points=in_gripper[one], normals=normals @ pose[:3, :3], slide=np.zeros(len(one)),
                           mount=np.zeros(len(one), bool), spacing=model.spacing)


# ------------------------------------------------------------------------------------------------------------- ICP

def gauss_newton(source, target, normal, weight, centre, slip):
    """One step (K,4,4) of min sum w (n.e)^2 with e = target - (source moved), all (K,N,3): a turn about `centre` (K,3),
    then a shift. slip: damping (Levenberg) as a share of the points' inertia and mass, for planes alone let slide."""
    arm = source - centre[:, None]
    J = np.concatenate([np.cross(arm, normal), normal], -1)           # (K,N,6)
    Jw, r = (J * weight[..., None]).mT, ((target - source) * normal).sum(-1)
    inertia, mass = np.einsum("kn,kni,kni->k", weight, arm, arm), weight.sum(1)
    damping = slip * np.stack([inertia] * 3 + [mass] * 3, -1) + 1e-9  # (K,6)
    x = np.linalg.solve(Jw @ J + damping[:, None] * np.eye(6), Jw @ r[..., None])[..., 0]
    turn = Rotation.from_rotvec(x[:, :3]).as_matrix()
    return data.pose(centre + x[:, 3:] - (turn @ centre[..., None])[..., 0], turn)


def icp(source, target, target_normals=None, init=None, max_correspondence_distance=0.02, max_iteration=30, *,
        source_normals=None, weight=None, slip=0.0, tree=None):
    """Iterative closest point from one or many starting poses at once, with Tukey's weights.

    source (N,3), or (K,N,3) one set a start; target (M,3); init (4,4) or (K,4,4) [identity]. Planes are those of
    source_normals if given (a rendered model's have no noise), else of target_normals; with neither it is
    point-to-point. weight (N,) or (K,N); tree: target's cKDTree. Returns transformation (4,4), source to target; and
    before its last step fitness, inliers / points in the source, and inlier_rmse, m; of K starts all with a leading K.
    """
    source, target = np.asarray(source, float), np.asarray(target, float)
    T = np.array(np.eye(4) if init is None else init, float).reshape(-1, 4, 4)
    source = np.broadcast_to(source, (len(T), *source.shape[-2:]))
    weight = np.broadcast_to(1.0 if weight is None else weight, source.shape[:2])
    used, tree = weight > 0, tree or cKDTree(target, balanced_tree=False)
    distance, index, passed = np.full(weight.shape, np.inf), np.zeros(weight.shape, int), []
    for _ in range(max_iteration):
        moved = source @ T[:, :3, :3].mT + T[:, None, :3, 3]  # (K,N,3)
        distance[used], index[used] = tree.query(moved[used], distance_upper_bound=max_correspondence_distance)
        inlier = distance < max_correspondence_distance
        partner, near = np.where(inlier, index, 0), (distance / max_correspondence_distance).clip(max=1)
        w, pair = weight * (1 - near**2)**2, (moved, target[partner])
        if source_normals is None and target_normals is None:
            step = rigid_fit(*pair, np.maximum(w, 1e-12))
        else:
            normal = target_normals[partner] if source_normals is None else source_normals @ T[:, :3, :3].mT
            step = gauss_newton(*pair, normal, w, T[:, :3, 3], slip)
        step[w.sum(1) <= 0] = np.eye(4)
        passed.append(T)
        T = step @ T  # R' = dR R; the origin moves by dt
        if any(np.abs(T - old).max() < 1e-6 for old in passed[::-1]):  # a micron: it stays, or goes round in a circle
            break
    fitness = inlier.sum(1) / used.sum(1).clip(1)
    inlier_rmse = np.sqrt((np.where(inlier, distance, 0)**2).sum(1) / inlier.sum(1).clip(1))
    return (T, fitness, inlier_rmse) if np.ndim(init) == 3 else (T[0], float(fitness[0]), float(inlier_rmse[0]))


# ---------------------------------------------------------------------------------------------- one frame of the video

def make_scene(depth, intrinsics, view_in_ref, noise=0.0, still=False):
    """One frame: depth (V,H,W) m, 0 where nothing is measured; noise (V,) m of it; still (V,H,W), what is scenery.

    Returns a namespace of these and points (V,H,W,3) in ref; near (V,H,W) m, the least depth next to each pixel;
    candidates: view, row, column (M,) of what is measured and no scenery; views: those that measure anything.
    """
    noise, still = np.broadcast_to(noise, len(depth)), np.broadcast_to(still, depth.shape)
    near = [minimum_filter(np.where(d > 0, d, np.inf), 5 if sigma > NOISY else 3) for d, sigma in zip(depth, noise)]
    points = transform(unproject(depth, intrinsics.astype(np.float32)), view_in_ref.astype(np.float32))
    return SimpleNamespace(depth=depth, intrinsics=intrinsics, view_in_ref=view_in_ref, ref_in_view=invert(view_in_ref),
                           noise=noise, still=still, near=np.stack(near), points=points,
                           candidates=np.nonzero((depth > 0) & ~still), views=np.flatnonzero(depth.any((1, 2))))


def change_of(depth, observed):
    """How much (H,W) m a view's depth has changed, inf where it is not known, and the noise in that, m.

    A hole of one pixel in what was observed is known to lie between its neighbours.
    """
    known = observed > 0
    low = np.where(known, observed, minimum_filter(np.where(known, observed, np.inf), 3))
    high = np.where(known, observed, maximum_filter(observed, 3))
    change = np.where((depth > 0) & (high > 0), np.maximum(0, np.maximum(low - depth, depth - high)), np.inf)
    quiet = change[change < DRIFT]
    return change, 1.48 * np.median(quiet) if len(quiet) else 0.0  # of a normal distribution, its sigma


def read_frame(points, valid, observed, here):
    """The scene of one predicted frame: points (V,H,W,3) in ref, valid (V,H,W); `here` (V,H,W), where hands were, and
    what they held.

    Scenery is what has not changed, and what comes to light and goes on from that, which a generator can but guess. It
    does not move: where a generator drew the depth, the rigid motion that takes it back to the observed points is the
    view's drift. A pixel's point lies on its ray: what is beside it is noise, as is what differs from the 3 x 3 median.
    """
    depth, noise, still = np.zeros(valid.shape, np.float32), np.zeros(len(valid)), np.zeros(valid.shape, bool)
    for v, ref_in_view in enumerate(observed.ref_in_view):
        z = transform(points[v], ref_in_view.astype(np.float32))[..., 2] * valid[v]
        change, noise[v] = change_of(z, observed.depth[v])
        if noise[v] > NOISY:
            quiet = np.flatnonzero((change < DRIFT) & (observed.depth[v] > 0))
            quiet = quiet[::-(-len(quiet) // SAMPLE)]
            source, target = (x[v].reshape(-1, 3)[quiet].astype(float) for x in (points, observed.points))
            drift = np.eye(4)
            for _ in range(5):  # Tukey's weights, which end at four medians
                off = np.linalg.norm(transform(source, drift) - target, axis=1)
                drift = rigid_fit(source, target, (1 - (off / np.median(off) / 4).clip(max=1)**2)**2)
            z = transform(points[v], (ref_in_view @ drift).astype(np.float32))[..., 2]
            nearest = distance_transform_edt(~valid[v], return_distances=False, return_indices=True)
            z = median_filter(z[tuple(nearest)], 3) * valid[v]  # in holes the nearest value
            change, noise[v] = change_of(z, observed.depth[v])
        if SIGMAS * noise[v] > DRIFT:  # tells no pose from another
            z = 0 * z
        depth[v], tolerance = z.clip(0), max(SIGMAS * noise[v], STILL)
        still[v] = (change < tolerance) & ~here[v]
        bare = depth[v] > observed.depth[v] + max(AGREE, tolerance)
        tolerance = max(tolerance, BARED) if noise[v] > NOISY else tolerance
        still[v] |= bare & (continues(depth[v], still[v], bare, tolerance)
                            | continues(depth[v].T, still[v].T, bare.T, tolerance).T)
    return make_scene(depth, observed.intrinsics, observed.view_in_ref, noise, still)


def continues(depth, still, bare, tolerance):
    """Which pixels (H,W) of rows with `bare` ones lie in line with the scenery on both sides: planes are linear in
    1 / depth. There the scenery goes on that something hid before."""
    line = np.zeros(depth.shape, np.float32)
    for y in np.flatnonzero(bare.any(1) & still.any(1)):
        x = np.flatnonzero(still[y])
        line[y] = np.interp(np.arange(depth.shape[1]), x, 1 / depth[y, x], 0, 0)
    return np.abs(1 / np.maximum(line, 1e-3) - depth) < tolerance


def look_up(scene, v, points):
    """Points (...,3) in ref -> their pixels y, x in view v (clipped into the image), z, and whether they are in it."""
    H, W = scene.depth.shape[1:]
    seen = (scene.intrinsics[v] @ scene.ref_in_view[v, :3]).astype(np.float32)  # ref -> pixels times z
    pixel = points.astype(np.float32) @ seen[:, :3].T + seen[:, 3]
    z = pixel[..., 2]
    x, y = (np.floor(pixel[..., i] / np.maximum(z, 1e-3) + 0.5) for i in (0, 1))
    inside = (z > 1e-3) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    return y.clip(0, H - 1).astype(np.int32), x.clip(0, W - 1).astype(np.int32), z, inside


def nearby(scene, centre, radius):
    """The cKDTree of at most SAMPLE points that are measured and no scenery, in the cube of half width `radius` around
    `centre`; None if they are < MIN_AGREE."""
    points = scene.points[scene.candidates]
    for i in range(3):  # axis by axis, which is many times faster
        points = points[np.abs(points[:, i] - float(centre[i])) < radius]
    return cKDTree(points[::-(-len(points) // SAMPLE)]) if len(points) >= MIN_AGREE else None


def compare(model, scene, poses, opening, slack=0.0, fingers=False):
    """Render K hypotheses into all views and hold them against the measured depth.

    The mesh is drawn as its sample points through a z-buffer with cells as large as their spacing.
    poses (K,4,4) gripper_in_ref, opening (K,); slack, m: for poses still rough; fingers: judge these, finely.
    Returns a namespace: points (K,N,3) in ref; visible (K,N), facing some camera with nothing of the hand before it;
    shown (K,N), of these what the scene does not hide; and, counted in points over all views, (K,) each: agree;
    through, looked through or on scenery; in_view, not hidden; score = agree - THROUGH * through, for an arm or the
    held object often hides the hand, and nearly never does one look through it; clear and blank, the shares of all that
    are in view and that are not measured. Nothing is said by what is not measured, by an outline, which when right is a
    pixel off as often as not, nor by the mount on scenery, for an arm that slides along itself looks the same.
    """
    K, (_, H, W) = len(poses), scene.depth.shape
    in_gripper = at_opening(model, opening)  # (K,N,3)
    points = (in_gripper @ poses[:, :3, :3].mT + poses[:, None, :3, 3]).astype(np.float32)
    outward = np.einsum("kni,ni->kn", in_gripper, model.normals)
    visible, shown, totals = np.zeros(outward.shape, bool), np.zeros(outward.shape, bool), np.zeros((5, K))
    for v in scene.views:
        away = scene.view_in_ref[v, :3, 3] - poses[:, :3, 3]
        camera = (away[:, None] @ poses[:, :3, :3])[:, 0]            # (K,3) in gripper
        pixel = np.linalg.norm(away[0]) / scene.intrinsics[v, 0, 0]  # its width on the hand, m
        k, n = np.nonzero(outward < camera @ model.normals.T)        # facing the camera: (L,)
        y, x, z, inside = look_up(scene, v, points[k, n])
        k, n, y, x, z = (a[inside] for a in (k, n, y, x, z))
        cell = max(1, round(1.5 * model.spacing / pixel))
        rows, columns = -(-H // cell), -(-W // cell)
        cells = (k * rows + y // cell) * columns + x // cell
        nearest = np.full(K * rows * columns, np.inf, np.float32)
        np.minimum.at(nearest, cells, z)
        front = z <= nearest[cells] + AGREE
        k, n, y, x, z = (a[front] for a in (k, n, y, x, z))
        blank, still = scene.depth[v, y, x] == 0, scene.still[v, y, x]
        gap = np.where(blank, np.nan, scene.depth[v, y, x] - z)                             # nan: says nothing
        noisy, coarse = scene.noise[v] > NOISY, pixel > AGREE / 3
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)) if coarse and not fingers else ():  # neighbours may speak
            at = v, (y + dy).clip(0, H - 1), (x + dx).clip(0, W - 1)
            better = (np.abs(scene.depth[at] - z) < np.abs(gap)) & (scene.depth[at] > 0) & ~scene.still[at]
            gap, still = np.where(better, scene.depth[at] - z, gap), still & ~better
        tolerance = max(AGREE / (1 + fingers), SIGMAS * scene.noise[v], pixel / 2)
        beside = scene.near[v, y, x] - z < tolerance                                        # something as near
        silent = beside & (noisy or coarse) if fingers else beside | (noisy & (model.slide[n] != 0))  # blurred away
        gap[(silent & (gap > tolerance)) | (still & model.mount[n])] = np.nan
        tolerance = max(tolerance, slack)
        close, hidden = np.abs(gap) < tolerance, gap < -2 * AGREE
        visible[k, n] = True
        shown[k[~hidden], n[~hidden]] = True
        totals += [np.bincount(k, what, K) for what in (np.where(close & ~still, 1 - (gap / tolerance)**2, 0),
                                                        (gap > tolerance) | (close & still), gap > -tolerance,
                                                        blank, z > 0)]
    agree, through, in_view, blank, every = totals
    clear, blank = (count / np.maximum(every, 1) for count in (in_view, blank))
    return SimpleNamespace(points=points, visible=visible, shown=shown, agree=agree, through=through, in_view=in_view,
                           clear=clear, blank=blank, score=agree - THROUGH * through)


# ------------------------------------------------------------------------------------------------------ the search

def all_rotations(count):
    """`count` rotations spread evenly over SO(3), (R,3,3): the super-Fibonacci spiral (Alexa 2022)."""
    i = np.arange(count) + 0.5
    r, R = np.sqrt(i / count), np.sqrt(1 - i / count)
    a, b = 2 * np.pi * i / np.sqrt(2), 2 * np.pi * i / 1.533751168755204288118041
    return Rotation.from_quat(np.stack([r * np.sin(a), r * np.cos(a), R * np.sin(b), R * np.cos(b)], 1)).as_matrix()


TURNS = all_rotations(600)  # about 30 degrees apart
ANGLES = np.degrees(data.rotation_angle(TURNS))
TURNS = [TURNS[:0], np.append(np.eye(3)[None], TURNS[ANGLES < TURN], 0), TURNS[(TURN <= ANGLES) & (ANGLES < 2 * TURN)]]


def search(model, scene, cloud, centre, radius, starts, peaks):
    """The `peaks[r]` likeliest shifts by up to `radius` of each of starts (R,4,4), around `centre` (3,): (K,4,4).

    Space is cut into voxels, which speak for a visible model point where a scene point is near, and against a point
    where a camera looks through. To shift the model by whole voxels is to read the same volume at an offset.
    """
    steps = int(np.ceil(radius / VOXEL))
    half = steps + int(np.ceil(model.reach / VOXEL)) + 1
    size, shifts = 2 * half + 1, 2 * steps + 1
    empty = np.ones((size, size, size), bool)
    empty[tuple(np.rint((cloud.data - centre) / VOXEL).astype(int).T + half)] = False
    away, free = distance_transform_edt(empty), np.zeros(empty.size, bool)
    grid = (np.stack(np.indices(empty.shape), -1).reshape(-1, 3) - half) * VOXEL + centre
    for v in scene.views:
        y, x, z, inside = look_up(scene, v, grid)
        gap = np.where(inside & (scene.depth[v, y, x] > 0), scene.depth[v, y, x] - z, -np.inf)
        free |= (gap > VOXEL) | (scene.still[v, y, x] & (gap > -VOXEL))
    free = free.reshape(empty.shape) & (away > 1)
    volumes = [np.append(value, np.zeros(size**2)).astype(np.int16) for value in         # in hundredths of a point:
               (np.where(free, -100, 0), np.where(free, -200, 100 * np.exp(-away**2)))]  # of a hidden, a visible one
    seen = compare(part(model, step=len(model.points) // SEARCHED), scene, starts, np.zeros(len(starts)))
    corners = np.rint((seen.points - centre) / VOXEL).astype(int) + half - steps         # (R,n,3)
    beyond, found = ((np.indices((shifts,) * 3) - steps)**2).sum(0) > steps**2, []
    for start, offset, visible, count in zip(starts, corners @ (size**2, size, 1), seen.visible.astype(int), peaks):
        worth = sum(volumes[s][o:o + shifts * size**2] for o, s in zip(offset, visible)).reshape(shifts, size, size)
        worth = np.where(beyond, -32768, worth[:, :shifts, :shifts])
        for _ in range(count):
            i, j, k = best = np.unravel_index(worth.argmax(), worth.shape)
            found.append(data.pose(start[:3, 3] + VOXEL * (np.array(best) - steps), start[:3, :3]))
            worth[max(i - 1, 0):i + 2, max(j - 1, 0):j + 2, max(k - 1, 0):k + 2] = -32768  # none of its neighbours
    return np.stack(found)


def refine(model, scene, cloud, poses, opening, distance, slip=SLIP, iterations=4):
    """ICP of K hypotheses with those of the model's points that are visible and not hidden."""
    weight = compare(model, scene, poses, opening).shown
    few = np.argsort(~weight, axis=1, kind="stable")[:, :max(1, weight.sum(1).max())]  # the others would cost time
    source = np.take_along_axis(at_opening(model, opening), few[..., None], 1)         # (K,n,3)
    return icp(source, cloud.data, None, poses, distance, iterations, source_normals=model.normals[few],
               weight=np.take_along_axis(weight, few, 1), slip=slip, tree=cloud)


def settle(hand, scene, cloud, poses, cost, wide=1):
    """Hypotheses -> the best of them, refined without the fingers, which may have moved.

    A funnel: each round of ICP has fewer hypotheses, more points and a stricter judge, and no two of what it leaves are
    the same for all points around the flange. cost(poses) (K,) comes off their scores; wide: times as many are left.
    """
    for distance, most in ROUNDS:
        step, closed = round(distance / FINE), np.zeros(len(poses))
        thin = part(hand, step=step)
        poses = refine(thin, scene, cloud, poses, closed, distance)[0]
        score = step * compare(thin, scene, poses, closed, distance / 2).score
        shift, turn = pose_errors(poses[:, None], poses[None])  # (K,K)
        same, best = shift + np.radians(turn) * FLANGE < AGREE, []
        for i in np.argsort(cost(poses) - score):
            if len(best) < wide * most and not same[i, best].any():
                best.append(i)
        poses = poses[best]
    return poses


# ----------------------------------------------------------------------------------------------------- the fingers

def finger_profile(model, scene, pose):
    """How well (O,) the fingers fit at each of WIDTHS: points that agree less those that the views look through. Flat
    where the hand, or what it holds, hides them."""
    fingers = part(model, model.slide != 0)
    seen = compare(fingers, scene, np.repeat(pose[None], len(WIDTHS), 0), WIDTHS, fingers=True)
    return seen.agree - seen.through


def held_profile(held, scene, pose, first):
    """What (O,) the sight of what was held at the width `first` says for each of WIDTHS: while it is in the hand the
    fingers have not opened, and when one looks through where it would be, they have, wide."""
    seen = compare(held, scene, pose[None], [first])
    told = seen.agree[0] + seen.through[0]
    gone = np.clip(HELD[1] * (1 - seen.agree[0] / told / HELD[2]), -HELD[0], HELD[1]) if told > MIN_AGREE else 0
    return gone * (WIDTHS > ((first + STROKE) / 2 if gone > 0 else first + EVENT))


def likeliest(profile, before):
    """The width, m, at the profile's peak; `before` where nothing speaks clearly for another."""
    return WIDTHS[np.argmax(profile - CHANGE[0] * np.minimum(np.abs(WIDTHS - before) / EVENT, 1))]


def way_of(position, lost):
    """How far (T,) m a hand goes between two frames, from its position (F,3) where it is not lost (F,) bool: there it
    keeps its pace, and where it is not found again it may have gone anywhere."""
    seen = np.flatnonzero(~lost)
    if not len(seen):
        return np.full(len(lost) - 1, TRAVEL[0])
    between = np.stack([np.interp(np.arange(len(lost)), seen, axis) for axis in position[seen].T], 1)
    way = np.linalg.norm(np.diff(between, axis=0), axis=1)
    way[seen[-1]:] = TRAVEL[0]
    return way


def opening_path(profiles, way, first):
    """The likeliest widths (F,) of a whole video: the Viterbi path through the frames' profiles (F,O).

    way (F-1,) m, how far the hand moved between two frames: fingers close and open while it rests, so that a change
    which no view shows is put where the hand moved least. first: the width at frame 0, m.
    """
    change = np.minimum(np.abs(np.subtract.outer(WIDTHS, WIDTHS)) / EVENT, 1)  # (O now, O before)
    total, back = -(((WIDTHS - first) / WIDTHS[1])**2), []
    for profile, moved in zip(profiles[1:], way):
        options = total - np.interp(moved, (0, TRAVEL[0]), CHANGE) * change
        back.append(options.argmax(1))
        total = options.max(1) + profile
    path = [total.argmax()]
    for previous in reversed(back):
        path.append(previous[path[-1]])
    return WIDTHS[path[::-1]]


def closed_flags(opening):
    """(F,A) bool from openings (F,A) m: closed when the fingers came EVENT nearer than the widest since they opened,
    open again when they parted by EVENT from the narrowest since they closed; so a grasped apple counts as a grasped
    sheet. At first they are held against the widest of the clip, or of the hand where nothing happens."""
    closed = np.zeros(opening.shape, bool)
    for a, widths in enumerate(opening.T):
        extreme = widths[0]
        state = extreme < (widths.max() if np.ptp(widths) > EVENT else STROKE) - EVENT
        for t, width in enumerate(widths):
            extreme = min(extreme, width) if state else max(extreme, width)
            if abs(width - extreme) > EVENT:
                state, extreme = not state, width
            closed[t, a] = state
    return closed


def read_fingers(gripper_in_ref, lost, profile, first):
    """The opening (F,A) m, and closed (F,A), of hands by the profile (F,A,O) of their fingers, first (A,) m apart."""
    opening = np.stack([opening_path(profile[:, a], way_of(gripper_in_ref[:, a, :3, 3], lost[:, a]), width)
                        for a, width in enumerate(first)], 1)
    return dict(opening=opening, closed=closed_flags(opening))


# ------------------------------------------------------------------------------------------------------- the frames

def travel(poses, guess, frames=1):
    """(K,) model points that it costs a pose to be away from `guess`, which is `frames` frames old; grows with the
    square, and no hand turns by twice TURN."""
    metres, degrees, points = TRAVEL
    shift, turn = pose_errors(poses, guess)
    return points * ((shift / metres / frames)**2 + (turn / degrees / min(frames, 2))**2) + 1e4 * (turn > 2 * TURN)


def judge(model, scene, poses, opening, cost, anew=False):
    """What is seen of poses, each with the opening (K,) that suits it best, the score less their cost; their worth (K,)
    and whether they are believed, sure (K,).

    Evidence a point in view counts as much as evidence in all, for of a hand half hidden few points agree, and all of
    them well. A pose that is mostly where nothing is measured is not believed. anew: after a loss nothing else speaks
    for a place: it has to fit better, in more points, and the way costs twice, as it does in the choice.
    """
    profiles = [finger_profile(model, scene, pose) for pose in poses]
    openings, way = np.array([likeliest(profile, opening) for profile in profiles]), cost(poses)
    seen = compare(model, scene, poses, openings)
    worth, seen.profile, seen.opening, seen.score = seen.score - 2 * way, profiles, openings, seen.score - way
    seen.worth = worth * np.abs(worth) / np.maximum(seen.in_view, 1)
    few = np.maximum(MIN_AGREE * (1 + anew) * (1 - seen.blank), MIN_SHARE * seen.in_view)
    fits = (worth if anew else seen.score) >= MIN_SCORE[anew] * seen.in_view
    seen.sure = (seen.agree >= few) & (seen.blank < 0.5) & fits
    return seen


def track_one(model, scene, state, dt):
    """The next state of one hand, dt s later. state: pose, motion (of the last step, in the gripper's frame), opening,
    missed frames.

    First where the hand was and where its velocity takes it; only if it does not fit well there, all places in reach,
    and at last far turned. Where nothing is borne out it is lost: `missed` grows, `why` says so, the pose is held.
    """
    frames = 1 + state.missed
    reach = REACH * min(2 * dt * frames, 1.5)  # no farther, for the search's time
    lost = lambda why: SimpleNamespace(**vars(state) | dict(
        why=why, missed=frames, motion=np.eye(4), fitness=0.0, inlier_rmse=np.nan, profile=0 * WIDTHS))
    if np.isnan(state.pose).any():
        return lost(state.why)
    cloud = nearby(scene, state.pose[:3, 3], reach + model.reach)
    if cloud is None:
        return lost("nothing that moved is measured within reach; "
                    f"depth fluctuates by {1000 * scene.noise.max():.0f} mm")
    guesses, hand = np.stack([state.pose, state.pose @ state.motion]), part(model, model.slide == 0)
    cost = lambda poses: np.min([travel(poses, guess, frames) for guess in guesses], axis=0)
    look = lambda poses: judge(model, scene, poses, state.opening, cost, state.missed > 0)
    poses = guesses
    for turns in TURNS:  # where nothing fits, search; then far turned
        if len(turns):
            starts = data.pose(np.tile(state.pose[:3, 3], (len(turns), 1)), state.pose[:3, :3] @ turns)
            peaks = np.where(data.rotation_angle(turns) < 1e-3, PLACES, PLACES // len(turns) + 1)
            poses = np.concatenate([poses, search(hand, scene, cloud, state.pose[:3, 3], reach, starts, peaks)])
        poses = settle(hand, scene, cloud, poses, cost)
        seen = look(poses)
        if (seen.sure & (seen.score >= WELL[0] * seen.in_view) & (seen.clear >= WELL[1])).any():
            break
    best = [np.argmax(seen.worth + 1e6 * seen.sure)]
    fine, opening = poses[best], seen.opening[best]
    for shrink in (1, 1.5, 2):
        fine = refine(model, scene, cloud, fine, opening, FINE / shrink, slip=SLIP / 3)[0]
    # A hand at rest does not drift with the noise: the first of equals is taken.
    options = np.concatenate([state.pose[None], fine, poses[best]])
    pose = options[[compare(model, scene, options, np.repeat(opening, 3)).score.argmax()]]
    seen = look(pose)
    if not seen.sure[0]:
        return lost(f"of {seen.in_view[0]:.0f} points in view {seen.agree[0]:.0f} agree, {seen.through[0]:.0f} are "
                    f"looked through, {100 * seen.blank[0]:.0f} % are not measured")
    _, fitness, inlier_rmse = (x[0] for x in refine(model, scene, cloud, pose, seen.opening, AGREE, iterations=1))
    # Along the ray a blur agrees with many poses; in space little of it is near any.
    near, noise = fitness * (1 - (inlier_rmse / AGREE)**2), scene.noise[scene.views].min()
    if near * seen.score[0] < MIN_FIT * (1 + SIGMAS * (noise / AGREE)**2) * seen.in_view[0]:
        return lost(f"a blur: {100 * fitness:.0f} % of the points in view are near measured ones, "
                    f"{1000 * inlier_rmse:.1f} mm away")
    motion, moved = invert(state.pose) @ pose[0], pose_errors(pose[0], state.pose)[0]
    profile = seen.profile[0]
    if noise > NOISY:  # a generated hand's fingers are faint, what they hold is larger
        profile = np.exp(-(moved / BLUR)**2) * profile
        if model.held:
            profile += held_profile(model.held, scene, pose[0], model.first)
    return SimpleNamespace(pose=pose[0], motion=np.eye(4) if state.missed else motion, opening=seen.opening[0],
                           missed=0, why="", fitness=fitness, inlier_rmse=inlier_rmse, profile=profile)


def step(models, scene, states, dt):
    """One frame of all hands. Two in one place: it is the one's that was not lost or had the shorter way; the other
    looks again, at what is left."""
    after = [track_one(model, scene, state, dt) for model, state in zip(models, states)]
    if len(after) == 2 and not after[0].missed and not after[1].missed \
            and pose_errors(after[0].pose, after[1].pose)[0] < FLANGE:
        owner, other = sorted((0, 1), key=lambda i: (states[i].missed, travel(after[i].pose, states[i].pose)))
        (v, y, x), still = scene.candidates, scene.still.copy()
        surface = cKDTree(transform(at_opening(models[owner], [after[owner].opening])[0], after[owner].pose))
        still[v, y, x] |= surface.query(scene.points[v, y, x], distance_upper_bound=AGREE)[0] < AGREE
        left = make_scene(scene.depth, scene.intrinsics, scene.view_in_ref, scene.noise, still)
        after[other] = track_one(models[other], left, states[other], dt)
    return after


def silhouette(model, intrinsics, ref_in_view, size, pose, opening):
    """(V,H,W) bool, the pixels that the whole model covers in every view, hidden or not."""
    vertices = model.vertices + np.outer(opening * model.vertex_slide, (0, 1, 0))
    return rasterize(np.stack([transform(vertices, view @ pose) for view in ref_in_view]), model.faces, intrinsics,
                     *size)[0] > 0


def register(model, scene, mask):
    """The first pose (4,4) from masks (V,H,W) of the gripper alone, nan if too little is masked, and the opening, m.

    The hand looks nearly the same after half a turn about its approach axis: the better of both is returned.
    """
    depth = scene.depth * mask.any((1, 2), keepdims=True)  # a view without a mask says nothing
    scene = make_scene(depth, scene.intrinsics, scene.view_in_ref, still=~mask)  # the rest is as good as scenery
    centre = np.median(np.append(scene.points[scene.candidates], [[0, 0, 0]], 0), axis=0).astype(float)
    cloud, hand = nearby(scene, centre, REACH / 3 + model.reach), part(model, model.slide == 0)
    if cloud is None:
        return np.full((4, 4), np.nan), STROKE
    whole = cKDTree(at_opening(model, [STROKE / 2])[0])

    def unexplained(poses):  # what the mask shows must be on the hand
        shown = transform(np.repeat(cloud.data[None, ::5], len(poses), 0), invert(poses))
        return len(hand.points) * (whole.query(shown)[0] > AGREE).mean(1)

    # Not the flange, but the middle of the hand is to be in the middle of the mask.
    turns = all_rotations(200)
    starts = data.pose(centre - turns @ model.points.mean(0), turns)
    poses = search(hand, scene, cloud, centre, REACH / 3, starts, [3] * len(starts))
    poses = settle(hand, scene, cloud, poses, unexplained, WIDE)
    poses = settle(hand, scene, cloud, np.concatenate([poses, poses @ HALF_TURN]), unexplained, WIDE)
    seen = judge(model, scene, poses, STROKE / 2, unexplained)
    best = [seen.worth.argmax()]
    pose, opening = poses[best], seen.opening[best]
    return refine(model, scene, cloud, pose, opening, FINE, slip=SLIP / 3)[0][0], opening[0]


def first_state(model, scene, pose, opening, mask):
    """The model with its mount, what it holds of the object under `mask` (V,H,W), and that opening, first; and the
    state at frame 0. A given pose that no view shows is believed, one that the views look through is not."""
    why = "no mask shows enough of it" if np.isnan(pose).any() else ""
    model = SimpleNamespace(**vars(model) | dict(held=None, first=opening))
    if not why:
        model.held = held_by(model, scene, mask, pose, opening) if model.slide.any() else None
        model = add_mount(model, scene, pose, opening)
        seen = compare(model, scene, pose[None], [opening])
        why = "the views look through where it should be" if seen.through[0] > seen.agree[0] else ""
    return model, SimpleNamespace(pose=pose, motion=np.eye(4), opening=float(opening), missed=int(why != ""), why=why,
                                  fitness=float(why == ""), inlier_rmse=np.nan if why else 0.0, profile=0 * WIDTHS)


def track(clip, init="auto", model=None):
    """Track every gripper of a clip (data.CLIP) through the video that was predicted for it.

    init: "pose" (observed_gripper_in_ref, and observed_opening where known), "mask" (observed_gripper), or "auto", the
    pose if the clip has it; model: of hand_model or make_model. In generated videos a held observed_object, where the
    clip has one, tells by staying in the hand or not when it is let go. Returns the arrays of trajectory.npz:
    gripper_in_ref (F,A,4,4); gripper_motion (T,A,4,4), from the first frame, in the gripper's own frame; opening (F,A)
    m; closed, lost (F,A) bool; why (F,A), the reason of a loss; fitness (F,A); inlier_rmse (F,A) m; profile (F,A,O),
    evidence for each of WIDTHS. A frame that is lost holds the last pose.
    """
    if init == "auto":
        init = "pose" if "observed_gripper_in_ref" in clip else "mask"
    clip = data.check_clip(clip, ("observed", "prediction", "view_in_ref", init))
    model, depth = model or hand_model(), clip["observed_depth"]
    observed = make_scene(depth * (depth <= data.FAR), clip["intrinsics"], clip["view_in_ref"])
    if init == "pose":
        poses, openings = clip["observed_gripper_in_ref"], clip.get("observed_opening")
        if openings is None:
            openings = [likeliest(finger_profile(model, observed, pose), STROKE) for pose in poses]
        elif max(openings) > STROKE + EVENT:
            raise ValueError(f"'observed_opening' is {max(openings):g} m: raise STROKE in track.py, {STROKE:g} m")
    else:
        poses, openings = map(np.stack, zip(*(register(model, observed, mask)
                                              for mask in clip["observed_gripper"].swapaxes(0, 1))))
    here, thing = np.zeros(depth.shape, bool), clip.get("observed_object", np.zeros(depth.shape, bool))
    models, states = zip(*(first_state(model, observed, *state, thing) for state in zip(poses, openings)))
    for pose, opening, own in zip(poses, openings, models):
        if np.isfinite(pose).all():
            here |= silhouette(model, clip["intrinsics"], observed.ref_in_view, depth.shape[1:], pose, opening)
            here |= thing & (own.held is not None)
    here = binary_dilation(here, np.ones((1, 3, 3), bool))

    frames = [states]
    for t in tqdm(range(clip["points"].shape[1]), desc="tracking", unit="frame", disable=None, leave=False):
        scene = read_frame(clip["points"][:, t], clip["valid"][:, t], observed, here)
        frames.append(step(models, scene, frames[-1], 1 / clip["fps"]))
    collect = lambda name: np.array([[getattr(state, name) for state in states] for states in frames])
    gripper_in_ref, profile, lost = collect("pose"), collect("profile"), collect("missed") > 0
    return dict(gripper_in_ref=gripper_in_ref, gripper_motion=invert(gripper_in_ref[:1]) @ gripper_in_ref[1:],
                lost=lost, why=collect("why"), fitness=collect("fitness"), inlier_rmse=collect("inlier_rmse"),
                profile=profile, **read_fingers(gripper_in_ref, lost, profile, openings))


def joined(paths):
    """One path out of those that were tracked through several predictions from the same observation: gripper_in_ref
    (F,A,4,4), in each hand's own first frame, the mean of those that found it; lost (F,A) where none did, the last pose
    is held; opening, closed (F,A). As witnesses of the fingers they often err alike: n of them count as sqrt(n)."""
    motion = np.stack([invert(path["gripper_in_ref"][:1]) @ path["gripper_in_ref"] for path in paths])
    found, mean = ~np.stack([path["lost"] for path in paths]), motion[0].copy()  # (paths,F,A), (F,A,4,4)
    for t, a in np.ndindex(mean.shape[:2]):
        if (seen := motion[found[:, t, a], t, a]).size:
            mean[t, a] = data.pose(seen[:, :3, 3].mean(0), Rotation.from_matrix(seen[:, :3, :3]).mean().as_matrix())
        elif t:
            mean[t, a] = mean[t - 1, a]
    lost, profile = ~found.any(0), sum(path["profile"] for path in paths) / np.sqrt(len(paths))
    return dict(gripper_in_ref=mean, lost=lost, **read_fingers(mean, lost, profile, paths[0]["opening"][0]))


# ----------------------------------------------------------------------------------------------- pictures and commands

def outlined(clip, trajectory, model):
    """The colours, enlarged, with the outline of the tracked hand, orange right, blue left, grey where it is lost:
    (V,F,kH,kW,3) uint8."""
    rgb = np.concatenate([clip["observed_rgb"][:, None], clip["rgb"]], 1)
    scale = max(1, round(256 / rgb.shape[2]))
    rgb = rgb.repeat(scale, 2).repeat(scale, 3)
    intrinsics = data.scale_intrinsics(clip["intrinsics"], clip["rgb"].shape[2:4], rgb.shape[2:4])
    for t, a in np.argwhere(np.isfinite(trajectory["gripper_in_ref"]).all((2, 3))):
        mask = silhouette(model, intrinsics, invert(clip["view_in_ref"]), rgb.shape[2:4],
                          trajectory["gripper_in_ref"][t, a], trajectory["opening"][t, a])  # (V,kH,kW)
        edge = mask & binary_dilation(~mask, np.ones((1, 3, 3), bool), iterations=2)
        rgb[:, t][edge] = (128, 128, 128) if trajectory["lost"][t, a] else ((255, 120, 0), (0, 150, 255))[a % 2]
    return rgb


def report(clip, trajectory):
    """What was tracked of the predicted frames, where it was lost and why, and how far off if the truth is known."""
    for a, lost in enumerate(trajectory["lost"].T):
        found = np.flatnonzero(~lost[1:]) + 1
        print(f"hand {a + 1}: {len(found)} of {len(lost) - 1} predicted frames tracked")
        if "true_gripper_in_ref" in clip and len(found):
            shift, turn = pose_errors(trajectory["gripper_in_ref"][found, a], clip["true_gripper_in_ref"][found, a])
            print(f"  off by {1000 * np.median(shift):.1f} mm and {np.median(turn):.1f} degrees in the median, "
                  f"{1000 * shift.max():.0f} mm and {turn.max():.0f} degrees at most")
        for t in np.flatnonzero(lost):
            print(f"  lost at {t / clip['fps']:+.1f} s: {trajectory['why'][t, a]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    source.add_argument("--prediction", type=Path, metavar="NPZ", help="prediction.npz of sample.py")
    source.add_argument("--episode", metavar="DIR", help="packed episode of data.py: its true pointmaps are tracked")
    add("--cameras", type=int, nargs="+", default=[13, 14], help="of --episode, the reference first [13 14]")
    add("--init", choices=("auto", "pose", "mask"), default="auto",
        help="first pose from the robot, or from masks, which leave half a turn about the approach axis open (and with "
             "it the signs of x and y in gripper_motion) [auto: the robot's where it is known]")
    add("--hand", metavar="OBJ", help="mesh of the hand without fingers, metres, hand frame [built-in]")
    add("--finger", metavar="OBJ", help="mesh of the left finger at opening 0, metres, hand frame [built-in]")
    add("--object", metavar="OBJ", help="mesh, metres, of another rigid thing: tracked from its masks observed_object")
    add("--out", type=Path, help="folder for the results [the prediction's; of an episode runs/track]")
    args = parser.parse_args()
    if args.episode:
        episode = data.load_episode(args.episode)
        frames = range((episode.frames - 1) // episode.stride)
        clip = data.truth_row(data.read_clip(episode, 0, [camera - 1 for camera in args.cameras], frames))
    else:
        clip = data.read_npz(args.prediction, "sample.py writes it")
    model = make_model([(*load_mesh(args.object), 0.0)], [800]) if args.object else hand_model(args.hand, args.finger)
    if args.object:
        if args.hand or args.finger or args.init == "pose":
            raise ValueError("--object is tracked from its masks alone: leave out --hand, --finger, --init pose")
        if "observed_object" not in clip:
            raise ValueError("--object: the clip has no 'observed_object', the thing's masks (V, H, W)")
        clip = {key: value for key, value in clip.items() if "gripper" not in key and "opening" not in key}
        clip["observed_gripper"] = clip["observed_object"]
    trajectory = track(clip, args.init, model)
    if "ref_in_world" in clip:
        trajectory["gripper_in_world"] = clip["ref_in_world"] @ trajectory["gripper_in_ref"]
    out, clip = args.out or (Path("runs/track") if args.episode else args.prediction.parent), data.check_clip(clip)
    data.write_npz(out / "trajectory.npz", trajectory)
    report(clip, trajectory)
    write_film(out / "overlay.gif", clip, outlined(clip, trajectory, model))
    print(f"written: {out}/trajectory.npz, overlay.gif")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"track.py: {str(error) or 'interrupted'}")
