"""Neighbours on a GPU, in Triton: cells by a hash of their places, rows of neighbours, and the edges they make.

Atoms are sorted by the bucket of their cell, so that a lookup is two loads, whatever the extent of a system, and any
number of systems shares one table. Each atom looks into the cells around its own. The vector of a pair is computed as
(w_i - w_j) - image, each operation of which changes its sign exactly with the direction, so both directions of a pair
are found or neither.

| | |
|---|---|
| N, A | atoms, and with ghosts behind them, A >= N |
| M | places in a row of neighbours |
| ``cells`` (S, 18) | lattice vectors, open ones filled in, and their inverse, float64 |
| ``sizes`` (S, 8) | cells along each vector, cells to look into on each side, bits of open vectors, 1 if it is flat |
| ``limits`` (8,) | radius of the list and its square, squares of cutoff and lower cutoff, closest distance, square of |
| | how far an atom may move, cells per Å along open directions |
| ``moved`` (A, 3) | positions less whole lattice vectors, ``home`` (A, 3) |
| ``key``, ``bucket`` (N,) | place of an atom's cell, and the entry of the table it falls into |
| ``near``, ``image`` (N, M) | atoms of the list, and in which periodic image |
| ``notes`` (4,) | edges, pairs, the longest row, and whether a box is flat |
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["edges", "lattices", "measured", "moves", "places", "rows"]

#: Bits of a cell's number along a direction; those farther apart than any search looks share one.
PLACE: tl.constexpr = tl.constexpr((1 << 21) - 1)
#: Images are counted from here, along each lattice vector in ten bits.
HOME: tl.constexpr = tl.constexpr(512)


@triton.jit
def cross(ax, ay, az, bx, by, bz):
    """The product a × b."""
    return ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx


@triton.jit
def filled(x, y, z, has, ux, uy, uz, has_u, vx, vy, vz, has_v, AXIS: tl.constexpr):
    """A lattice vector, or if it is zero, a unit vector orthogonal to the two others; see ``lattice.completed``."""
    ox, oy, oz = tl.where(has_u, ux, vx), tl.where(has_u, uy, vy), tl.where(has_u, uz, vz)
    ax, ay, az = tl.abs(ox), tl.abs(oy), tl.abs(oz)
    is_x = (ax <= ay) & (ax <= az)
    is_y = (ay <= az) & (is_x == 0)
    one = tl.full(x.shape, 1.0, tl.float64)
    zero = one * 0.0
    both = has_u & has_v
    cx = tl.where(both, vx, tl.where(is_x, one, zero))
    cy = tl.where(both, vy, tl.where(is_y, one, zero))
    cz = tl.where(both, vz, tl.where((is_x | is_y) == 0, one, zero))
    nx, ny, nz = cross(ox, oy, oz, cx, cy, cz)
    none = (has_u | has_v) == 0
    nx = tl.where(none, one if AXIS == 0 else zero, nx)
    ny = tl.where(none, one if AXIS == 1 else zero, ny)
    nz = tl.where(none, one if AXIS == 2 else zero, nz)
    size = tl.sqrt(nx * nx + ny * ny + nz * nz)
    size = tl.where(size > 0, size, one)
    return tl.where(has, x, nx / size), tl.where(has, y, ny / size), tl.where(has, z, nz / size)


@triton.jit
def lattices(
    box, cells, sizes, limits, S, STRIDE, MOST_IMAGES, MOST_ALONG, INFINITE: tl.constexpr, BLOCK: tl.constexpr
):
    """What the search has to know of each lattice; one without volume, or with too many images, is taken as open."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = s < S
    b = box + s * STRIDE
    ax, ay, az = (
        tl.load(b, m, 0).to(tl.float64),
        tl.load(b + 1, m, 0).to(tl.float64),
        tl.load(b + 2, m, 0).to(tl.float64),
    )
    bx, by, bz = (
        tl.load(b + 3, m, 0).to(tl.float64), tl.load(b + 4, m, 0).to(tl.float64), tl.load(b + 5, m, 0).to(tl.float64)
    )  # fmt: skip
    cx, cy, cz = (
        tl.load(b + 6, m, 0).to(tl.float64), tl.load(b + 7, m, 0).to(tl.float64), tl.load(b + 8, m, 0).to(tl.float64)
    )  # fmt: skip
    has_a = (ax != 0) | (ay != 0) | (az != 0)
    has_b = (bx != 0) | (by != 0) | (bz != 0)
    has_c = (cx != 0) | (cy != 0) | (cz != 0)
    yes = has_a | (has_a == 0)
    ax, ay, az = filled(ax, ay, az, has_a, bx, by, bz, has_b, cx, cy, cz, has_c, 0)
    bx, by, bz = filled(bx, by, bz, has_b, cx, cy, cz, has_c, ax, ay, az, yes, 1)
    cx, cy, cz = filled(cx, cy, cz, has_c, ax, ay, az, yes, bx, by, bz, yes, 2)
    ux, uy, uz = cross(bx, by, bz, cx, cy, cz)
    vx, vy, vz = cross(cx, cy, cz, ax, ay, az)
    wx, wy, wz = cross(ax, ay, az, bx, by, bz)
    volume = ax * ux + ay * uy + az * uz
    most = tl.sqrt(ax * ax + ay * ay + az * az) * tl.sqrt(bx * bx + by * by + bz * bz)
    most *= tl.sqrt(cx * cx + cy * cy + cz * cz)
    is_flat = (tl.abs(volume) > 1e-9 * most) == 0  # also where a number is not finite
    one = tl.full(ax.shape, 1.0, tl.float64)
    zero = one * 0.0
    reach, per = tl.load(limits), tl.load(limits + 6)
    ha = tl.abs(volume) / tl.sqrt(ux * ux + uy * uy + uz * uz)
    hb = tl.abs(volume) / tl.sqrt(vx * vx + vy * vy + vz * vz)
    hc = tl.abs(volume) / tl.sqrt(wx * wx + wy * wy + wz * wz)
    la, lb, lc = (
        tl.where(has_a, tl.floor(reach / ha), zero),
        tl.where(has_b, tl.floor(reach / hb), zero),
        tl.where(has_c, tl.floor(reach / hc), zero),
    )
    if INFINITE:
        la, lb, lc = zero, zero, zero
    far = tl.maximum(la, tl.maximum(lb, lc))
    images = (2 * la + 1) * (2 * lb + 1) * (2 * lc + 1)
    is_flat = is_flat | ((images <= MOST_IMAGES) == 0) | ((far <= MOST_ALONG) == 0)
    has_a, has_b, has_c = has_a & (is_flat == 0), has_b & (is_flat == 0), has_c & (is_flat == 0)
    ax, ay, az = tl.where(is_flat, one, ax), tl.where(is_flat, zero, ay), tl.where(is_flat, zero, az)
    bx, by, bz = tl.where(is_flat, zero, bx), tl.where(is_flat, one, by), tl.where(is_flat, zero, bz)
    cx, cy, cz = tl.where(is_flat, zero, cx), tl.where(is_flat, zero, cy), tl.where(is_flat, one, cz)
    ux, uy, uz = tl.where(is_flat, one, ux), tl.where(is_flat, zero, uy), tl.where(is_flat, zero, uz)
    vx, vy, vz = tl.where(is_flat, zero, vx), tl.where(is_flat, one, vy), tl.where(is_flat, zero, vz)
    wx, wy, wz = tl.where(is_flat, zero, wx), tl.where(is_flat, zero, wy), tl.where(is_flat, one, wz)
    volume = tl.where(is_flat, one, volume)
    k = cells + s * 18
    tl.store(k, ax, m)
    tl.store(k + 1, ay, m)
    tl.store(k + 2, az, m)
    tl.store(k + 3, bx, m)
    tl.store(k + 4, by, m)
    tl.store(k + 5, bz, m)
    tl.store(k + 6, cx, m)
    tl.store(k + 7, cy, m)
    tl.store(k + 8, cz, m)
    tl.store(k + 9, ux / volume, m)  # by rows of the inverse: the x of all three, then y, then z
    tl.store(k + 10, vx / volume, m)
    tl.store(k + 11, wx / volume, m)
    tl.store(k + 12, uy / volume, m)
    tl.store(k + 13, vy / volume, m)
    tl.store(k + 14, wy / volume, m)
    tl.store(k + 15, uz / volume, m)
    tl.store(k + 16, vz / volume, m)
    tl.store(k + 17, wz / volume, m)
    n = sizes + s * 8
    number(n, ha, has_a, reach, per, m, INFINITE)
    number(n + 1, hb, has_b, reach, per, m, INFINITE)
    number(n + 2, hc, has_c, reach, per, m, INFINITE)
    bits = tl.where(has_a, 0, 1) + tl.where(has_b, 0, 2) + tl.where(has_c, 0, 4)
    tl.store(n + 6, bits, m)
    tl.store(n + 7, tl.where(is_flat, 1, 0), m)


