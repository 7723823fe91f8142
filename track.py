"""The gripper's path out of a 4D video: render the hand, fit it by ICP, and say "lost" when it does not fit.

    python track.py --prediction runs/task_1/samples/NAME/prediction.npz  # + trajectory.npz, overlay.gif, path.png
    python track.py --prediction P.npz --init mask                        # first pose from the observed gripper masks
    python track.py --prediction P.npz --hand hand.obj --finger finger.obj    # CAD meshes instead of the built-in hand
    python track.py --episode data/task_1/episode_000 --cameras 12 13  # a packed episode's true pointmaps, with errors
    python track.py --episode ... --object box.obj                        # any other rigid mesh, from its first mask

For every frame: (0) where depth fluctuates, as a generator's does, it is mended: scenery shows how each view drifts,
and points belong on their pixels' rays; (1) what has not changed since the observed frame is scenery, in depth, and
near the hand in colour too, for a hand may come to lie where its arm was; (2) where the hand is not at rest, a voxel
search over all places and turns that it can have reached; (3) ICP of the best few, with the model points that are
visible at the estimate, without the fingers, which may have moved; (4) render-and-compare decides, counting what
agrees, what should be seen and is not, and what is there and should not be; (5) every opening of the fingers is held
against the points. After the last frame the likeliest path through all frames' openings is taken, for which what came
along with the hand was held. All views' points lie in one frame, so that they are fused by simply being put together.

Letters   K hypotheses, N model points, M scene points, V views, F = 1 observed + T frames, A arms, H W pixels
Frames    ref: the reference camera (view 0); cam: a view's own camera; gripper: Franka's hand frame (z out of the palm,
          fingers slide along y). `a_in_b` is the 4 x 4 that takes a-coordinates to b-coordinates. Metres, radians.

References: Besl and McKay 1992 (ICP); Chen and Medioni 1991 (point-to-plane); Kabsch 1976; Tukey's biweight;
Viterbi 1967; FoundationPose, arXiv 2312.08344, which the paper uses here and which gives no word when it is lost.
"""
import argparse
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, median_filter, minimum_filter
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from data import (RIGHT_GRIPPER, LEFT_GRIPPER, OBJECT, gripper_mesh, invert, load_episode, load_mesh, point_maps,
                  rasterize, transform, unproject)

STROKE = 0.08               # m, the widest opening
AGREE = 0.012               # m along the ray, a model point and the measured one are the same surface
STILL = 0.015               # m along the ray, a pixel that changed less since the observed frame shows scenery
RECOLOURED = 40             # of 255, a pixel whose colour changed more shows something else
NOISY = 0.001               # m, above this the depth is a generator's: normals of it mean little, edges are blurred
HOPELESS = 0.015            # m, depth that fluctuates more tells no pose from another: every hand is lost
COARSE = 0.004              # m, a pixel on the hand that is larger may miss what its neighbours show
OCCLUDED = 0.025            # m, what lies so far in front of a model point hides it
VOXEL = 0.03                # m, of the search
SEARCHED = 40               # model points that the search uses
PEAKS = 8                   # places that one of many turns may propose
NONE = np.int16(-32768)     # of a place: worse than any
WIDTHS = np.linspace(0, STROKE, 33)                      # m, the openings that are tried
# What a width costs, in model points, before and after a step in which something came along: it is held at one end of
# it at least, and fingers that no view shows rather close on it than nearly.
GRASPED = 6.0 * (WIDTHS > STROKE - 0.01) + 4 * WIDTHS / STROKE
LET_GO = 6.0 * (WIDTHS < STROKE - 0.02)                  # the same after a step in which it stayed behind
UNSEEN = 8                  # points between the best and the worst width, below which fingers count as unseen
FINGER_AGREE = 0.006        # m along the ray, as AGREE, of a finger: finer, for one that slides along looks the same
SHELL = 0.03                # m, so far outside the hand there is nothing
GONE = 0.015                # m, a hand that moved farther shows whether something came along
EVENT = 0.007               # m, the fingers' way beyond which they have closed or opened
# Of a pose that is believed: model points that agree (twice as many after a loss, as many more in noise), their share
# of those in view, the score (without what is hidden) a point in view, and that after a loss. In recorded episodes a
# right pose scores 0.94 a point in the median and 0.86 in the worst twentieth; in a generator's noise 0.83 and 0.72.
MIN_AGREE, MIN_SHARE, MIN_SCORE, MIN_SCORE_ANEW = 30, 0.75, 0.55, 0.7
CLEAR = 120                 # model points, a score at which others of a third of it are dropped
WELL = 0.7                  # score a point in view at which the search ends
HALF_TURN = np.diag([-1.0, -1.0, 1.0, 1.0])  # about the approach axis: it maps the hand onto itself, fingers swapped


# ------------------------------------------------------------------------------------------------------- the model

def sample_surface(vertices, faces, count, seed=0):
    """`count` points (count,3) spread evenly over a mesh, and their outward normals (corners counter-clockwise from
    outside)."""
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    normal = np.cross(b - a, c - a)
    area = np.linalg.norm(normal, axis=1)
    draw = np.random.default_rng(seed)
    share = (np.arange(count) + draw.random(count)) / count     # one draw in each of `count` equal shares of the area
    face = np.searchsorted(np.cumsum(area) / area.sum(), share).clip(max=len(faces) - 1)
    u = draw.random((count, 2))
    u = np.where(u.sum(1, keepdims=True) > 1, 1 - u, u)
    return a[face] + u[:, :1] * (b - a)[face] + u[:, 1:] * (c - a)[face], normal[face] / area[face, None]


def make_model(bodies, counts, seed=0):
    """Surface points of bodies that slide along y as the hand opens.

    bodies: list of (vertices, faces, slide), slide = dy / d(opening): 0 for the hand, +1/2 and -1/2 for the fingers.
    Returns a namespace: points, normals (N,3) at opening 0, slide (N,), shell (N,) bool: nothing but air is SHELL
    above it; mount (N,) bool: of add_mount; vertices, faces, vertex_slide of all bodies as one mesh; reach, m, of its
    farthest point; spacing, m, of its points.
    """
    sampled = [sample_surface(v, f, n, seed) for (v, f, _), n in zip(bodies, counts)]
    points, normals = (np.concatenate(x) for x in zip(*sampled))
    slides = [slide for _, _, slide in bodies]
    starts = np.cumsum([0] + [len(v) for v, _, _ in bodies])
    order = np.random.default_rng(seed).permutation(len(points))  # so that the first n points are a sample of them all
    model = SimpleNamespace(
        points=points[order], normals=normals[order], slide=np.repeat(slides, counts)[order],
        vertices=np.concatenate([v for v, _, _ in bodies]),
        faces=np.concatenate([f + s for (_, f, _), s in zip(bodies, starts)]),
        vertex_slide=np.repeat(slides, [len(v) for v, _, _ in bodies]))
    model.mount = np.zeros(len(order), bool)
    model.reach = np.linalg.norm(model.points, axis=1).max() + STROKE / 2 * bool(np.any(slides))
    area = sum(np.linalg.norm(np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]]), axis=1).sum() / 2
               for v, f, _ in bodies)
    model.spacing = np.sqrt(area / len(points))
    above = model.points + SHELL * model.normals
    away = [cKDTree(at_opening(model, [w])[0]).query(at_opening(model, [w], above)[0])[0]
            for w in (0, STROKE / 2, STROKE)]
    # None at the flange, where the arm goes on, and none beyond the palm, where an object may be held.
    model.shell = (np.min(away, 0) > 0.8 * SHELL) & (above[:, 2] > 0) & (above[:, 2] < 0.085) & bool(np.any(slides))
    return model


def part(model, keep):
    """The model with only those points that `keep` (N,) chooses."""
    chosen = {name: getattr(model, name)[keep] for name in ("points", "normals", "slide", "shell", "mount")}
    return SimpleNamespace(**{**vars(model), **chosen})


def hand_model(hand=None, finger=None):
    """The gripper as a model; from two mesh files (metres, hand frame; the left finger at opening 0), or the built-in
    one."""
    if (hand is None) != (finger is None):
        raise ValueError("--hand and --finger belong together: give both mesh files, or neither for the built-in hand")
    parts = {"hand": load_mesh(hand), "finger": load_mesh(finger)} if hand else gripper_mesh()
    (palm, palm_faces), (left, left_faces) = parts["hand"], parts["finger"]
    right = left * [-1, -1, 1]                            # turned by 180 degrees about z
    return make_model([(palm, palm_faces, 0.0), (left, left_faces, 0.5), (right, left_faces, -0.5)], [500, 150, 150])


def at_opening(model, opening, points=None):
    """Model points (K,N,3), or as many `points` (n,3) for the first n of them, in the gripper frame at each opening
    (K,)."""
    points = np.repeat((model.points if points is None else points)[None], len(opening), 0)
    points[..., 1] += np.asarray(opening)[:, None] * model.slide[:points.shape[1]]
    return points


