"""The page of an evaluation: what it holds. ``test_page_browser`` looks at it in a browser."""

import base64
import copy
import hashlib
import html.parser
import json
import math

import pytest

from experiments.reporting import page as page_lib
from experiments.reporting.page import build_page
from tests import viewer_history
from tests.hostile_page import HOSTILE, hostile_evaluation

NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Document(html.parser.HTMLParser):
    """Elements with their attributes, and the text of each script, style and table cell."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "td"):
            self.open = (tag, dict(attrs), [])
            self.texts.append(self.open)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[0]:
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.open[2].append(data)

    def all(self, tag):
        return [
            ("".join(parts), attributes) for name, attributes, parts in self.texts if name == tag
        ]


def data_of(page):
    """The JSON that the page carries."""
    return next(
        json.loads(text)
        for text, attributes in Document(page).all("script")
        if attributes.get("type") == "application/json"
    )


def unpack(packed, reference):
    return {
        name: reference[name][: packed["keep"]] + packed[name] for name in ("tokens", "entropy")
    }


def unpack_moves(moves):
    """History as it was, from what the page carries."""
    trace, unpacked = {"tokens": [], "entropy": []}, []
    for move in moves:
        rest = {k: v for k, v in move.items() if k not in ("trace", "current", "proposal")}
        if move["kind"] == "extension":
            trace = unpack(move["trace"], trace)
            unpacked.append(rest | trace)
            continue
        current = unpack(move["current"], trace)
        proposal = unpack(move["proposal"], current)
        named = {f"current_{k}": v for k, v in current.items()}
        named |= {f"proposal_{k}": v for k, v in proposal.items()}
        unpacked.append(rest | named)
        trace = proposal if move["accepted"] else current
    return unpacked


@pytest.fixture(scope="module")
def evaluation():
    return viewer_history.make_evaluation()


# ---- what the page holds ----


@pytest.mark.parametrize("text", [*HOSTILE, "".join(HOSTILE)])
def test_json_comes_back_and_cannot_be_taken_for_markup(text):
    value = {"key" + text: [text, 1, 0.1, True, None]}
    embedded = page_lib.embed_json(value)
    assert json.loads(embedded) == value
    assert embedded.isascii()
    assert not set("<>&") & set(embedded)


def test_numbers_unknown_to_json_become_words():
    for word, number in NUMBERS.items():
        assert json.loads(page_lib.embed_json([number])) == [word]
    with pytest.raises(ValueError, match="of type set"):
        page_lib.embed_json([{1}])


def test_rows_and_history_come_back_out_of_the_page(evaluation):
    data = data_of(build_page(**evaluation))
    for row, given in zip(data["rows"], evaluation["rows"], strict=True):
        assert row == given
    for chain, given in zip(data["history"], evaluation["history"], strict=True):
        assert unpack_moves(chain["moves"]) == given["moves"]
        assert chain["prompt"] == given["prompt"]
        assert data["pieces"].items() <= given["pieces"].items()
    used = {str(token) for row in evaluation["rows"] for token in row["tokens"]}
    assert used <= data["pieces"].keys()


def test_history_that_does_not_follow_from_itself_comes_back_too(evaluation):
    chain = copy.deepcopy(evaluation["history"][0])
    chain["moves"] = chain["moves"][3:1:-1] + chain["moves"][8:]  # no move starts where one ended
    chain["moves"][1]["current_entropy"][0] += 1.0
    data = data_of(build_page(**evaluation | {"history": [chain]}))
    assert unpack_moves(data["history"][0]["moves"]) == chain["moves"]


def test_what_follows_from_the_move_before_is_not_held_again(evaluation):
    moves = data_of(build_page(**evaluation))["history"][0]["moves"]
    given = evaluation["history"][0]["moves"]
    for move, whole in zip(moves, given, strict=True):
        if move["kind"] == "step":
            assert move["current"]["tokens"] == []
            kept = move["proposal"]["keep"]
            assert kept == (whole["divergence"] or len(whole["current_tokens"]) + 1) - 1


def test_hostile_texts_bring_no_element(evaluation):
    hostile, harmless = (Document(build_page(**e)) for e in (hostile_evaluation(), evaluation))
    for document in (hostile, harmless):
        tags = [tag for tag, _ in document.elements]
        assert tags.count("script") == 2
        assert tags.count("img") == 1
        assert not [name for _, attrs in document.elements for name in attrs if name[:2] == "on"]
    data = data_of(build_page(**hostile_evaluation()))
    assert data["rows"][0]["text"] == "".join(HOSTILE)
    assert build_page(**hostile_evaluation()).encode("utf-8").count(b"\x00") == 0


def test_policy_allows_what_the_page_holds_and_nothing_else(evaluation):
    document = Document(build_page(**evaluation))
    policy = next(a["content"] for _, a in document.elements if "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    inline = [text for text, attributes in document.all("script") if not attributes]
    for kind, texts in (
        ("script-src", inline),
        ("style-src", [t for t, _ in document.all("style")]),
    ):
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert rules.pop(kind) == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert rules.pop("img-src") == "data:"
    assert set(rules.values()) == {"'none'"}
    assert "default-src" in rules


def test_page_is_the_same_every_time_and_leaves_its_input_alone(evaluation):
    before = copy.deepcopy(evaluation)
    assert build_page(**evaluation) == build_page(**evaluation)
    assert evaluation == before


def test_rows_beyond_the_limit_show_their_outcome_only(evaluation):
    page = build_page(**evaluation, max_traces=21)
    rows = data_of(page)["rows"]
    held = [row for row in rows if "tokens" in row]
    assert len(rows) == 36
    assert sum(row["sampler"].endswith("_cut") for row in held) == 18  # those with history
    assert [row["problem"] for row in held if row["sampler"] == "standard"] == ["0"] * 3
    assert all({"answer", "gold", "correct"} <= row.keys() for row in rows)
    assert "Of 36 traces this page holds the text and tokens of 21; the other 15" in page
    assert "this page holds the text" not in build_page(**evaluation, max_traces=36)


def test_chains_beyond_the_limit_are_left_out_whole(evaluation):
    page = build_page(**evaluation, max_history_tokens=400)
    held = len(data_of(page)["history"])
    assert 0 < held < 18
    assert f"Of 18 chains with recorded steps this page holds {held}." in page
    lone = evaluation["history"][0] | {"seed": 77}  # no row has this seed
    page = build_page(**evaluation | {"history": [lone]})
    assert "Of 1 chains with recorded steps this page holds 0." in page


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        *(("71.9 [68.0, 75.1]", 71.9), ("\u22125.38", -5.38), ("1,234", 1234.0), (3, 3.0)),
        *(("\u00d73.4", 3.4), ("<0.001", 0.001), ("1e-05", 1e-5), ("1.5 M", 1.5e6), ("2k", 2e3)),
        *(("5 kg", 5.0), ("7 / 9", 7.0), (".5", 0.5), (0.25, 0.25), ("+2 %", 2.0)),
    ],
)
def test_columns_sort_by_the_number_that_a_cell_starts_with(cell, number):
    page = build_page(
        "t", {}, [{"sampler": "s", "x": cell}, {"sampler": "t", "x": None}], [], [], [], []
    )
    (shown, attributes), (nothing, empty) = Document(page).all("td")
    assert shown == str(cell)
    assert float(attributes["data-sort"]) == pytest.approx(number, rel=1e-12)
    assert (nothing, empty["data-sort"]) == ("\u2013", "None")


def test_words_make_no_column_of_numbers():
    rows = [{"sampler": "s", "x": "1.0"}, {"sampler": "t", "x": "none"}]
    page = build_page("t", {}, rows, [], [], [], [])
    assert [attributes for _, attributes in Document(page).all("td")] == [{}, {}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["table"][1].pop("tokens"), "row 1 of the table has the keys"),
        (lambda e: e["rows"][2].pop("gold"), "row 2 of rows.jsonl lacks gold"),
        (lambda e: e["rows"][2]["token_entropy"].pop(), "row 2 of rows.jsonl: .*expected as many"),
        (lambda e: e["rows"][2].update(tokens=None), "tokens=None; expected a list"),
        (lambda e: e["history"][3].pop("pieces"), "chain 3 of history.jsonl lacks pieces"),
        (lambda e: e["history"][0]["moves"][2].pop("cut"), "chain 0 .*move 2 lacks cut"),
        (lambda e: e["history"][0]["moves"][2].update(cut=99), "move 2: cut=99; expected 1 to 16"),
        (lambda e: e["history"][0]["moves"][2].update(kind="jump"), "kind='jump'; expected exten"),
        (lambda e: e["history"][0]["moves"][0].pop("entropy"), "move 0 lacks entropy"),
        (lambda e: e["history"][0]["moves"][2].update(divergence=-1), "divergence=-1; expected 0"),
        (lambda e: e["figures"].append(("bars", "<html>")), "figure 'bars' starts with '<html>'"),
    ],
)
def test_malformed_data_are_refused_by_place(evaluation, change, message):
    broken = copy.deepcopy(evaluation)
    change(broken)
    with pytest.raises(ValueError, match=message):
        build_page(**broken)


def test_results_stand_in_the_page_without_its_script(evaluation):
    document = Document(build_page(**evaluation))
    cells = [text for text, _ in document.all("td")]
    assert cells == [
        str(value if value is not None else "\u2013")
        for row in evaluation["table"]
        for value in list(row.values())[1:]
    ]
    assert [tag for tag, _ in document.elements].count("noscript") == 1


def test_an_empty_evaluation_is_a_page():
    document = Document(build_page("nothing", {}, [], [], [], [], []))
    assert [tag for tag, _ in document.elements].count("table") == 0


def test_made_up_history_is_what_the_algorithm_says(evaluation):
    kinds = set()
    for chain in evaluation["history"]:
        trace = []
        for move in chain["moves"]:
            if move["kind"] == "extension":
                assert move["tokens"][: len(trace)] == trace
                trace = move["tokens"]
                continue
            current, proposal = move["current_tokens"], move["proposal_tokens"]
            assert current == trace
            same = [a == b for a, b in zip(current, proposal, strict=False)]
            assert move["divergence"] == (same.index(False) + 1 if False in same else 0)
            total = move["weight_new"] - move["weight_old"] + move["cut_change"]
            assert move["log_ratio"] == pytest.approx(total, abs=3e-5)
            assert move["accepted"] == (move["log_ratio"] >= move["log_uniform"])
            trace = proposal if move["accepted"] else current
            kinds.add((move["accepted"], move["stopped"], move["divergence"] > 0))
        key = (chain["problem"], chain["sampler"], chain["seed"])
        row = next(r for r in evaluation["rows"] if (r["problem"], r["sampler"], r["seed"]) == key)
        assert row["tokens"] == trace
    assert len(kinds) == 4  # accepted, rejected, stopped, null
