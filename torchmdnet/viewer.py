"""A viewer of structures for pages that need no other file: balls and bonds on a canvas, turned with the mouse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["SCRIPT", "data_block", "frames_of", "looks_of", "oscillation_of", "player", "structure_of"]

#: Colours of common elements, much like Jmol's; others are pink.
_COLOURS = {
    "H": "#f4f4f4", "He": "#d9ffff", "Li": "#b06fe0", "B": "#e8a6a0", "C": "#5b6068", "N": "#3b62d6", "O": "#dd3b33",
    "F": "#74c95a", "Na": "#9a5fd8", "Mg": "#6fbf3f", "Al": "#b7a2a2", "Si": "#d9b38a", "P": "#e8892d", "S": "#e3c72e",
    "Cl": "#35c04a", "K": "#8a4fc4", "Ca": "#4fae30", "Ti": "#a8abaf", "Fe": "#cf6a3c", "Ni": "#5fbf62",
    "Cu": "#c07a3e", "Zn": "#7d80b0", "Ge": "#6f9090", "Br": "#a23a2c", "Mo": "#59b0b0", "Ag": "#b5b9bf",
    "I": "#8a2fa0", "W": "#3f8fc9", "Pt": "#c0c3d4", "Au": "#e6bf3c",
}  # fmt: skip

SCRIPT = """
class Viewer {
  constructor(canvas, looks) {
    this.canvas = canvas; this.looks = looks; this.zoom = 1; this.turn = [1,0,0, 0,1,0, 0,0,1];
    this.rotate(0.5, 0.35);
    let last = null;
    canvas.style.touchAction = 'none';
    canvas.addEventListener('pointerdown', e => { last = [e.clientX, e.clientY];
      canvas.setPointerCapture(e.pointerId) });
    canvas.addEventListener('pointermove', e => { if (!last) return;
      this.rotate((e.clientX - last[0]) / 120, (e.clientY - last[1]) / 120);
      last = [e.clientX, e.clientY]; this.draw() });
    canvas.addEventListener('pointerup', () => { last = null });
    canvas.addEventListener('wheel', e => { e.preventDefault();
      this.zoom *= Math.exp(-e.deltaY / 600); this.draw() }, {passive: false});
  }
  rotate(a, b) {
    const mul = (m, n) => { const r = []; for (let i = 0; i < 3; i++) for (let j = 0; j < 3; j++)
      r.push(m[3*i]*n[j] + m[3*i+1]*n[3+j] + m[3*i+2]*n[6+j]); return r };
    const ca = Math.cos(a), sa = Math.sin(a), cb = Math.cos(b), sb = Math.sin(b);
    this.turn = mul([1,0,0, 0,cb,-sb, 0,sb,cb], mul([ca,0,sa, 0,1,0, -sa,0,ca], this.turn));
  }
  show(structure, keep) {
    this.s = structure; const p = structure.p, n = p.length / 3;
    if (!keep || !this.c) {
      const corners = [...p]; this.cell = [];
      if (structure.cell) { const h = structure.cell;
        const at = (i,j,k) => [0,1,2].map(x => i*h[x] + j*h[3+x] + k*h[6+x]);
        for (let i = 0; i < 2; i++) for (let j = 0; j < 2; j++) { this.cell.push([at(i,j,0), at(i,j,1)],
          [at(i,0,j), at(i,1,j)], [at(0,i,j), at(1,i,j)]) }
        for (const e of this.cell) corners.push(...e[0], ...e[1]); }
      const lo = [1e9,1e9,1e9], hi = [-1e9,-1e9,-1e9];
      corners.forEach((v, i) => { lo[i%3] = Math.min(lo[i%3], v); hi[i%3] = Math.max(hi[i%3], v) });
      this.c = lo.map((v, i) => (v + hi[i]) / 2);
      this.size = Math.max(4, Math.hypot(...hi.map((v, i) => v - lo[i])) + 2);
    }
    this.bonds = [];
    if (n <= 1500) for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) {
      const r = this.looks[structure.z[i]].r + this.looks[structure.z[j]].r;
      const d = Math.hypot(p[3*i]-p[3*j], p[3*i+1]-p[3*j+1], p[3*i+2]-p[3*j+2]);
      if (d < 1.22 * r) this.bonds.push([i, j]) }
    this.draw();
  }
  draw() {
    if (!this.s) return;
    const k = window.devicePixelRatio || 1, w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    if (this.canvas.width !== Math.round(w*k)) { this.canvas.width = Math.round(w*k);
      this.canvas.height = Math.round(h*k) }
    const g = this.canvas.getContext('2d'); g.setTransform(k, 0, 0, k, 0, 0); g.clearRect(0, 0, w, h);
    const f = this.zoom * Math.min(w, h) / this.size, t = this.turn, c = this.c;
    const at = (x, y, z) => { x -= c[0]; y -= c[1]; z -= c[2];
      return [w/2 + f*(t[0]*x + t[1]*y + t[2]*z), h/2 - f*(t[3]*x + t[4]*y + t[5]*z), t[6]*x + t[7]*y + t[8]*z] };
    const s = this.s, p = s.p, q = [], todo = [];
    for (let i = 0; i < p.length; i += 3) q.push(at(p[i], p[i+1], p[i+2]));
    g.strokeStyle = '#8a8f98'; g.lineWidth = 1;
    for (const [a, b] of this.cell || []) { const u = at(...a), v = at(...b);
      g.beginPath(); g.moveTo(u[0], u[1]); g.lineTo(v[0], v[1]); g.stroke() }
    q.forEach((u, i) => todo.push([u[2], i, -1]));
    for (const [i, j] of this.bonds) todo.push([(q[i][2] + q[j][2]) / 2 - 0.05, i, j]);
    todo.sort((a, b) => a[0] - b[0]);
    for (const [, i, j] of todo) {
      const look = this.looks[s.z[i]];
      if (j >= 0) { g.strokeStyle = '#9aa0a8'; g.lineWidth = Math.max(1.5, 0.18 * f); g.lineCap = 'round';
        g.beginPath(); g.moveTo(q[i][0], q[i][1]); g.lineTo(q[j][0], q[j][1]); g.stroke(); continue }
      const r = Math.max(1.5, 0.55 * look.r * f), [x, y] = q[i];
      const shade = g.createRadialGradient(x - r/3, y - r/3, r/8, x, y, r);
      shade.addColorStop(0, '#fff'); shade.addColorStop(0.35, look.c); shade.addColorStop(1, look.c);
      g.fillStyle = shade; g.strokeStyle = '#00000066'; g.lineWidth = 0.8;
      if (s.hot && s.hot.includes(i)) { g.strokeStyle = '#d9822b'; g.lineWidth = 3 }
      g.beginPath(); g.arc(x, y, r, 0, 6.2832); g.fill(); g.stroke();
    }
  }
}
"""


def structure_of(atoms: Atoms) -> dict[str, Any]:
    """A structure for the viewer: atomic numbers, coordinates in Å to 0.001, and the cell where it is periodic."""
    made: dict[str, Any] = {
        "z": atoms.numbers.tolist(),
        "p": np.round(_shown(atoms).ravel(), 3).tolist(),
    }
    if atoms.pbc.any() and atoms.cell.rank == 3:
        made["cell"] = np.round(atoms.cell.array.ravel(), 3).tolist()
    return made


def frames_of(frames: Sequence[Atoms], most_numbers: int = 300_000) -> list[dict[str, Any]]:
    """Frames of one structure for the viewer, evenly chosen where there are too many."""
    room = max(2, most_numbers // max(3 * len(frames[0]), 1))
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), room, 200)).round().astype(int))
    return [structure_of(frames[number]) for number in chosen]


def looks_of(numbers: Sequence[int] | np.ndarray) -> dict[int, dict[str, Any]]:
    """Radius in Å and colour of each element that occurs."""
    from ase.data import chemical_symbols, covalent_radii

    found = {}
    for z in np.unique(numbers):
        is_element = 0 <= z < len(chemical_symbols)  # others are types of beads
        symbol = chemical_symbols[z] if is_element else str(z)
        radius = round(float(covalent_radii[z]), 2) if is_element else 1.5
        found[int(z)] = {"r": radius, "c": _COLOURS.get(symbol, "#d889c8"), "s": symbol}
    return found


def data_block(name: str, value: Any) -> str:
    """Data inside a page, for ``JSON.parse(document.getElementById(name).textContent)``."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return f'<script type="application/json" id="{name}">{text}</script>'


