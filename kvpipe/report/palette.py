"""Colours by role, for light and dark: one palette for the pages, the SVG and the PNG.

The colours of pools are those of Okabe and Ito, which people with any colour vision can tell apart;
each has at least 3:1 to the ground, each text at least 4.5:1.
"""

from collections.abc import Mapping

from kvpipe.ledger import KV, OTHER, PARAMS, PROGRAM, slot_pool

LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "raised": "#f5f6f7",
    "ink": "#1b1f24",
    "quiet": "#57606a",
    "grid": "#dfe3e8",
    "good": "#0b6b3a",
    "bad": "#b42318",
    "link": "#0b5cad",
    "pool-params": "#0072b2",
    "pool-kv": "#d98200",
    "pool-slot0": "#009e73",
    "pool-slot1": "#00664b",
    "pool-slot2": "#7d4bb0",
    "pool-program": "#b2548c",
    "pool-other": "#7d8590",
    "pool-total": "#4b5563",
    "pool-host": "#6b5b95",
    "peak": "#1b1f24",
    "limit": "#b42318",
}

DARK: Mapping[str, str] = {
    "ground": "#14171a",
    "raised": "#1d2125",
    "ink": "#e8eaed",
    "quiet": "#a4adb8",
    "grid": "#343a41",
    "good": "#5fd08d",
    "bad": "#ff8a7d",
    "link": "#7cb8ff",
    "pool-params": "#4ba3dd",
    "pool-kv": "#f0a52e",
    "pool-slot0": "#2fc498",
    "pool-slot1": "#a5ecd8",
    "pool-slot2": "#c9a4f2",
    "pool-program": "#d88ab6",
    "pool-other": "#9aa4af",
    "pool-total": "#aab4c0",
    "pool-host": "#a797d6",
    "peak": "#e8eaed",
    "limit": "#ff8a7d",
}

FADED = 0.45
# A trainer has three slots: parameters, gradients, moments.
_SLOTS = 3
_KNOWN = {PARAMS: "pool-params", KV: "pool-kv", PROGRAM: "pool-program", OTHER: "pool-other"}


def pool_roles(pools: list[str]) -> dict[str, str]:
    """Return the role of each pool; slots take theirs in turn."""
    slots = [pool for pool in pools if pool.startswith(slot_pool(""))]
    roles = {pool: f"pool-slot{index % _SLOTS}" for index, pool in enumerate(slots)}
    return {pool: roles.get(pool) or _KNOWN.get(pool, "pool-total") for pool in pools}


def css_variables(palette: Mapping[str, str]) -> str:
    """Return the palette as declarations of CSS variables."""
    return "".join(f"--{role}:{colour};" for role, colour in palette.items())


def svg_rules() -> str:
    """Return the CSS that gives a drawing's shapes their colours, from the variables."""
    pools = [role for role in LIGHT if role.startswith("pool-")]
    fills = "".join(f"rect.{role}{{fill:var(--{role})}}" for role in pools)
    lines = "".join(f"line.{role}{{stroke:var(--{role})}}" for role in ("grid", "peak", "limit"))
    texts = "".join(f"text.{role}{{fill:var(--{role})}}" for role in ("ink", "quiet", "bad"))
    # A rim of the ground, so that grid lines do not run through the letters.
    rim = "text{paint-order:stroke;stroke:var(--ground);stroke-width:3px;stroke-linejoin:round}"
    ground = "rect.ground{fill:var(--ground)}"
    return f"{fills}rect.faded{{opacity:{FADED}}}{lines}{texts}{rim}{ground}"