@triton.jit
def number(n, height, has, reach, per, m, INFINITE: tl.constexpr):
    """Cells along a lattice vector, and how many to look into on either side."""
    one = tl.full(height.shape, 1.0, tl.float64)
    if INFINITE:
        count, away = one, one * 0.0
    else:
        count = tl.minimum(tl.maximum(tl.floor(height / (reach * (1 + 1e-9))), one), one * 1048576)
        away = tl.ceil(count * (reach / height))
        count = tl.where(has, count, one)
        away = tl.where(has, away, tl.where(per > 0, one, one * 0.0))  # open cells are as wide as the list reaches
    tl.store(n, count.to(tl.int32), m)
    tl.store(n + 3, away.to(tl.int32), m)


@triton.jit
def moves(pos, then, box, box_then, limits, flag, N, num_box, BLOCK: tl.constexpr):
    """Set the flag if an atom has moved too far, a box has changed or a number is not finite."""
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = a < N
    x = tl.load(pos + 3 * a, m, 0).to(tl.float64) - tl.load(then + 3 * a, m, 0)
    y = tl.load(pos + 3 * a + 1, m, 0).to(tl.float64) - tl.load(then + 3 * a + 1, m, 0)
    z = tl.load(pos + 3 * a + 2, m, 0).to(tl.float64) - tl.load(then + 3 * a + 2, m, 0)
    is_far = ((x * x + y * y + z * z) <= tl.load(limits + 5)) == 0
    k = a < num_box
    b = (tl.load(box + a, k, 0).to(tl.float64) == tl.load(box_then + a, k, 0)) == 0
    changed = tl.max(((is_far & m) | b).to(tl.int32), 0)
    tl.atomic_max(flag, changed)