def add_mount(model, scene, pose, opening):
    """The model with what is fixed to its flange: the last link of the arm turns with the hand, and the observed
    frame shows it.

    Without it the arm's points, which no mesh explains, pull the hand's edge towards them.
    """
    cloud = nearby(scene, pose[:3, 3], 0.2, 4000)
    if cloud is None:
        return model
    in_gripper = transform(cloud.points, invert(pose))
    away = cKDTree(at_opening(model, [opening])[0]).query(in_gripper)[0]
    behind = (in_gripper[:, 2] > -0.06) & (in_gripper[:, 2] < 0.03) & (np.linalg.norm(in_gripper[:, :2], axis=1) < 0.09)
    keep = np.flatnonzero(behind & (away > 0.012))
    cells = np.floor(in_gripper[keep] / (1.2 * model.spacing)).astype(int)
    # one point a cell: even, like the mesh's
    keep = keep[np.unique(cells, axis=0, return_index=True)[1]]
    grown = SimpleNamespace(**vars(model))
    grown.points = np.concatenate([model.points, in_gripper[keep]])
    grown.normals = np.concatenate([model.normals, cloud.normals[keep] @ pose[:3, :3]])
    order = np.random.default_rng(0).permutation(len(grown.points))
    grown.points, grown.normals = grown.points[order], grown.normals[order]
    grown.slide = np.concatenate([model.slide, np.zeros(len(keep))])[order]
    grown.shell = np.concatenate([model.shell, np.zeros(len(keep), bool)])[order]
    grown.mount = np.concatenate([model.mount, np.ones(len(keep), bool)])[order]
    return grown


# ------------------------------------------------------------------------------------------------------------- ICP

def kabsch(source, target, weight):
    """The rigid motions (K,4,4) that bring source (K,N,3) onto target (K,N,3), weight (K,N), in the least-squares
    sense."""
    weight = weight / weight.sum(-1, keepdims=True).clip(1e-12)
    a, b = (weight[..., None] * source).sum(1), (weight[..., None] * target).sum(1)         # (K,3) centroids
    covariance = (weight[..., None] * (target - b[:, None])).mT @ (source - a[:, None])     # (K,3,3)
    U, _, Vt = np.linalg.svd(covariance)
    # a rotation, not a mirror image
    U[..., 2] *= np.linalg.det(U @ Vt)[:, None]
    return rigid(U @ Vt, b - ((U @ Vt) @ a[..., None])[..., 0])


def rigid(rotation, translation):
    """(K,3,3) and (K,3) -> (K,4,4)."""
    T = np.tile(np.eye(4), (len(rotation), 1, 1))
    T[:, :3, :3], T[:, :3, 3] = rotation, translation
    return T


CROSS = np.cross(np.eye(3)[:, None], np.eye(3))           # [i,j] = e_i x e_j, so that a x b = sum a_i b_j CROSS[i,j]


def gauss_newton(source, target, normal, weight, centre, slip, shift_only=False):
    """One step (K,4,4) of point-to-plane, min sum w [(n.e)^2 + slip |e|^2] with e = target - (source moved).

    The motion is a turn about `centre` (K,3) and then a shift. A little of point-to-point (`slip`) holds what planes
    alone let slide.
    """
    arm, e = source - centre[:, None], target - source                                      # (K,N,3)
    J, r = np.concatenate([cross(arm, normal), normal], -1), (e * normal).sum(-1)
    Jw = (J * weight[..., None]).mT
    A, g = Jw @ J, (Jw @ r[..., None])[..., 0]            # (K,6,6), (K,6): the turn's three, the shift's three
    if slip:                                              # three more rows a point, (arm x e_i, e_i): a body's inertia
        mass, both = slip * weight, np.concatenate([arm, e], -1)
        second = (mass[..., None] * arm).mT @ both                                          # (K,3,6) arm arm^T, arm e^T
        first = (mass[:, None] @ both)[:, 0]                                                # (K,6) arm, e
        inertia, skew = second[:, :, :3], (first[:, :3] @ CROSS.reshape(3, 9)).reshape(-1, 3, 3)
        A[:, :3, :3] += np.trace(inertia, axis1=1, axis2=2)[:, None, None] * np.eye(3) - inertia
        A[:, :3, 3:] -= skew
        A[:, 3:, :3] += skew
        A[:, 3:, 3:] += mass.sum(1)[:, None, None] * np.eye(3)
        g[:, :3] += second[:, :, 3:].reshape(-1, 9) @ CROSS.reshape(9, 3)
        g[:, 3:] += first[:, 3:]
    if shift_only:
        A[:, :3], A[:, :, :3], A[:, range(3), range(3)], g[:, :3] = 0, 0, 1, 0
    x = np.linalg.solve(A + 1e-9 * np.eye(6), g[..., None])[..., 0]
    turn = Rotation.from_rotvec(x[:, :3]).as_matrix()
    return rigid(turn, centre + x[:, 3:] - (turn @ centre[..., None])[..., 0])


def cross(a, b):
    """np.cross for (...,3), several times faster on small arrays."""
    x, y, z = a[..., 0], a[..., 1], a[..., 2]
    u, v, w = b[..., 0], b[..., 1], b[..., 2]
    return np.stack([y * w - z * v, z * u - x * w, x * v - y * u], -1)


def robust(distance, scale, kernel):
    """Weights of residuals: 'none', 'huber' or 'tukey' (zero at `scale`)."""
    if kernel == "none":
        return (distance < scale) * 1.0
    if kernel == "huber":
        return np.minimum(1, 0.25 * scale / np.maximum(distance, 1e-12)) * (distance < scale)
    return np.maximum(0, 1 - (distance / scale)**2)**2


def icp(source, target, target_normals=None, init=None, max_correspondence_distance=0.02, max_iteration=30, *,
        source_normals=None, weight=None, target_weight=None, kernel="tukey", trim=1.0, slip=0.0, min_cosine=None,
        shift_only=False, tolerance=1e-7, tree=None, judge=True):
    """Iterative closest point from one or many starting poses at once.

    source (N,3), or (K,N,3) one set a start; target (M,3); init (4,4) or (K,4,4), default identity. Planes are those of
    `source_normals` if given (a rendered model's have no noise), else of `target_normals`, else point-to-point
    (Kabsch). weight (N,) or (K,N), target_weight (M,); kernel 'none' | 'huber' | 'tukey', its scale is
    max_correspondence_distance; trim: the share of nearest pairs that is used; min_cosine: between the two normals,
    when both are given; shift_only: no turns, with planes; tree: a cKDTree of target. Stops when no start moves by more
    than `tolerance`. judge: False leaves fitness and inlier_rmse out, None each, which saves a look-up.
    Returns transformation (4,4), source to target; fitness, inliers / points in the source; inlier_rmse, m. With K
    starts each has a leading K. Raises ValueError for an empty cloud or a shape that does not fit.
    """
    source, target = np.asarray(source, float), np.asarray(target, float)
    if source.shape[-1:] != (3,) or target.shape[-1:] != (3,) or not source.size or not target.size:
        raise ValueError(f"icp: source {source.shape} and target {target.shape} must be (N,3) and (M,3), neither empty")
    one = init is None or np.ndim(init) == 2
    T = np.array(np.eye(4) if init is None else init, float).reshape(-1, 4, 4)
    K, N = len(T), source.shape[-2]
    source = np.broadcast_to(source, (K, N, 3))
    weight = np.broadcast_to(1.0 if weight is None else weight, (K, N))
    k, n = np.nonzero(weight > 0)                         # only these are looked up
    tree = tree or cKDTree(target)
    normals = None if source_normals is None else np.broadcast_to(source_normals, (K, N, 3))

    def pairs(T):
        moved = source @ T[:, :3, :3].mT + T[:, None, :3, 3]                                # (K,N,3)
        distance, index = np.full((K, N), np.inf), np.zeros((K, N), int)
        distance[k, n], index[k, n] = tree.query(moved[k, n], distance_upper_bound=max_correspondence_distance)
        index[~np.isfinite(distance)] = 0                 # no partner in reach: an infinite distance, weight 0
        return moved, distance, index

    for _ in range(max_iteration):
        moved, distance, index = pairs(T)
        w = weight * robust(distance, max_correspondence_distance, kernel)                  # (K,N)
        if target_weight is not None:
            w = w * target_weight[index]
        if trim < 1:
            limit = np.inf
            if (w > 0).any(1).all():
                limit = np.nanquantile(np.where(w > 0, distance, np.nan), trim, axis=1, keepdims=True)
            w = w * (distance <= limit)
        partner, theirs = target[index], None if target_normals is None else target_normals[index]
        normal = theirs if normals is None else normals @ T[:, :3, :3].mT
        if min_cosine is not None:
            w = w * (np.einsum("kni,kni->kn", normal, theirs) > min_cosine)
        if normal is None:
            step = kabsch(moved, partner, w)
        else:
            step = gauss_newton(moved, partner, normal, w, T[:, :3, 3], slip, shift_only)
        step[w.sum(1) <= 0] = np.eye(4)
        T = step @ T                                      # R' = dR R; the origin moves by dt
        if np.abs(step - np.eye(4)).max() < tolerance:
            break
    if not judge:
        return (T[0] if one else T), None, None
    _, distance, _ = pairs(T)
    inlier = np.isfinite(distance)
    count = inlier.sum(1)
    fitness = count / (weight > 0).sum(1).clip(1)
    inlier_rmse = np.sqrt((np.where(inlier, distance, 0)**2).sum(1) / count.clip(1))
    return (T[0], float(fitness[0]), float(inlier_rmse[0])) if one else (T, fitness, inlier_rmse)


# ---------------------------------------------------------------------------------------------- one frame of the video