def oscillation_of(atoms: Atoms, mode: np.ndarray) -> list[dict[str, Any]]:
    """A structure and the displacements (N, 3) of a mode, which the viewer swings."""
    largest = max(float(np.linalg.norm(mode, axis=1).max()), 1e-12)
    return [structure_of(atoms) | {"mode": np.round(0.45 * mode.ravel() / largest, 3).tolist()}]


_PLAYER = """
const sets = JSON.parse(document.getElementById('sets').textContent);
const looks = JSON.parse(document.getElementById('looks').textContent);
const view = new Viewer(document.getElementById('view'), looks);
const bar = document.getElementById('bar'), button = document.getElementById('play');
const menu = document.getElementById('set');
let frames = [], timer = null;
const swung = s => Array.from({length: 24}, (_, i) => ({...s, p: s.p.map((x, j) =>
  x + s.mode[j] * Math.sin(2 * Math.PI * i / 24))}));
const go = i => { view.show(frames[i], true); bar.value = i;
  document.getElementById('caption').textContent = frames[i].words || '' };
const stop = () => { clearInterval(timer); timer = null; button.textContent = 'play' };
const start = () => { button.textContent = 'pause';
  timer = setInterval(() => go((+bar.value + 1) % frames.length), 60) };
const pick = name => { frames = sets[name]; if (frames[0].mode) frames = swung(frames[0]);
  bar.max = frames.length - 1; view.c = null; go(0); if (frames.length > 1 && sets[name][0].mode && !timer) start() };
bar.oninput = () => go(+bar.value);
button.onclick = () => timer ? stop() : start();
menu.onchange = () => pick(menu.value);
for (const name of Object.keys(sets)) menu.add(new Option(name, name));
menu.hidden = Object.keys(sets).length < 2;
window.pickSet = name => { menu.value = name; pick(name) };
pick(Object.keys(sets)[0]); addEventListener('resize', () => view.draw());
"""


def player(sets: Mapping[str, Sequence[dict[str, Any]]], numbers: Sequence[int] | np.ndarray) -> str:
    """Frames to be played and turned, of one of several sets that a menu chooses from.

    Args:
        sets: By name what :func:`frames_of` or :func:`oscillation_of` returned; ``words`` of a frame stand beside it.
        numbers: Atomic numbers that occur.
    """
    return (
        '<canvas id="view" style="width:100%;height:380px;border:1px solid var(--line);border-radius:8px"></canvas>'
        '<p><select id="set"></select> <button id="play">play</button> '
        '<input id="bar" type="range" min="0" value="0" style="width:50%"> <span id="caption"></span> '
        '<span class="sub">drag to turn, scroll to zoom</span></p>'
        + data_block("sets", sets)
        + data_block("looks", looks_of(numbers))
        + f"<script>{SCRIPT}{_PLAYER}</script>"
    )


def _shown(atoms: Atoms) -> np.ndarray:
    """Positions as they are shown: atoms of a periodic structure in the cell."""
    return atoms.get_positions(wrap=True) if atoms.pbc.any() and atoms.cell.rank == 3 else atoms.positions
