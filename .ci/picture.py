"""The picture of the trade-off on the start page, drawn from the table of questions about pictures in docs/measured.md.

``python .ci/picture.py`` writes docs/trade-off.svg. A test compares the file with what this draws.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "trade-off.svg"
#: The page with the table, and the methods that are drawn; baselines are grey.
PAGE = ROOT / "docs" / "measured.md"
SHOWN = {
    "visionzip": "#0072b2", "vispruner": "#009e73", "divprune": "#d55e00", "tome": "#cc79a7", "resize": "#777777",
    "random": "#777777",
}  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 56, 150, 40, 48
LOW, HIGH = 60.0, 102.0
SHARES = (100.0, 50.0, 35.0)


def curves(text: str) -> dict[str, tuple[float, float, float]]:
    """By method, the accuracies at all, 50 % and 35 % of the FLOPs."""
    table = text.split("| questions about pictures |", 1)[1].split("\n\n", 1)[0]
    row = re.compile(r"^\| `?([\w-]+)`?[^|]*\| ([\d.]+)[^|]*\|[^|]*\|[^|]*\| ([\d.]+)[^|]*\|", re.M)
    rows = {found[1]: (found[2], found[3]) for found in row.finditer(table)}
    whole = float(rows["unreduced"][0])
    return {name: (whole, *(float(v) for v in rows[name])) for name in SHOWN}  # type: ignore[return-value]


def draw(text: str) -> str:
    """The SVG, from the text of the page."""
    found = curves(text)
    inner = WIDTH - LEFT - RIGHT
    at = [LEFT + inner * i / (len(SHARES) - 1) for i in range(len(SHARES))]

    def height(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (HIGH - value) / (HIGH - LOW)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" fill="#222">accuracy in %, questions about pictures, world-llava-2</text>',
    ]
    for value in (60, 70, 80, 90, 100):
        y = height(value)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{value}</text>')
    for x, share in zip(at, SHARES, strict=True):
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - 24}" text-anchor="middle" fill="#444">{share:g} %</text>')
    below = f'x="{LEFT + inner / 2:.1f}" y="{HEIGHT - 6}"'
    out.append(f'<text {below} text-anchor="middle" fill="#222">FLOPs of vision encoder and prefill</text>')
    ends = sorted(found, key=lambda name: -found[name][-1])
    label = -100.0
    for name in ends:
        points = " ".join(f"{x:.1f},{height(v):.1f}" for x, v in zip(at, found[name], strict=True))
        dash = ' stroke-dasharray="5 4"' if SHOWN[name] == "#777777" else ""
        out.append(f'<polyline points="{points}" fill="none" stroke="{SHOWN[name]}" stroke-width="2.5"{dash}/>')
        label = max(height(found[name][-1]) + 4, label + 15)  # names never lie over each other
        out.append(
            f'<text x="{at[-1] + 10:.1f}" y="{label:.1f}" fill="{SHOWN[name]}">{name} {found[name][-1]:g}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(draw(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