def make_scene(points, valid, intrinsics, view_in_ref, observed=None, here=None):
    """One frame: points (V,H,W,3) in ref, valid (V,H,W), intrinsics (V,3,3), view_in_ref (V,4,4).

    With the `observed` frame's scene and `here` (V,H,W), where hands may be, it also holds: still (V,H,W), the other
    pixels that have not changed since and so show no hand; fluctuation, m, how much those change; and noise, m, as much
    of it as tolerances grow with. near (V,H,W) m is the nearest depth next to each pixel, in noise a pixel farther.
    """
    ref_in_view = invert(view_in_ref)
    z = depth_in_view(points, ref_in_view)
    depth = np.where(valid & (z > 0), z, 0)
    scene = SimpleNamespace(points=points, depth=depth, intrinsics=intrinsics, ref_in_view=ref_in_view,
                            view_in_ref=view_in_ref, still=np.zeros(depth.shape, bool), noise=0.0, fluctuation=0.0)
    if observed is not None:
        change = np.abs(depth - observed.depth)
        both = (depth > 0) & (observed.depth > 0)
        quiet = change[both & (change < 0.05)]
        scene.fluctuation = 1.48 * float(np.median(quiet)) if len(quiet) else 0.0
        scene.noise = min(scene.fluctuation, 0.01)
        scene.still = both & (change < max(STILL, 3 * scene.noise)) & ~here
    window = 1, *((5, 5) if scene.noise > NOISY else (3, 3))
    scene.near = minimum_filter(np.where(depth > 0, depth, np.inf), window)
    if scene.noise > NOISY:
        scene.still = binary_erosion(scene.still, np.ones(window))
    gather(scene)
    return scene


def depth_in_view(points, ref_in_view):
    """z (V,H,W) m of points (V,H,W,3) in ref along the axes of the views' cameras, float32."""
    axis, shift = ref_in_view[:, 2, :3].astype(np.float32), ref_in_view[:, 2, 3].astype(np.float32)
    return (points.astype(np.float32, copy=False) @ axis[:, None, :, None])[..., 0] + shift[:, None, None]