@triton.jit
def place(f, h, is_open, count, per):
    """The number of a cell along a direction."""
    along = tl.where(is_open, tl.floor(f * per), tl.floor((f - h) * count))
    along = tl.where(is_open, along, tl.minimum(along, count - 1.0))
    along = tl.where(tl.abs(along) < 1e9, along, along * 0)
    along = tl.where(along == along, along, tl.zeros_like(along))
    return along.to(tl.int64) & PLACE


@triton.jit
def bucket_of(px, py, pz, s, MASK):
    """The entry of the table for a cell of a system."""
    h = (px * 73856093) ^ (py * 19349663) ^ (pz * 83492791) ^ (s * 26544357)
    return (h ^ (h >> 15)) & MASK


@triton.jit
def places(
    pos, batch, cells, sizes, limits, home, moved, key, bucket, then, box, box_then, flag, notes, N, A, num_box, MASK,
    HAS_BOX: tl.constexpr, SKIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bring atoms into their cells and find the buckets of these; with a skin only where the list is made again."""
    pid = tl.program_id(0)
    a = pid * BLOCK + tl.arange(0, BLOCK)
    m = a < A
    if pid == 0:
        four = tl.arange(0, 4)
        tl.store(notes + four, (four * 0).to(tl.int64))
    again = (tl.load(flag + 0 * a) != 0) if SKIN else (a >= 0)
    x = tl.load(pos + 3 * a, m, 0).to(tl.float64)
    y = tl.load(pos + 3 * a + 1, m, 0).to(tl.float64)
    z = tl.load(pos + 3 * a + 2, m, 0).to(tl.float64)
    is_real = a < N
    s = tl.load(batch + a, m, 0)
    per = tl.load(limits + 6)
    one = tl.full(x.shape, 1.0, tl.float64)
    if HAS_BOX:
        k = cells + tl.where(is_real, s, 0) * 18
        u = x * tl.load(k + 9) + y * tl.load(k + 12) + z * tl.load(k + 15)
        v = x * tl.load(k + 10) + y * tl.load(k + 13) + z * tl.load(k + 16)
        w = x * tl.load(k + 11) + y * tl.load(k + 14) + z * tl.load(k + 17)
        n = sizes + tl.where(is_real, s, 0) * 8
        bits = tl.load(n + 6)
        open_u, open_v, open_w = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0
        zero = one * 0.0
        hu = tl.where(open_u | (is_real == 0), zero, tl.floor(u))
        hv = tl.where(open_v | (is_real == 0), zero, tl.floor(v))
        hw = tl.where(open_w | (is_real == 0), zero, tl.floor(w))
        if SKIN:
            hu = tl.where(again, hu, tl.load(home + 3 * a, m, 0))
            hv = tl.where(again, hv, tl.load(home + 3 * a + 1, m, 0))
            hw = tl.where(again, hw, tl.load(home + 3 * a + 2, m, 0))
        tl.store(home + 3 * a, hu, m)
        tl.store(home + 3 * a + 1, hv, m)
        tl.store(home + 3 * a + 2, hw, m)
        pu = place(u, hu, open_u, tl.load(n).to(tl.float64), per)
        pv = place(v, hv, open_v, tl.load(n + 1).to(tl.float64), per)
        pw = place(w, hw, open_w, tl.load(n + 2).to(tl.float64), per)
        tl.store(moved + 3 * a, x - (hu * tl.load(k) + hv * tl.load(k + 3) + hw * tl.load(k + 6)), m)
        tl.store(moved + 3 * a + 1, y - (hu * tl.load(k + 1) + hv * tl.load(k + 4) + hw * tl.load(k + 7)), m)
        tl.store(moved + 3 * a + 2, z - (hu * tl.load(k + 2) + hv * tl.load(k + 5) + hw * tl.load(k + 8)), m)
    else:
        yes = is_real | (is_real == 0)
        pu, pv, pw = place(x, x, yes, one, per), place(y, y, yes, one, per), place(z, z, yes, one, per)
        tl.store(moved + 3 * a, x, m)
        tl.store(moved + 3 * a + 1, y, m)
        tl.store(moved + 3 * a + 2, z, m)
    tl.store(key + a, (pu << 42) | (pv << 21) | pw, is_real & again)
    tl.store(bucket + a, bucket_of(pu, pv, pw, s, MASK).to(tl.int32), is_real & again)
    if SKIN:
        tl.store(then + 3 * a, x, is_real & again)
        tl.store(then + 3 * a + 1, y, is_real & again)
        tl.store(then + 3 * a + 2, z, is_real & again)
        b = a < num_box
        tl.store(box_then + a, tl.load(box + a, b, 0).to(tl.float64), b & again)


@triton.jit
def turned(p, d, count, reach, is_open):
    """The cell ``d`` farther along a direction, and the periodic image it is in."""
    t = p + d
    ahead = reach + 1
    image = (t + ahead * count) // count - ahead
    image = tl.where(is_open, image * 0, image)
    return tl.where(is_open, t & PLACE, t - image * count), image


@triton.jit
def vector(x, y, z, ox, oy, oz, ix, iy, iz, k, HAS_BOX: tl.constexpr):
    """From there to here, (w_i - w_j) - image."""
    dx, dy, dz = x - ox, y - oy, z - oz
    if HAS_BOX:
        dx -= ix * tl.load(k) + iy * tl.load(k + 3) + iz * tl.load(k + 6)
        dy -= ix * tl.load(k + 1) + iy * tl.load(k + 4) + iz * tl.load(k + 7)
        dz -= ix * tl.load(k + 2) + iy * tl.load(k + 5) + iz * tl.load(k + 8)
    return dx, dy, dz


@triton.jit
def rows(
    batch, cells, sizes, limits, moved, key, order, bounds, flag, near, image, count, N, M, MASK,
    HAS_BOX: tl.constexpr, SKIN: tl.constexpr, ATOMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The list: for each atom those closer than its radius, in all images, and their number."""
    work = 1
    if SKIN:
        work = tl.load(flag)
    if work != 0:
        i = tl.program_id(0) * ATOMS + tl.arange(0, ATOMS)
        m = i < N
        s = tl.load(batch + i, m, 0)
        x, y, z = tl.load(moved + 3 * i, m, 0), tl.load(moved + 3 * i + 1, m, 0), tl.load(moved + 3 * i + 2, m, 0)
        where = tl.load(key + i, m, 0)
        pu, pv, pw = (where >> 42) & PLACE, (where >> 21) & PLACE, where & PLACE
        radius, per = tl.load(limits + 1), tl.load(limits + 6)
        k = cells + s * 18
        if HAS_BOX:
            n = sizes + s * 8
            nu, nv, nw = tl.load(n).to(tl.int64), tl.load(n + 1).to(tl.int64), tl.load(n + 2).to(tl.int64)
            ru, rv, rw = tl.load(n + 3).to(tl.int64), tl.load(n + 4).to(tl.int64), tl.load(n + 5).to(tl.int64)
            bits = tl.load(n + 6)
        else:
            nu = s * 0 + 1
            nv, nw = nu, nu
            ru = tl.where(per > 0, nu, nu * 0)
            rv, rw = ru, ru
            bits = (nu * 7).to(tl.int32)
        total = (2 * ru + 1) * (2 * rv + 1) * (2 * rw + 1)
        most = tl.max(tl.where(m, total, total * 0), 0)
        found = tl.zeros([ATOMS], tl.int32)
        for o in range(0, most):
            across = (2 * rv + 1) * (2 * rw + 1)
            rest = o % across
            cu, iu = turned(pu, o // across - ru, nu, ru, (bits & 1) != 0)
            cv, iv = turned(pv, rest // (2 * rw + 1) - rv, nv, rv, (bits & 2) != 0)
            cw, iw = turned(pw, rest % (2 * rw + 1) - rw, nw, rw, (bits & 4) != 0)
            looked_at = (cu << 42) | (cv << 21) | cw
            entry = bucket_of(cu, cv, cw, s, MASK)
            is_there = m & (o < total)
            begin, end = tl.load(bounds + entry, is_there, 0), tl.load(bounds + entry + 1, is_there, 0)
            longest = tl.max(end - begin, 0)
            for t in range(0, longest, TILE):
                q = begin[:, None] + (t + tl.arange(0, TILE))[None, :]
                is_some = q < end[:, None]
                j = tl.load(order + q, is_some, 0)
                same = is_some & (tl.load(key + j, is_some, -1) == looked_at[:, None])
                same = same & (tl.load(batch + j, is_some, -1) == s[:, None])
                ox, oy = tl.load(moved + 3 * j, same, 0), tl.load(moved + 3 * j + 1, same, 0)
                oz = tl.load(moved + 3 * j + 2, same, 0)
                dx, dy, dz = vector(
                    x[:, None], y[:, None], z[:, None], ox, oy, oz,
                    iu[:, None], iv[:, None], iw[:, None], k[:, None], HAS_BOX,
                )  # fmt: skip
                is_home = ((iu == 0) & (iv == 0) & (iw == 0))[:, None]
                is_near = same & ((dx * dx + dy * dy + dz * dz) < radius)
                is_near = is_near & (((j == i[:, None]) & is_home) == 0)
                one = is_near.to(tl.int32)
                slot = found[:, None] + tl.cumsum(one, 1) - 1
                kept = is_near & (slot < M)
                at = i[:, None] * M + slot
                tl.store(near + at, j.to(tl.int32), kept)
                code = (iu + HOME) | ((iv + HOME) << 10) | ((iw + HOME) << 20)
                tl.store(image + at, (code[:, None] + 0 * j).to(tl.int32), kept)
                found += tl.sum(one, 1)
        tl.store(count + i, found, m)


@triton.jit
def upper(j, i, iu, iv, iw):
    """Whether an edge stands for its pair: of two opposite ones the first atom is i, or i < j."""
    is_up = (iu < 0) | ((iu == 0) & (iv < 0)) | ((iu == 0) & (iv == 0) & (iw < 0))
    return (i < j) | ((i == j) & is_up)


@triton.jit
def measured(
    batch, cells, sizes, limits, moved, near, image, count, here, where, rank, counts, notes, N, A, M,
    HAS_BOX: tl.constexpr, LOOP: tl.constexpr, ATOMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Which of the list are within the cutoffs now: their rows, their numbers among pairs, and how many there are."""
    i = tl.program_id(0) * ATOMS + tl.arange(0, ATOMS)
    m, is_real = i < A, i < N
    s = tl.load(batch + i, is_real, 0)
    x = tl.load(moved + 3 * i, is_real, 0)
    y, z = tl.load(moved + 3 * i + 1, is_real, 0), tl.load(moved + 3 * i + 2, is_real, 0)
    cutoff, lower = tl.load(limits + 2), tl.load(limits + 3)
    k = cells + s * 18
    all_of_them = tl.load(count + i, is_real, 0)
    listed = tl.minimum(all_of_them, M)
    longest = tl.max(listed, 0)
    found, firsts = tl.zeros([ATOMS], tl.int32), tl.zeros([ATOMS], tl.int32)
    for t in range(0, longest, TILE):
        slot = (t + tl.arange(0, TILE))[None, :]
        is_some = slot < listed[:, None]
        at = i[:, None] * M + slot
        j, code = tl.load(near + at, is_some, 0), tl.load(image + at, is_some, 0)
        iu, iv, iw = (code & 1023) - HOME, ((code >> 10) & 1023) - HOME, ((code >> 20) & 1023) - HOME
        ox, oy = tl.load(moved + 3 * j, is_some, 0), tl.load(moved + 3 * j + 1, is_some, 0)
        oz = tl.load(moved + 3 * j + 2, is_some, 0)
        dx, dy, dz = vector(x[:, None], y[:, None], z[:, None], ox, oy, oz, iu, iv, iw, k[:, None], HAS_BOX)
        square = dx * dx + dy * dy + dz * dz
        is_near = is_some & (square < cutoff) & (square >= lower)
        is_first = is_near & upper(j, i[:, None], iu, iv, iw)
        one, first = is_near.to(tl.int32), is_first.to(tl.int32)
        to = i[:, None] * M + found[:, None] + tl.cumsum(one, 1) - 1
        tl.store(here + to, j, is_near)
        tl.store(where + to, code, is_near)
        tl.store(rank + to, firsts[:, None] + tl.cumsum(first, 1) - 1, is_near)
        found += tl.sum(one, 1)
        firsts += tl.sum(first, 1)
    if LOOP:
        found += 1
    tl.store(counts + i + 1, found, m)
    tl.store(counts + A + 1 + i + 1, firsts, m)
    if tl.program_id(0) == 0:
        two = tl.arange(0, 2)
        tl.store(counts + two * (A + 1), two * 0)
    tl.atomic_max(notes + 2, tl.max(all_of_them, 0).to(tl.int64))
    if HAS_BOX:
        flat = tl.load(sizes + s * 8 + 7, is_real, 0)
        tl.atomic_max(notes + 3, tl.max(flat, 0).to(tl.int64))


@triton.jit
def spare(
    pos, index, vec, edge_dist, of_edge, reverse, atoms, dist, sign, shifts, num_edges, num_pairs, number, N, E, P,
    HAS_BOX: tl.constexpr, LISTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """What is left of E edges and P pairs joins two ghosts, N and N + 1; no row leads there."""
    e = number.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m = (e >= num_edges) & (e < E)
    half = (E - num_edges) // 2
    there = e - num_edges
    is_second = there >= half
    p = num_pairs + tl.where(is_second, there - half, there)
    i = N + tl.where(is_second, 1, 0)
    j = N + tl.where(is_second, 0, 1)
    dx = tl.load(pos + 3 * i, m, 0) - tl.load(pos + 3 * j, m, 0)
    dy = tl.load(pos + 3 * i + 1, m, 0) - tl.load(pos + 3 * j + 1, m, 0)
    dz = tl.load(pos + 3 * i + 2, m, 0) - tl.load(pos + 3 * j + 2, m, 0)
    r = tl.sqrt(dx * dx + dy * dy + dz * dz)
    tl.store(index + e, i.to(tl.int64), m)
    tl.store(index + E + e, j.to(tl.int64), m)
    tl.store(vec + 3 * e, dx, m)
    tl.store(vec + 3 * e + 1, dy, m)
    tl.store(vec + 3 * e + 2, dz, m)
    tl.store(edge_dist + e, r, m)
    tl.store(of_edge + e, tl.minimum(p, P - 1), m)
    tl.store(reverse + e, tl.where(is_second, e - half, e + half), m)
    own = m & (is_second == 0) & (p < P)
    tl.store(atoms + p, i.to(tl.int64), own)
    tl.store(atoms + P + p, j.to(tl.int64), own)
    tl.store(dist + p, r, own)
    if LISTS:
        tl.store(sign + e, tl.where(is_second, -1, 1), m)
        if HAS_BOX:
            tl.store(shifts + 3 * p, 0.0, own)
            tl.store(shifts + 3 * p + 1, 0.0, own)
            tl.store(shifts + 3 * p + 2, 0.0, own)


@triton.jit
def edges(
    pos, batch, cells, limits, home, moved, here, where, rank, starts, index, vec, edge_dist, of_edge, reverse,
    row_start, atoms, dist, sign, shifts, flag, notes, N, A, M, E, P, num_programs,
    HAS_BOX: tl.constexpr, SKIN: tl.constexpr, LOOP: tl.constexpr, FIXED: tl.constexpr, LISTS: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Both directions of every pair, by receiver, self loops first, and if FIXED what fills up E edges and P pairs."""
    pid = tl.program_id(0)
    num_edges, num_pairs = tl.load(starts + A), tl.load(starts + 2 * A + 1)
    last = num_pairs
    if FIXED:
        last = last * 0 + P
    if pid == 0:
        tl.store(notes, num_edges)
        tl.store(notes + 1, num_pairs)
        tl.store(row_start + A, tl.minimum(num_edges, E))
        if SKIN:
            tl.store(flag, 0)
        if LOOP:
            tl.store(dist + last, 0.0)
    closest = tl.load(limits + 4)
    if pid < num_programs:
        f = pid.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        i, slot = f // M, f % M
        m = i < A
        begin, end = tl.load(starts + i, m, 0), tl.load(starts + i + 1, m, 0)
        is_head = m & (slot == 0)
        tl.store(row_start + i, tl.minimum(begin, E), is_head)
        loops = 0
        if LOOP:
            loops = 1
            to = is_head & (begin < E)
            tl.store(index + begin, i, to)
            tl.store(index + E + begin, i, to)
            tl.store(vec + 3 * begin, 0.0, to)
            tl.store(vec + 3 * begin + 1, 0.0, to)
            tl.store(vec + 3 * begin + 2, 0.0, to)
            tl.store(edge_dist + begin, 0.0, to)
            tl.store(of_edge + begin, i * 0 + last, to)
            tl.store(reverse + begin, begin, to)
            if LISTS:
                tl.store(sign + begin, 0, to)
        e = begin + loops + slot
        m = m & (e < end) & (e < E) & (i < N)
        s = tl.load(batch + i, m, 0)
        at = i * M + slot
        j, code = tl.load(here + at, m, 0).to(tl.int64), tl.load(where + at, m, 0)
        iu, iv, iw = (code & 1023) - HOME, ((code >> 10) & 1023) - HOME, ((code >> 20) & 1023) - HOME
        dx, dy, dz = vector(
            tl.load(moved + 3 * i, m, 0), tl.load(moved + 3 * i + 1, m, 0), tl.load(moved + 3 * i + 2, m, 0),
            tl.load(moved + 3 * j, m, 0), tl.load(moved + 3 * j + 1, m, 0), tl.load(moved + 3 * j + 2, m, 0),
            iu, iv, iw, cells + s * 18, HAS_BOX,
        )  # fmt: skip
        square = dx * dx + dy * dy + dz * dz
        r = tl.sqrt(square)
        r = tl.where((square > 0) & (r < closest), float("nan"), r)
        # the edge of opposite direction, in the row of the other atom
        back = (HOME - iu) | ((HOME - iv) << 10) | ((HOME - iw) << 20)
        there = tl.load(starts + j, m, 0) + loops
        length = tl.load(starts + j + 1, m, 0) - there
        length = tl.where(m, length, length * 0)
        opposite = tl.zeros([SIZE], tl.int64)
        for t in range(0, tl.max(length, 0), TILE):
            c = (t + tl.arange(0, TILE))[None, :]
            is_some = c < length[:, None]
            o = j[:, None] * M + c
            same = is_some & (tl.load(here + o, is_some, -1) == i[:, None])
            same = same & (tl.load(where + o, is_some, -1) == back[:, None])
            opposite += tl.sum(tl.where(same, c, 0), 1)
        first = upper(j, i, iu, iv, iw)
        mine, other = tl.load(rank + at, m, 0), tl.load(rank + j * M + opposite, m, 0)
        p = tl.where(first, tl.load(starts + A + 1 + i, m, 0) + mine, tl.load(starts + A + 1 + j, m, 0) + other)
        tl.store(index + e, i, m)
        tl.store(index + E + e, j, m)
        tl.store(vec + 3 * e, dx, m)
        tl.store(vec + 3 * e + 1, dy, m)
        tl.store(vec + 3 * e + 2, dz, m)
        tl.store(edge_dist + e, r, m)
        tl.store(of_edge + e, tl.minimum(p, P - 1), m)
        tl.store(reverse + e, tl.minimum(there + opposite, E - 1), m)
        own = m & first & (p < P)
        tl.store(atoms + p, i, own)
        tl.store(atoms + P + p, j, own)
        tl.store(dist + p, r, own)
        if LISTS:
            tl.store(sign + e, tl.where(first, 1, -1), m)
            if HAS_BOX:
                tl.store(shifts + 3 * p, tl.load(home + 3 * j, m, 0) - tl.load(home + 3 * i, m, 0) - iu, own)
                tl.store(
                    shifts + 3 * p + 1, tl.load(home + 3 * j + 1, m, 0) - tl.load(home + 3 * i + 1, m, 0) - iv, own
                )
                tl.store(
                    shifts + 3 * p + 2, tl.load(home + 3 * j + 2, m, 0) - tl.load(home + 3 * i + 2, m, 0) - iw, own
                )
    elif FIXED:
        spare(
            pos, index, vec, edge_dist, of_edge, reverse, atoms, dist, sign, shifts, num_edges, num_pairs,
            pid - num_programs, N, E, P, HAS_BOX, LISTS, SIZE,
        )  # fmt: skip
