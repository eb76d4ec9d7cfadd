"""An evaluation of which every text is hostile: to the page's markup, its script or its reader."""

import math
from typing import Any

from tests import viewer_history

ATTACK = "</script><img src=x onerror='window.hacked=1'><svg onload=window.hacked=1>"
# What no reader may lose, and no browser may act upon.
HOSTILE = (
    *(ATTACK, "<!--<script>", "&lt;b&gt;", "\n", "\t", "    x", "\x00\x01", "\ud800", "\r\n"),
    *(
        "\u202eabc",
        "\u2028",
        "\u200f",
        "\ufeff",
        "\U000e0041",
        "שלום",
        "👩‍👩‍👧",
        "x" * 300,
        " ",
        "",
    ),
)


def hostile_evaluation() -> dict[str, Any]:
    """Returns the arguments of ``build_page``: one trace, an extension and a stopped step."""
    tokens = list(range(len(HOSTILE)))
    entropy = [float(token % 3) for token in tokens]
    key = {"problem": ATTACK, "sampler": ATTACK, "seed": 0}
    row = key | {
        **{"text": "".join(HOSTILE), "tokens": tokens, "num_tokens": len(tokens), "ended": ATTACK},
        **{"answer": ATTACK, "gold": "\u202e72", "correct": False, "log_prob": math.nan},
        **{"entropy": 3.0, "token_entropy": entropy, "attempted": 1, "accepted": 0},
        **{"null_moves": 0, "token_log_prob": [math.nan, -math.inf] + [-0.5] * (len(tokens) - 2)},
    }
    moves = [
        {"stage": 1, "step": 0, "kind": "extension", "tokens": tokens, "entropy": entropy},
        {
            **{"stage": 1, "step": 1, "kind": "step", "cut": 2, "divergence": 3},
            **{"accepted": False, "stopped": True, "log_uniform": -0.1, "log_ratio": -math.inf},
            **{"weight_new": -math.inf, "weight_old": None, "cut_change": math.nan},
            **{"current_tokens": tokens, "current_entropy": entropy},
            **{"proposal_tokens": [0, 1, 999], "proposal_entropy": [0.0, 1.0, 2.5]},
        },
    ]
    pieces = {str(token): text for token, text in enumerate(HOSTILE)}
    chain = key | {"prompt": "".join(HOSTILE), "gold": "x", "pieces": pieces, "moves": moves}
    svg = viewer_history.draw_bars([row | {"sampler": s} for s in viewer_history.SAMPLERS])
    svg = svg.replace("</svg>", "<script>window.hacked=1</script></svg>")
    return {
        **{"title": ATTACK + "\x00\ud800\u202e{{data}}", "settings": {"task": ATTACK, ATTACK: [1]}},
        **{"table": [{ATTACK: ATTACK, "n": None}], "notes": list(HOSTILE)},
        **{"figures": [(ATTACK, svg)], "rows": [row], "history": [chain]},
    }