def steady(points, valid, observed):
    """One frame's points (V,H,W,3) as a generator makes them, mended with what the observed frame's scene knows.

    Scenery does not move: where a view's pixels still show it, the rigid motion that takes them back to the observed
    points is that view's drift. A pixel's point lies on the pixel's ray: what is beside it is noise, as is what differs
    from the median of 3 x 3. Depth as clean as a sensor's, within NOISY, is left as it is.
    """
    points, z = points.copy(), depth_in_view(points, observed.ref_in_view)
    for v, ref_in_view in enumerate(observed.ref_in_view):
        change = np.where(valid[v] & (observed.depth[v] > 0), np.abs(z[v] - observed.depth[v]), np.inf)
        still = change < 0.05
        if still.mean() < 0.05 or 1.48 * np.median(change[still]) < NOISY:
            continue
        few = np.flatnonzero(still)[::max(1, still.sum() // 4000)]
        source, target = (x.reshape(-1, 3)[few].astype(float)[None] for x in (points[v], observed.points[v]))
        drift = np.eye(4)[None]
        for _ in range(5):
            moved = source @ drift[:, :3, :3].mT + drift[:, None, :3, 3]
            off = np.linalg.norm(moved - target, axis=-1)
            drift = kabsch(source, target, robust(off, max(4 * np.median(off), 1e-3), "tukey"))
        mended = depth_in_view(points[v:v + 1], (ref_in_view @ drift[0])[None])[0]
        own = unproject(median_filter(mended, 3), observed.intrinsics[v])
        points[v] = transform(own, observed.view_in_ref[v])
    return points


def look_up(scene, v, points):
    """Points (...,3) in ref -> their pixels y, x in view v (clipped into the image), z, and whether they are in the
    image."""
    H, W = scene.depth.shape[1:]
    seen = (scene.intrinsics[v] @ scene.ref_in_view[v, :3]).astype(np.float32)              # ref -> pixels times z
    pixel = points.astype(np.float32) @ seen[:, :3].T + seen[:, 3]
    z = pixel[..., 2]
    in_front = np.maximum(z, 0.05)
    x, y = pixel[..., 0] / in_front, pixel[..., 1] / in_front
    inside = (z > 0.05) & (x > -0.5) & (x < W - 0.5) & (y > -0.5) & (y < H - 0.5)
    # half a pixel more, so that cutting off rounds
    return (y + 0.5).clip(0, H - 1).astype(np.int32), (x + 0.5).clip(0, W - 1).astype(np.int32), z, inside


def in_cube(points, centre, half):
    """Which points (...,3) lie in the cube of that half width, m. Axis by axis: many times faster than a maximum over
    three."""
    x, y, z = (np.abs(points[..., i] - float(centre[i])) < half for i in range(3))
    return x & y & z


def gather(scene):
    """Puts scene.candidates: the points (M,3) that are no scenery, their view, row, column (M,)."""
    view, row, column = np.nonzero((scene.depth > 0) & ~scene.still)
    scene.candidates = SimpleNamespace(points=scene.points[view, row, column].astype(float), view=view, row=row,
                                       column=column)


def nearby(scene, centre, radius, limit):
    """At most `limit` candidate points within `radius` of `centre`: points, normals (M,3), view (M,); None if there
    are < 20."""
    c = scene.candidates
    close = np.flatnonzero(in_cube(c.points, centre, radius))
    if len(close) < 20:
        return None
    close = close[::-(-len(close) // limit)]
    v, y, x, points = c.view[close], c.row[close], c.column[close], c.points[close]
    H, W = scene.depth.shape[1:]
    reach = max(1, W // 160)                              # pixels between the neighbours that make a normal
    across = scene.points[v, y, (x + reach).clip(max=W - 1)] - scene.points[v, y, (x - reach).clip(0)]
    down = scene.points[v, (y + reach).clip(max=H - 1), x] - scene.points[v, (y - reach).clip(0), x]
    normals = cross(across, down).astype(float)
    normals *= np.sign((normals * (scene.view_in_ref[v, :3, 3] - points)).sum(1, keepdims=True))   # towards the camera
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-9)
    return SimpleNamespace(points=points, normals=normals, view=v, tree=cKDTree(points))


def compare(model, scene, poses, opening, count=None, shell=False, strict=False):
    """Render K hypotheses into all views and hold them against the measured depth.

    The mesh is drawn as its sample points through a z-buffer with cells as large as their spacing, which costs a few
    microseconds a point for any number of hypotheses.
    poses (K,4,4) gripper_in_ref, opening (K,). Returns a namespace: visible (K,V,N) bool; gap (K,V,N) m, measured z
    minus the model's (nan where nothing is measured, or at an edge); edge (K,V,N), points that the view seems to
    look through, but that are next to something as near, or, in noise, on a finger, which blurs away: nothing can be
    said there, for an outline that is right is a pixel off as often as not; still (K,V,N); shell (K,) points measured
    in the air around the hand.
    """
    K, V, (H, W) = len(poses), len(scene.depth), scene.depth.shape[1:]
    N = len(model.points) if count is None else min(count, len(model.points))
    rotation = poses[:, :3, :3].mT
    in_gripper = at_opening(model, opening, model.points[:N])                               # (K,N,3)
    points = (in_gripper @ rotation + poses[:, None, :3, 3]).astype(np.float32)             # the same in ref
    outward = np.einsum("kni,ni->kn", in_gripper, model.normals[:N])
    visible, still, edge = (np.zeros((V, K * N), bool) for _ in range(3))
    gap, in_shell = np.full((V, K * N), np.nan, np.float32), np.zeros(K, int)
    spacing = model.spacing * np.sqrt(len(model.points) / N)
    tolerance = max(AGREE, 3 * scene.noise)
    for v in range(V):
        camera = np.einsum("ki,kij->kj", scene.view_in_ref[v, :3, 3] - poses[:, :3, 3], poses[:, :3, :3])   # in gripper
        pixel = np.linalg.norm(camera[0]) / scene.intrinsics[v, 0, 0]                       # its width on the hand, m
        i = np.flatnonzero(outward < camera @ model.normals[:N].T)         # of K * N, facing the camera
        y, x, z, inside = look_up(scene, v, points.reshape(-1, 3)[i])
        i, y, x, z = i[inside], y[inside], x[inside], z[inside]
        cell = max(1, round(1.5 * spacing / pixel))
        rows, columns = H // cell + 1, W // cell + 1
        key = (i // N * rows + y // cell) * columns + x // cell
        nearest = np.full(K * rows * columns, np.inf, np.float32)
        np.minimum.at(nearest, key, z)
        front = z <= nearest[key] + 0.012
        i, y, x, z = i[front], y[front], x[front], z[front]
        measured = scene.depth[v, y, x]
        visible[v, i] = True
        off = np.where(measured > 0, measured - z, np.nan)
        unchanged = scene.still[v, y, x]
        if pixel > COARSE and not strict:                 # at coarse edges a neighbouring pixel may speak
            for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                row, column = (y + dy).clip(0, H - 1), (x + dx).clip(0, W - 1)
                other = scene.depth[v, row, column]
                better = (other > 0) & (np.abs(other - z) < np.abs(off)) & ~scene.still[v, row, column]
                off, unchanged = np.where(better, other - z, off), unchanged & ~better
        if scene.noise > NOISY or not strict:
            thin = (model.slide[i % N] != 0) & (scene.noise > NOISY) & (not strict)
            at_edge = (off > tolerance) & (thin | (scene.near[v, y, x] - z < tolerance))
            off[at_edge] = np.nan
            edge[v, i] = at_edge
        still[v, i] = unchanged
        gap[v, i] = off
        if shell:
            air = np.flatnonzero(model.shell[:N])
            y, x, z, inside = look_up(scene, v, points[:, air] + SHELL * (model.normals[air] @ rotation))
            measured = scene.depth[v, y, x]
            whole = measured - scene.near[v, y, x] < tolerance      # no mixture of two surfaces, which hangs in the air
            in_shell += (inside & ~scene.still[v, y, x] & whole & (np.abs(measured - z) < 0.5 * SHELL)).sum(1)
    visible, gap, still, edge = (x.reshape(V, K, N).swapaxes(0, 1) for x in (visible, gap, still, edge))
    return SimpleNamespace(visible=visible, gap=gap, still=still, edge=edge, shell=in_shell, points=points,
                           mount=model.mount[:N], tolerance=tolerance, noisy=scene.noise > NOISY)


def evidence(seen, slack=0.0):
    """Of what `compare` saw: score, agree, contradict and in_view, (K,) each, in model points.

    A point that should be seen and is not, or that lies on scenery, weighs five times one that agrees: an arm or the
    held object often hides the hand, and nearly never does one look through it. The mount on unchanged pixels says
    nothing: an arm that slides along itself looks the same. With `slack`, m, for poses that are still rough, more
    agrees and a contradiction weighs two.
    """
    visible = seen.visible & ~(seen.still & seen.mount)
    gap = np.where(visible, seen.gap, np.nan)
    tolerance = max(seen.tolerance, slack)
    close = np.abs(gap) < tolerance
    agree = np.where(close & ~seen.still, 1 - (gap / tolerance)**2, 0).sum((1, 2))
    contradict = ((gap > tolerance) | (close & seen.still)).sum((1, 2)) + seen.shell / 5
    hidden = (gap < -tolerance).sum((1, 2))
    in_view = (visible & ~seen.edge & ~(seen.gap < -tolerance)).sum((1, 2))
    return SimpleNamespace(score=agree - (2 if slack else 5) * contradict - 0.1 * hidden, agree=agree,
                           contradict=contradict, in_view=in_view, noisy=seen.noisy)


# ------------------------------------------------------------------------------------------------------ the search

def voxels(scene, centre, radius, reach):
    """Space around `centre` (3,) for a search `radius` m far with a model of that `reach`, cut into voxels.

    Returns a namespace: centre; steps, voxels to the radius; size of the cube; and two volumes, flat and as much longer
    as a shift may reach beyond the end: shown, what a voxel speaks for a visible model point, much where a candidate
    point is near, much against it where a camera looks through; hidden, the same for one that is not visible.
    """
    steps = int(np.ceil(radius / VOXEL))
    half = steps + int(np.ceil(reach / VOXEL)) + 1
    size = 2 * half + 1
    close = scene.candidates.points[in_cube(scene.candidates.points, centre, (half + 0.5) * VOXEL)]
    filled = np.zeros((size,) * 3, bool)
    filled[tuple((np.rint((close - centre) / VOXEL).astype(int) + half).clip(0, size - 1).T)] = True
    # exp(-d^2), d voxels to the nearest filled one, up to one along each axis; a product over the axes
    near = filled.astype(np.float32)
    for axis in range(3):
        line, before = np.moveaxis(near, axis, 0), np.moveaxis(near.copy(), axis, 0) * np.float32(np.exp(-1))
        np.maximum(line[1:], before[:-1], out=line[1:])
        np.maximum(line[:-1], before[1:], out=line[:-1])
    axis = (np.arange(size) - half) * VOXEL
    grid = (np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3) + centre).astype(np.float32)
    free = np.zeros(len(grid), bool)
    for v in range(len(scene.depth)):
        y, x, z, inside = look_up(scene, v, grid)
        measured = scene.depth[v, y, x]
        free |= inside & (measured > 0) & ((measured - z > VOXEL) | (scene.still[v, y, x] & (measured - z > -VOXEL)))
    free = free.reshape(filled.shape) & (near < 0.3)      # farther than one voxel
    shown, hidden = (np.append(value.astype(np.int16), np.zeros(size**2, np.int16)) for value in
                     (np.where(free, -200, 100 * near), np.where(free, -100, 0)))
    return SimpleNamespace(centre=np.asarray(centre, float), steps=steps, size=size, shown=shown, hidden=hidden)


def search(model, scene, space, rotations, keep):
    """The likeliest of all shifts within the reach of `space`, of `voxels`, and rotations (R,3,3): poses (keep,4,4).

    To shift the model by whole voxels is to read the same volume at an offset.
    """
    steps, size, shifts = space.steps, space.size, 2 * space.steps + 1
    poses = rigid(rotations, np.repeat(space.centre[None], len(rotations), 0))
    seen = compare(model, scene, poses, np.zeros(len(poses)), 200)
    corner = np.rint((seen.points[:, :SEARCHED] - space.centre) / VOXEL).astype(int) + (size - shifts) // 2
    offsets = corner.clip(0, size - shifts) @ (size**2, size, 1)                                  # (R,SEARCHED)
    visible = seen.visible[..., :SEARCHED].any(1)
    shift = (np.arange(shifts) - steps)**2
    beyond = shift[:, None, None] + shift[:, None] + shift > steps**2
    found, worths = [], []                                # a pose's worth: its total by its visible points
    for r in range(len(poses)):
        total = np.zeros(shifts * size**2, np.int16)      # at most 200 * SEARCHED: no overflow
        for offset, shown in zip(offsets[r].tolist(), visible[r]):
            total += (space.shown if shown else space.hidden)[offset:offset + len(total)]
        total = total.reshape(shifts, size, size)[:, :shifts, :shifts].copy()
        total[beyond] = NONE
        points = max(visible[r].sum(), 15)
        least = np.sort(worths)[-keep] if len(worths) >= keep else -np.inf
        for _ in range(min(keep, PEAKS) if len(poses) > 1 else keep):    # the best cell, then none of its neighbours
            i, j, k = np.unravel_index(total.argmax(), total.shape)
            worth = total[i, j, k] / points
            if total[i, j, k] == NONE or worth < least:
                break
            found.append(rigid(rotations[r:r + 1], space.centre + (np.array([[i, j, k]]) - steps) * VOXEL))
            worths.append(worth)
            total[max(i - 1, 0):i + 2, max(j - 1, 0):j + 2, max(k - 1, 0):k + 2] = NONE
    return np.concatenate(found)[np.argsort(-np.array(worths))[:keep]]


def refine(model, scene, cloud, poses, opening, distances, count, slip=0.1, view_weight=None, iterations=4,
           shift_only=False):
    """ICP of K hypotheses, rendered anew before each of the `distances`: those model points that are visible and not
    hidden."""
    for distance in distances:
        seen = compare(model, scene, poses, opening, count)
        weight = (seen.visible & ~(seen.gap < -OCCLUDED)).any(1)
        # the others would cost time; (K,n)
        shown = np.argsort(~weight, axis=1, kind="stable")[:, :max(1, weight.sum(1).max())]
        source = np.take_along_axis(at_opening(model, opening), shown[..., None], 1)
        poses, _, _ = icp(source, cloud.points, cloud.normals, poses, distance, iterations,
                          source_normals=model.normals[shown], weight=np.take_along_axis(weight, shown, 1), slip=slip,
                          min_cosine=0.5 if scene.noise < NOISY else 0.2, tree=cloud.tree,
                          target_weight=None if view_weight is None else view_weight[cloud.view],
                          shift_only=shift_only, judge=False)
    return poses


def settle(model, scene, cloud, poses, before, keep=6, cost=lambda poses: 0.0, shifted=None):
    """Hypotheses -> the best `keep` of them, refined, each with the opening that suits it.

    A funnel: each round of ICP has fewer hypotheses, more points and a stricter judge; the first only shifts, for what
    the search found is off by more than ICP can turn by. Which of them is right is decided without the
    fingers first: they may have moved. cost(poses) (K,) comes off their scores; shifted: how many the first round
    leaves, default all, for what is turned the most looks the worst until it may turn. Returns poses (k,4,4), opening
    (k,).
    """
    hand = part(model, model.slide == 0)
    # each: the distances of its ICP, model points, hypotheses that are left, slack of its judge
    rounds = (((0.06,), 80, shifted or len(poses), 0.03), ((0.05,), 80, 5 * keep, 0.03),
              ((0.05, 0.03), 120, 2 * keep, 0.02), ((0.03, 0.015), 250, keep, 0.0))
    for i, (distances, count, rest, slack) in enumerate(rounds):
        none = np.zeros(len(poses))
        poses = refine(hand, scene, cloud, poses, none, distances, count, 0.3 if slack else 0.1, None, 3,
                       shift_only=i == 0)
        score = evidence(compare(hand, scene, poses, none, count, shell=not slack), slack).score
        score = score * max(1, len(hand.points) / count) - cost(poses)
        if score.max() > CLEAR and slack < 0.03:          # then it is one of these
            poses, score = poses[score > score.max() / 3], score[score > score.max() / 3]
        best = distinct(poses, score, rest)
        poses, score = poses[best], score[best]
    openings = np.full(len(poses), before)
    for i in np.flatnonzero(score > score.max() - 60):
        openings[i] = likeliest(finger_profile(model, scene, poses[i]), before)
    return poses, openings


def distinct(poses, score, keep):
    """Which (k,) are the best `keep` poses, no two of them within 5 mm and 5 degrees of each other."""
    apart = np.linalg.norm(poses[:, None, :3, 3] - poses[:, :3, 3], axis=-1)                # (K,K)
    cosine = (np.einsum("aij,bij->ab", poses[:, :3, :3], poses[:, :3, :3]) - 1) / 2
    same = (apart < 0.005) & (cosine > np.cos(np.radians(5)))
    chosen = []
    for i in np.argsort(-score):
        if len(chosen) < keep and not same[i, chosen].any():
            chosen.append(i)
    return chosen


def polish(model, scene, cloud, pose, opening):
    """The final fit of one pose (4,4).

    A view whose points lie off the common fit counts less: weight 1 / (sigma^2 + rmse^2), sigma = 3 mm.
    """
    view_weight = np.ones(len(scene.depth))
    for distance in (0.015, 0.01):
        pose = refine(model, scene, cloud, pose[None], np.array([opening]), (distance,), None, 0.03, view_weight)[0]
        seen = compare(model, scene, pose[None], [opening])
        gap = np.where(seen.visible & ~seen.still & (np.abs(seen.gap) < 2 * AGREE), seen.gap, np.nan)[0]
        rmse = np.array([np.sqrt(np.nanmean(g**2)) if np.isfinite(g).sum() > 10 else 0.01 for g in gap])
        view_weight = 1 / (0.003**2 + rmse**2)
        view_weight /= view_weight.max()
    return pose


def inliers(model, cloud, seen, pose, opening):
    """fitness and inlier_rmse, m, of a pose that `compare` saw: of the model points that are visible and not hidden,
    those with a measured point within 1 cm."""
    shown = (seen.visible & ~(seen.gap < -OCCLUDED)).any(1)[0]
    distance = cloud.tree.query(transform(at_opening(model, [opening])[0][shown], pose), distance_upper_bound=0.01)[0]
    inlier = np.isfinite(distance)
    return inlier.sum() / max(len(distance), 1), np.sqrt((distance[inlier]**2).mean()) if inlier.any() else np.nan


# ----------------------------------------------------------------------------------------------------- the fingers

def finger_profile(model, scene, pose):
    """How well the fingers fit at each of WIDTHS, given gripper_in_ref: finger points that agree less those that
    should be seen and are not. Flat where the hand, or what it holds, hides them."""
    if not model.slide.any():
        return np.zeros(len(WIDTHS))
    fingers = part(model, model.slide != 0)
    seen = compare(fingers, scene, np.repeat(pose[None], len(WIDTHS), 0), WIDTHS, strict=True)
    pixel = np.linalg.norm(pose[:3, 3] - scene.view_in_ref[0, :3, 3]) / scene.intrinsics[0, 0, 0]
    tolerance = max(FINGER_AGREE, 3 * scene.noise, pixel)
    gap = np.where(seen.visible, seen.gap, np.nan)
    agree = np.where(np.abs(gap) < tolerance, 1 - (gap / tolerance)**2, 0).sum((1, 2))
    profile = agree - (gap > tolerance).sum((1, 2))
    return profile / 2 if scene.noise > NOISY else profile   # noisy neighbours are not independent votes


def likeliest(profile, before):
    """The width, m, at the profile's peak; `before` where nothing speaks clearly for another."""
    profile = profile - np.abs(WIDTHS - before) / 0.02
    return WIDTHS[np.argmax(profile)] if np.ptp(profile) > 6 else before


def slide_fingers(model, scene, cloud, pose, opening):
    """The opening to a fraction of a millimetre: ICP of the visible finger points along y. None where few are seen."""
    fingers = part(model, model.slide != 0)
    if not len(fingers.points):
        return None
    seen = compare(fingers, scene, pose[None], [opening])
    shown = (seen.visible[0] & (np.abs(seen.gap[0]) < 0.02)).any(0)
    normals = fingers.normals[shown] @ pose[:3, :3].T
    along = (normals @ pose[:3, 1]) * fingers.slide[shown]                 # n . d(point) / d(opening)
    start = opening
    for _ in range(6):
        points = transform(at_opening(fingers, [opening])[0][shown], pose)
        distance, index = cloud.tree.query(points, distance_upper_bound=0.012)
        ok = np.isfinite(distance)
        w = robust(distance[ok], 0.012, "tukey") * (np.abs(along[ok]) > 0.2)
        if w.sum() < 2:
            return None
        residual = ((cloud.points[index[ok]] - points[ok]) * normals[ok]).sum(-1)
        a = along[ok]
        opening = float(np.clip(opening + (w * a * residual).sum() / (w * a * a).sum(),
                                max(0, start - 0.006), min(STROKE, start + 0.006)))
    return opening


def share_found(scene, points):
    """The share of points (N,3) in ref that lie on what some view measures, within AGREE along its ray."""
    found = np.zeros(len(points), bool)
    for v in range(len(scene.depth)):
        y, x, z, inside = look_up(scene, v, points)
        found |= inside & (np.abs(scene.depth[v, y, x] - z) < AGREE)
    return found.mean()


def comes_along(model, scene, after, state, next_state):
    """What became of the things between the fingertips, from one frame to the next: 1 they went with the hand, so that
    they were held; -1 they stayed behind, so that nothing is held now; 0 it can't be told.

    scene, state: of the one frame; after, next_state: of the next. Points that went are found again where the hand's
    motion takes them and not where they were; a table's are in both places.
    """
    pose, moved = state.pose, next_state.pose
    if state.lost or next_state.lost or not model.slide.any() or np.linalg.norm(moved[:3, 3] - pose[:3, 3]) < GONE:
        return 0
    near = (scene.depth > 0) & in_cube(scene.points, pose[:3, 3], 0.2)
    in_gripper = transform(scene.points[near].astype(float), invert(pose))
    x, y, z = in_gripper.T
    in_gripper = in_gripper[(np.abs(x) < 0.03) & (np.abs(y) < STROKE / 2) & (z > 0.07) & (z < 0.15)]
    fingers = cKDTree(at_opening(model, [state.opening])[0])
    in_gripper = in_gripper[fingers.query(in_gripper)[0] > 0.01]
    if len(in_gripper) < 10:
        return 0
    went, stayed = (share_found(after, transform(in_gripper, where)) for where in (moved, pose))
    return int(went > 0.3 and went - stayed > 0.25) - int(stayed - went > 0.5)


def opening_path(profiles, speed, first):
    """The likeliest widths (F,) of a whole video: the Viterbi path through the frames' profiles (F,W).

    speed (F-1,) m, how far the hand moved between two frames: fingers close and open while it rests, so that an event
    which no view shows is put where the hand moved least. first: the width at frame 0, m.
    """
    change = np.abs(np.subtract.outer(WIDTHS, WIDTHS))                                       # (W,W)
    total = -(((WIDTHS - first) / WIDTHS[1])**2)
    back = []
    for profile, moved in zip(profiles[1:], speed):
        event = 3 + 4 * min(moved / 0.1, 1)
        options = total - event * np.minimum(change / 0.01, 1) - change / 0.04              # (W now, W before)
        back.append(options.argmax(1))
        total = options.max(1) + profile
    path = [total.argmax()]
    for previous in reversed(back):
        path.append(previous[path[-1]])
    return WIDTHS[path[::-1]]


# ------------------------------------------------------------------------------------- the first frame, and the rest

def all_rotations(count):
    """`count` rotations spread evenly over SO(3): the super-Fibonacci spiral (Alexa 2022)."""
    i = np.arange(count) + 0.5
    r, R = np.sqrt(i / count), np.sqrt(1 - i / count)
    a, b = 2 * np.pi * i / np.sqrt(2), 2 * np.pi * i / 1.533751168755204288118041
    return Rotation.from_quat(np.stack([r * np.sin(a), r * np.cos(a), R * np.sin(b), R * np.cos(b)], 1)).as_matrix()


def fan(limit, count):
    """The identity and those of `count` rotations over SO(3) that turn by at most `limit` degrees: (R,3,3)."""
    turns = all_rotations(count)
    angle = np.degrees(np.arccos(((np.trace(turns, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)))
    return np.concatenate([np.eye(3)[None], turns[angle < limit]])


SPEED, FARTHEST = 0.6, 0.45  # m/s, how fast a hand may move, and m, how far it is looked for
# What is searched until something fits: turns (R,3,3), hypotheses, how many are left when they have shifted, score a
# point in view. 90 degrees/s are 45 at 2 Hz.
SEARCHES = (fan(0, 1), 32, 18, WELL), (fan(45, 600), 64, 64, 0.6), (fan(85, 1000), 96, 96, 0.6)


def register(model, scene, mask, rotations=200):
    """The first pose from masks (V,H,W) of the gripper alone.

    Returns poses (2,4,4) gripper_in_ref, the better one first: the hand looks nearly the same after half a turn about
    its approach axis, so that both are solutions; opening, m; their scores (2,), in model points. None if fewer than
    20 points are masked.
    """
    # outside the mask there is no hand: as good as scenery
    scene = SimpleNamespace(**{**vars(scene), "still": ~mask})
    gather(scene)
    if len(scene.candidates.points) < 20:
        return None
    centre = np.median(scene.candidates.points, axis=0)
    cloud = nearby(scene, centre, 0.4, 3000)
    cost = lambda poses: 300 * unexplained(model, cloud, poses, np.full(len(poses), 0.04))
    hand = part(model, model.slide == 0)
    middle = model.points.mean(0)                         # this, not the flange, is to be in the middle of the mask
    found = []
    for some in np.array_split(all_rotations(rotations), 10):
        poses = np.concatenate([search(hand, scene, voxels(scene, centre - turn @ middle, 0.1, hand.reach), turn[None],
                                       6) for turn in some])
        found.append(settle(model, scene, cloud, poses, 0.04, 4, cost)[0])
    poses, openings = settle(model, scene, cloud, np.concatenate(found), 0.04, 8, cost)
    seen = evidence(compare(model, scene, poses, openings, shell=True))
    first = poses[np.argmax(seen.score - 300 * unexplained(model, cloud, poses, openings))]
    both = []
    for turned in (np.eye(4), HALF_TURN):
        poses, openings = settle(model, scene, cloud, (first @ turned)[None], 0.04, 1)
        pose = polish(model, scene, cloud, poses[0], openings[0])
        opening = np.array([slide_fingers(model, scene, cloud, pose, openings[0]) or openings[0]])
        score = evidence(compare(model, scene, pose[None], opening)).score \
            - 300 * unexplained(model, cloud, pose[None], opening)
        both.append((score[0], opening[0], pose))
    both.sort(key=lambda f: -f[0])
    return np.stack([both[0][2], both[1][2]]), both[0][1], np.array([both[0][0], both[1][0]])


def unexplained(model, cloud, poses, opening):
    """The share (K,) of a cloud's points that lie farther than 15 mm from the model at each pose."""
    some = cloud.points[::max(1, len(cloud.points) // 300)]
    posed = at_opening(model, opening) @ poses[:, :3, :3].mT + poses[:, None, :3, 3]
    return np.array([(cKDTree(p).query(some, distance_upper_bound=0.05)[0] > 0.015).mean() for p in posed])


def believed(seen, cost, anew=False):
    """Whether what `evidence` saw of K poses bears them out, `cost` (K,) taken off their scores: (K,) bool. `anew`,
    after a loss, nothing else speaks for the place, so that a pose has to fit better."""
    clear = seen.agree - 5 * seen.contradict              # that much of it is hidden is no reason to doubt the rest
    worth = (clear - 2 * cost) / MIN_SCORE_ANEW if anew else (clear - cost) / MIN_SCORE
    enough = MIN_AGREE * (1 + anew + seen.noisy)          # noisy neighbours are not independent votes
    return (seen.agree >= np.maximum(enough, MIN_SHARE * seen.in_view)) & (worth >= seen.in_view)


def track_one(model, scene, state, dt):
    """The next pose of one hand. state: pose, motion (of the last step, in the gripper's frame), opening, score,
    missed frames.

    First the quick way, where the hand was and where its velocity takes it; if it does not fit there, all places in
    reach; then turned by up to 45 degrees; then by up to 85. What one search found stays in the choice of the next.
    Returns a new state; where nothing is borne out, `lost` is true and the pose is held.
    """
    reach = min(SPEED * dt * (1 + state.missed), FARTHEST)
    lost = SimpleNamespace(**{**vars(state), "lost": True, "missed": state.missed + 1, "motion": np.eye(4),
                              "fitness": 0.0, "inlier_rmse": np.nan, "profile": np.zeros(len(WIDTHS)), "width": None})
    cloud = nearby(scene, state.pose[:3, 3], reach + model.reach, 6000)
    if cloud is None or scene.fluctuation > HOPELESS:
        return lost
    guesses = np.stack([state.pose, state.pose @ state.motion])
    # What the robot did before it does on: far and turned costs points, little beside those that a wrong place loses.
    cost = lambda poses: np.min([travel(poses, guess, 1 + state.missed) for guess in guesses], axis=0)
    hand = part(model, model.slide == 0)
    poses, openings = guesses, np.full(2, state.opening)
    seen = evidence(compare(model, scene, poses, openings, shell=True))
    found = seen.score.max() > 0.8 * state.score and fits_well(seen, cost(poses), WELL)
    space = None if found else voxels(scene, state.pose[:3, 3], reach, hand.reach)
    for turns, hypotheses, shifted, enough in SEARCHES:
        if found:
            break
        wide = search(hand, scene, space, state.pose[:3, :3] @ turns, hypotheses)
        if len(poses) == len(guesses):
            wide = np.concatenate([guesses, wide])
        fitted, widths = settle(model, scene, cloud, wide, state.opening, 6, cost, shifted)
        poses, openings = np.concatenate([poses, fitted]), np.concatenate([openings, widths])
        seen = evidence(compare(model, scene, poses, openings, shell=True))
        found = fits_well(seen, cost(poses), enough)
    sure = believed(seen, cost(poses), state.missed > 0)
    if not sure.any():
        poses = refine(model, scene, cloud, poses, openings, (0.03, 0.02, 0.015), 400, iterations=8)
        seen = evidence(compare(model, scene, poses, openings, shell=True))
        sure = believed(seen, cost(poses), state.missed > 0)
    # Of those that are believed, how well a point in view fits counts as much as how many do: of a hand half hidden few
    # do, and all of them well.
    worth = seen.agree - 5 * seen.contradict - 2 * cost(poses)
    best = np.argmax(np.where(sure, 1e4, 0) + worth * np.abs(worth) / np.maximum(seen.in_view, 1))
    opening = openings[best]
    options = np.stack([state.pose, poses[best], polish(model, scene, cloud, poses[best], opening)])
    stay, rough, fine = evidence(compare(model, scene, options, np.full(3, opening), shell=True)).score
    # a hand at rest does not drift with the noise, and a few points do not bear the finest fit
    pose = options[0 if stay >= max(rough, fine) else 1 if rough > fine + 5 else 2]
    profile = finger_profile(model, scene, pose)
    opening = likeliest(profile, state.opening)
    rendered = compare(model, scene, pose[None], np.array([opening]), shell=True)
    seen = evidence(rendered)
    if not believed(seen, cost(pose[None]), state.missed > 0)[0]:
        return lost
    fitness, rmse = inliers(model, cloud, rendered, pose, opening)
    return SimpleNamespace(
        pose=pose, motion=np.eye(4) if state.missed else invert(state.pose) @ pose, opening=opening,
        score=seen.score[0], missed=0, lost=False, gone=False, fitness=fitness, inlier_rmse=rmse, profile=profile,
        width=slide_fingers(model, scene, cloud, pose, opening))


def fits_well(seen, cost, enough):
    """Whether the best of K hypotheses, of which `evidence` said `seen`, is so good that no more are needed: `enough` a
    point in view."""
    best = np.argmax(seen.score - cost)
    return seen.score[best] - cost[best] > enough * seen.in_view[best] and seen.agree[best] > MIN_AGREE


def travel(poses, guess, frames):
    """(K,) model points that it costs a pose to be away from `guess`, which is `frames` frames old: 10 at 15 cm or 30
    degrees a frame, four times that at twice; no hand turns by more than 90."""
    shift = np.linalg.norm(poses[:, :3, 3] - guess[:3, 3], axis=1) / frames
    cosine = (np.einsum("kij,ij->k", poses[:, :3, :3], guess[:3, :3]) - 1) / 2
    turn = np.degrees(np.arccos(cosine.clip(-1, 1)))
    return 10 * (shift / 0.15)**2 + 10 * (turn / min(frames, 2) / 30)**2 + 1e4 * (turn > 90)


def overlap(a, b):
    """Whether two hands, gripper_in_ref (4,4) each, would be in each other's place: palms nearer than 7 cm."""
    palm = np.array([0, 0, 0.05])
    return np.linalg.norm(transform(palm, a) - transform(palm, b)) < 0.07


def claim(model, scene, state):
    """Candidate points of a scene that lie on a tracked hand are given to no other."""
    c = scene.candidates
    close = np.flatnonzero(in_cube(c.points, state.pose[:3, 3], model.reach + 0.02))
    if len(close):
        posed = transform(at_opening(model, [state.opening])[0], state.pose)
        taken = close[np.isfinite(cKDTree(posed).query(c.points[close], distance_upper_bound=0.012)[0])]
        scene.still[c.view[taken], c.row[taken], c.column[taken]] = True
        keep = np.ones(len(c.points), bool)
        keep[taken] = False
        scene.candidates = SimpleNamespace(**{name: value[keep] for name, value in vars(c).items()})


def first_state(pose, opening):
    return SimpleNamespace(pose=pose, motion=np.eye(4), opening=float(opening), score=0.0, missed=0,
                           lost=False, gone=False, held=0, fitness=1.0, inlier_rmse=0.0,
                           profile=np.zeros(len(WIDTHS)), width=opening)


def track(prediction, init="auto", model=None, progress=False):
    """Track every gripper of a 4D video.

    prediction: a dict with the arrays of prediction.npz (rgb (V,T,H,W,3) uint8, points (V,T,H,W,3) in ref, valid,
    intrinsics, view_in_ref, observed_rgb, observed_depth, fps, and observed_gripper_in_ref + observed_opening, or
    observed_gripper masks). init 'pose' | 'mask' | 'auto': the pose if it is known. model: of hand_model or make_model.
    Returns the arrays of trajectory.npz: gripper_in_ref (F,A,4,4), gripper_motion (T,A,4,4) from the first frame in
    the gripper's own frame, opening (F,A) m, closed (F,A), fitness (F,A), inlier_rmse (F,A) m, lost (F,A),
    fluctuation (F,) m of the depth of what does not move, above HOPELESS of which all is lost; from masks
    also symmetric_gripper_in_ref (F,A,4,4), the other solution, and symmetry_score (A,2). A frame that is lost holds
    the last pose. Raises ValueError naming the key that is missing or has the wrong shape.
    """
    p = check(prediction)
    model = model or hand_model()
    if init == "auto":
        init = "pose" if "observed_gripper_in_ref" in p else "mask"
    need = ("observed_gripper_in_ref", "observed_opening") if init == "pose" else ("observed_gripper",)
    missing = [key for key in need if key not in p]
    if missing:
        raise ValueError(f"the prediction has no '{missing[0]}': --init {init} needs it (try the other --init)")
    V, T = p["points"].shape[:2]
    own, valid = point_maps(p["observed_depth"], p["intrinsics"].astype(np.float32))
    observed = make_scene(transform(own, p["view_in_ref"].astype(np.float32)), valid, p["intrinsics"], p["view_in_ref"])

    extra = {}
    if init == "pose":
        poses, openings = np.array(p["observed_gripper_in_ref"], float), p["observed_opening"]
        masks = p.get("observed_gripper")
    else:
        masks = p["observed_gripper"]
        found = [register(model, observed, masks[:, a]) for a in range(masks.shape[1])]
        poses = np.stack([np.full((4, 4), np.nan) if f is None else f[0][0] for f in found])
        openings = np.array([0.0 if f is None else f[1] for f in found])
        extra["symmetry_score"] = np.stack([np.zeros(2) if f is None else f[2] for f in found])
    A = len(poses)
    models, states = [], []
    here, maybe = np.zeros(observed.depth.shape, bool), np.zeros(observed.depth.shape, bool)
    for a in range(A):
        known = np.isfinite(poses[a]).all()
        state = first_state(poses[a] if known else np.eye(4), openings[a])
        state.lost = state.gone = not known
        models.append(add_mount(model, observed, state.pose, state.opening) if known and np.any(model.slide) else model)
        if known:
            here |= silhouette(model, observed, state.pose, state.opening)
            on_hand, in_line = belongs(models[a], observed, state.pose, state.opening)
            here |= on_hand
            maybe |= in_line
            seen = evidence(compare(models[a], observed, state.pose[None], np.array([state.opening])))
            state.score = seen.score[0]
            # A given pose that no view shows is believed, one that the views see through is not.
            state.lost = bool(seen.contradict[0] > seen.agree[0])
            state.missed = int(state.lost)
        states.append(state)
    if masks is not None:
        here |= masks.any(1)
    here = binary_dilation(here, np.ones((1, 3, 3), bool))

    frames, last, fluctuation = [states], observed, [0.0]
    for t in tqdm(range(T), desc="tracking", unit="frame", disable=not progress):
        # no scenery: where the hands were, and what lay in line with them and looks different now
        other = here.copy()
        other[maybe] |= np.abs(p["rgb"][:, t][maybe].astype(int) - p["observed_rgb"][maybe]).max(-1) > RECOLOURED
        points, valid = steady(p["points"][:, t], p["valid"][:, t], observed), p["valid"][:, t]
        scene = make_scene(points, valid, p["intrinsics"], p["view_in_ref"], observed, other)
        before, states = states, [s if s.gone else track_one(m, scene, s, 1 / p["fps"]) for m, s in zip(models, states)]
        for a, b in combinations(range(A), 2):
            if not (states[a].lost or states[b].lost) and overlap(states[a].pose, states[b].pose):
                # two hands in one place: it is the one's that was not lost, or had the shorter way; the other looks
                # again
                way = lambda i: (before[i].missed, travel(states[i].pose[None], before[i].pose, 1)[0])
                owner, other = (a, b) if way(a) <= way(b) else (b, a)
                claim(model, scene, states[owner])
                states[other] = track_one(models[other], scene, before[other], 1 / p["fps"])
        for m, s, next_state in zip(models, frames[-1], states):
            next_state.held = comes_along(m, last, scene, s, next_state)
        frames.append(states)
        fluctuation.append(scene.fluctuation)
        last = scene

    collect = lambda name: np.array([[getattr(s, name) for s in states] for states in frames])
    gripper_in_ref, lost = collect("pose"), collect("lost")
    opening, fingers = openings_of(frames)
    if "symmetry_score" in extra:
        extra["symmetric_gripper_in_ref"] = gripper_in_ref @ HALF_TURN
    return dict(gripper_in_ref=gripper_in_ref, gripper_motion=invert(gripper_in_ref[:1]) @ gripper_in_ref[1:],
                opening=opening, closed=closed_flags(opening), fingers=fingers, lost=lost,
                fitness=collect("fitness"), inlier_rmse=collect("inlier_rmse"), fluctuation=np.array(fluctuation),
                **extra)


def belongs(model, scene, pose, opening):
    """What may move with the hand, and so is no scenery, (V,H,W) bool each: the hand itself; and what is behind or
    ahead of it, its forearm and what it holds: a hand may come to lie where these were."""
    c = scene.candidates
    in_gripper = transform(c.points, invert(pose))
    near = in_cube(c.points, pose[:3, 3], model.reach + 0.02)
    posed = cKDTree(at_opening(model, [opening])[0])
    near[near] = np.isfinite(posed.query(in_gripper[near], distance_upper_bound=0.02)[0])
    z, beside = in_gripper[:, 2], np.hypot(*in_gripper[:, :2].T) < 0.12
    masks = np.zeros((2, *scene.depth.shape), bool)
    masks[:, c.view, c.row, c.column] = near, beside & (z > -0.4) & (z < 0.25) & bool(np.any(model.slide))
    return masks


def silhouette(model, scene, pose, opening):
    """(V,H,W) bool, the pixels that the whole model covers in every view, hidden or not."""
    H, W = scene.depth.shape[1:]
    vertices = model.vertices.copy()
    vertices[:, 1] += opening * model.vertex_slide
    vertices_in_cam = np.stack([transform(transform(vertices, pose), ref_in_cam) for ref_in_cam in scene.ref_in_view])
    return rasterize(vertices_in_cam, model.faces, scene.intrinsics, H, W)[0] > 0


def openings_of(frames):
    """Openings (F,A) m of the states of all frames, and how clearly (F,A) the fingers are seen, in model points."""
    profiles = np.array([[s.profile for s in states] for states in frames])                 # (F,A,W)
    fingers = np.ptp(profiles, axis=-1)
    held = np.array([[s.held for s in states] for states in frames])
    came, left = held > 0, held < 0
    steps = came + np.append(came[1:], np.zeros_like(came[:1]), 0).astype(int)              # before and after a frame
    unseen = fingers < UNSEEN
    profiles -= (steps * unseen)[..., None] * GRASPED + (left * unseen)[..., None] * LET_GO
    position = np.array([[s.pose[:3, 3] for s in states] for states in frames])
    speed = np.linalg.norm(np.diff(position, axis=0), axis=-1)                              # (F-1,A)
    opening = np.stack([opening_path(profiles[:, a], speed[:, a], frames[0][a].opening)
                        for a in range(profiles.shape[1])], 1)
    for t, states in enumerate(frames):
        for a, s in enumerate(states):
            if s.width is not None and abs(s.width - opening[t, a]) < 0.003:        # finer, between two WIDTHS
                opening[t, a] = s.width
    return opening, fingers


def closed_flags(opening):
    """(F,A) bool with hysteresis: closed when the fingers came EVENT nearer than the widest since they opened, open
    again when they parted by EVENT from the narrowest since they closed. No width is fixed, so that a grasped apple
    counts as a grasped sheet."""
    closed = np.zeros(opening.shape, bool)
    for a in range(opening.shape[1]):
        state, extreme = opening[0, a] < STROKE / 2, opening[0, a]
        for t, width in enumerate(opening[:, a]):
            extreme = min(extreme, width) if state else max(extreme, width)
            if abs(width - extreme) > EVENT:
                state, extreme = not state, width
            closed[t, a] = state
    return closed


# --------------------------------------------------------------------------------------------------------- files

def check(p):
    """The arrays of a prediction, shapes checked."""
    shape = np.shape(p.get("points", ()))
    if len(shape) != 5 or shape[-1] != 3:
        raise ValueError(f"the prediction's 'points' has shape {shape}, expected (V,T,H,W,3): an RGB-only model "
                         "cannot be tracked")
    V, T, H, W, _ = shape
    for key, want in dict(
        rgb=(V, T, H, W, 3), valid=(V, T, H, W), intrinsics=(V, 3, 3), view_in_ref=(V, 4, 4),
        observed_rgb=(V, H, W, 3), observed_depth=(V, H, W)
    ).items():
        if np.shape(p.get(key, ())) != want:
            raise ValueError(f"the prediction's '{key}' has shape {np.shape(p.get(key, ()))}, expected {want}")
    return {"fps": 2.0, **p}


def load_prediction(path):
    """prediction.npz -> dict of arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file}
    except FileNotFoundError:
        raise ValueError(f"--prediction {path}: no such file (sample.py writes it)") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--prediction {path} is no readable npz file ({str(error).splitlines()[0]})") from None


def episode_prediction(folder, cameras, stride=None, start=0, frames=None):
    """A packed episode as a perfect prediction: its true pointmaps in prediction.npz's keys, and the true path.

    cameras: V camera numbers counted from 0, the reference first; stride: raw frames a step, default what makes 2 Hz.
    """
    episode = load_episode(folder)
    cameras = list(cameras)
    if min(cameras) < 0 or max(cameras) >= len(episode.rgb):
        raise ValueError(f"--cameras: {folder} has cameras 0 to {len(episode.rgb) - 1}")
    stride = stride or max(1, round(episode.rate_hz / 2))
    times = np.arange(start, episode.rgb.shape[1], stride)[:None if frames is None else frames + 1]
    if len(times) < 2:
        raise ValueError(f"{folder} has {episode.rgb.shape[1]} frames: too few for --stride {stride}")
    world_in_ref = invert(episode.cam_in_world[cameras[0], times[0]])
    views_in_ref = world_in_ref @ episode.cam_in_world[cameras][:, times]                   # (V,F,4,4)
    depth = np.stack([episode.depth[c, times] for c in cameras]) / np.float32(1000)
    own, valid = point_maps(depth, episode.intrinsics[cameras][:, None].astype(np.float32))
    points = transform(own, views_in_ref.astype(np.float32))
    rgb, label = (np.stack([x[c, times] for c in cameras]) for x in (episode.rgb, episode.label))
    grippers = world_in_ref @ episode.gripper_in_world[times]
    arms = grippers.shape[1]
    return dict(
        rgb=rgb[:, 1:], points=points[:, 1:], valid=valid[:, 1:], intrinsics=episode.intrinsics[cameras],
        view_in_ref=views_in_ref[:, 0], observed_rgb=rgb[:, 0], observed_depth=depth[:, 0],
        observed_gripper=np.stack([label[:, 0] == g for g in (RIGHT_GRIPPER, LEFT_GRIPPER)[:arms]], 1),
        observed_object=label[:, 0] == OBJECT, observed_gripper_in_ref=grippers[0],
        observed_opening=episode.gripper_opening[times[0]], fps=episode.rate_hz / stride,
        ref_in_world=invert(world_in_ref), true_gripper_in_ref=grippers, true_opening=episode.gripper_opening[times])


def object_prediction(p, mesh, pose_file=None):
    """The prediction with `--object`'s mask or pose in the gripper's place, and the mesh as a model with one rigid
    body."""
    vertices, faces = load_mesh(mesh)
    of_hands = ("observed_gripper", "observed_gripper_in_ref", "observed_opening", "true_gripper_in_ref",
                "true_opening")
    p = {key: value for key, value in p.items() if key not in of_hands}
    if pose_file:
        pose = np.loadtxt(pose_file)
        if pose.shape != (4, 4):
            raise ValueError(f"--object_pose {pose_file}: shape {pose.shape}, expected four lines of four numbers "
                             "(object_in_ref)")
        p |= dict(observed_gripper_in_ref=pose[None], observed_opening=np.zeros(1))
    elif "observed_object" in p:
        p["observed_gripper"] = p["observed_object"][:, None]
    else:
        raise ValueError("--object needs its first pose (--object_pose FILE) or a prediction with masks "
                         "'observed_object' (V,H,W)")
    return p, make_model([(vertices, faces, 0.0)], [800])


def load_extrinsics(path):
    """--extrinsics: an npz with ref_in_world (4,4), the reference camera's pose at the observed frame."""
    with np.load(path, allow_pickle=False) as file:
        if "ref_in_world" not in file or file["ref_in_world"].shape != (4, 4):
            raise ValueError(f"--extrinsics {path}: an array 'ref_in_world' of shape (4,4) is needed")
        return file["ref_in_world"]


# ------------------------------------------------------------------------------------------------------ pictures

COLORS = np.array([[255, 120, 0], [0, 150, 255]])


def overlay(path, p, trajectory, model):
    """A gif: every frame of every view with the tracked hand's outline, orange right, blue left, grey where it is
    lost."""
    frames = []
    rgb = np.concatenate([p["observed_rgb"][:, None], p["rgb"]], 1)
    H, W = rgb.shape[2:4]
    scale = max(1, round(256 / H))
    large = p["intrinsics"].copy()
    large[:, :2] *= scale
    large[:, :2, 2] += (scale - 1) / 2                    # pixel centres are at integers
    big = SimpleNamespace(depth=np.zeros((len(rgb), H * scale, W * scale)), intrinsics=large,
                          ref_in_view=invert(p["view_in_ref"]))
    for t in range(rgb.shape[1]):
        picture = rgb[:, t].repeat(scale, 1).repeat(scale, 2)
        for a in range(trajectory["lost"].shape[1]):
            pose = trajectory["gripper_in_ref"][t, a]
            if np.isfinite(pose).all():
                mask = silhouette(model, big, pose, trajectory["opening"][t, a])
                edge = mask & ~np.stack([binary_dilation(~m, iterations=2) == 0 for m in mask])
                picture[edge] = (128, 128, 128) if trajectory["lost"][t, a] else COLORS[a % 2]
        frames.append(np.concatenate(list(picture), 1))
    imageio.imwrite(path, frames, duration=500, loop=0)
    return frames


def plot(path, p, trajectory):
    """A png: position and opening of every hand over time, the truth dashed where it is known, lost frames grey."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    A = trajectory["lost"].shape[1]
    time = np.arange(len(trajectory["lost"])) / p["fps"]
    figure, axes = plt.subplots(2, A, figsize=(6 * A, 6), sharex=True, squeeze=False, layout="constrained")
    for a in range(A):
        for i, name in enumerate("xyz"):
            line, = axes[0, a].plot(time, trajectory["gripper_in_ref"][:, a, i, 3], "o-", label=name, markersize=3)
            if "true_gripper_in_ref" in p:
                axes[0, a].plot(time, p["true_gripper_in_ref"][:len(time), a, i, 3], "--", color=line.get_color())
        axes[1, a].plot(time, 1000 * trajectory["opening"][:, a], "o-k", markersize=3)
        if "true_opening" in p:
            axes[1, a].plot(time, 1000 * p["true_opening"][:len(time), a], "--k")
        axes[1, a].fill_between(time, 0, 80, where=trajectory["closed"][:, a], step="mid", alpha=0.15, label="closed")
        for t in time[trajectory["lost"][:, a]]:
            for axis in axes[:, a]:
                axis.axvspan(t - 0.4 / p["fps"], t + 0.4 / p["fps"], color="0.8", lw=0)
        axes[0, a].set(title=f"hand {a} ({('right', 'left')[a % 2]}); grey: lost; dashed: truth",
                       ylabel="gripper_in_ref, m")
        axes[1, a].set(xlabel="time, s", ylabel="opening, mm", ylim=(-3, 85))
        axes[0, a].legend()
        axes[1, a].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(p, trajectory):
    """What was tracked, and how far off where the truth is known."""
    restless = trajectory["fluctuation"] > HOPELESS
    if restless.any():
        print(f"in {restless.sum()} of {len(restless)} frames the depth of what does not move fluctuates by more than "
              f"{1000 * HOPELESS:.0f} mm: too much to tell where a hand is, which counts as lost")
    for a in range(trajectory["lost"].shape[1]):
        lost = trajectory["lost"][:, a]
        line = f"hand {a}: {len(lost) - lost.sum()} of {len(lost)} frames tracked"
        if lost.any():
            line += f", lost at {np.flatnonzero(lost).tolist()}"
        if "symmetry_score" in trajectory:
            line += ", scores of the two half turns {:.0f} and {:.0f}".format(*trajectory["symmetry_score"][a])
        if "true_gripper_in_ref" in p and (~lost).any():
            true, got = p["true_gripper_in_ref"][:, a][~lost], trajectory["gripper_in_ref"][:, a][~lost]
            shift = np.linalg.norm(got[:, :3, 3] - true[:, :3, 3], axis=1)
            cosine = ((true[:, :3, :3] * got[:, :3, :3]).sum((1, 2)) - 1) / 2
            width = np.abs(trajectory["opening"][:, a] - p["true_opening"][:, a])[~lost]
            line += (f"; median error {1000 * np.median(shift):.1f} mm, "
                     f"{np.degrees(np.arccos(np.median(cosine).clip(-1, 1))):.1f} degrees, "
                     f"opening {1000 * np.median(width):.1f} mm")
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prediction", help="prediction.npz of sample.py")
    source.add_argument("--episode", help="a packed episode of data.py: its true pointmaps are tracked")
    add = parser.add_argument
    add("--cameras", type=int, nargs="+", default=[12, 13], help="of --episode, counted from 0, the reference first")
    add("--stride", type=int, help="of --episode, recorded frames a step [what makes 2 Hz]")
    add("--init", choices=("auto", "pose", "mask"), default="auto",
        help="first frame from the robot's own pose or from masks")
    add("--hand", help="mesh of the hand without fingers, metres, hand frame [built-in]")
    add("--finger", help="mesh of the left finger at opening 0, metres, hand frame [built-in]")
    add("--object", help="mesh of another rigid thing to be tracked instead, metres")
    add("--object_pose", help="text file, 4 x 4 object_in_ref at the observed frame [from its mask]")
    add("--extrinsics", help="npz with ref_in_world (4,4): adds gripper_in_world")
    add("--out", help="folder [beside the prediction, or runs/track for an episode]")
    args = parser.parse_args()
    if args.episode:
        p = episode_prediction(args.episode, args.cameras, args.stride)
    else:
        p = load_prediction(args.prediction)
    out = Path(args.out or (Path(args.prediction).parent if args.prediction else "runs/track"))
    if args.object:
        p, model = object_prediction(p, args.object, args.object_pose)
    else:
        model = hand_model(args.hand, args.finger)
    trajectory = track(p, args.init, model, progress=sys.stderr.isatty())
    if args.extrinsics:
        trajectory["gripper_in_world"] = load_extrinsics(args.extrinsics) @ trajectory["gripper_in_ref"]
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "trajectory.partial.npz", **trajectory)
    (out / "trajectory.partial.npz").rename(out / "trajectory.npz")
    report(p, trajectory)
    overlay(out / "overlay.gif", p, trajectory, model)
    plot(out / "path.png", p, trajectory)
    print(f"{out}/trajectory.npz, overlay.gif, path.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"track.py: {error}")
