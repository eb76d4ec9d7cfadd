"""The page of an evaluation in a real browser: Debian's chromium, driven by playwright."""

import itertools
import shutil

import pytest

from experiments.reporting.page import build_page
from tests import viewer_history
from tests.hostile_page import ATTACK, HOSTILE, hostile_evaluation

WIDE, NARROW = ({"width": width, "height": 900} for width in (1400, 400))
MINUS = "\u2212"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("needs chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def evaluation():
    return viewer_history.make_evaluation()


@pytest.fixture(scope="module")
def files(evaluation, tmp_path_factory):
    """Paths of the pages: a usual one, a hostile one, one that leaves much out."""
    folder = tmp_path_factory.mktemp("pages")
    pages = {
        "usual": build_page(**evaluation),
        "hostile": build_page(**hostile_evaluation()),
        "partial": build_page(**evaluation | {"history": []}, max_traces=1),
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def open_page(browser, files):
    """Opens a page; afterwards holds that it asked for nothing and complained of nothing."""
    pages, complaints = [], []

    def open_file(name="usual", **options):
        page = browser.new_page(viewport=WIDE, offline=True, **options)
        pages.append(page)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append("a dialog"))
        own = files[name].as_uri()
        page.on("request", lambda r: r.url == own or complaints.append(f"asked for {r.url[:80]}"))
        page.goto(own)
        return page

    yield open_file
    for page in pages:
        page.close()
    assert complaints == []


def text_of(page, selector):
    return page.locator(selector).text_content()


def choose(page, sampler, problem="0", seed=0):
    for name, value in (("problem", problem), ("sampler", sampler), ("seed", str(seed))):
        page.select_option(f"#{name}", label=value)


def nats(value, sign=""):
    return f"{value:{sign}.2f}".replace("-", MINUS) if round(value, 2) else f"{sign}0.00"


SHOWN = """() => {
    const text = (id) => document.getElementById(id).textContent;
    const seen = (id) => document.getElementById(id).checkVisibility();
    const texts = (selector) => [...document.querySelectorAll(selector)].map((e) => e.textContent);
    const ids = ["place", "verdict", "story", "reason", "shared", "old", "new"];
    return {
        ...Object.fromEntries(ids.map((id) => [id, text(id)])),
        slider: document.getElementById("slider").value,
        hidden: ["terms", "shared", "old", "new"].filter((id) => !seen(id)),
        redrawn: texts("#shared .redrawn").join(""),
        cuts: texts("#shared .cut-mark").length,
        fates: texts("#suffixes .fate"),
        terms: texts("#terms dd"),
    };
}"""


def check_move(shown, move, pieces):
    """Holds what is shown against a move of the history."""

    def words(tokens):
        return "".join(pieces[str(token)] for token in tokens)

    assert shown["verdict"] == viewer_history.verdict_of(move)
    if move["kind"] == "extension":
        assert shown["hidden"] == (
            ["terms", "old"] if move["stage"] > 1 else ["terms", "shared", "old"]
        )
        kept = "" if "shared" in shown["hidden"] else shown["shared"]
        assert kept + shown["new"] == words(move["tokens"])
        assert shown["new"]
        return
    cut, divergence = move["cut"], move["divergence"]
    current, proposal = move["current_tokens"], move["proposal_tokens"]
    assert shown["story"].startswith(f"Cut at token {cut} of {len(current)}.")
    assert shown["redrawn"] == words(current[cut - 1 : divergence - 1 if divergence else None])
    if not divergence:
        assert shown["hidden"] == ["terms", "old", "new"]
        assert shown["shared"] == words(current)
        return
    assert shown["hidden"] == ([] if divergence > 1 else ["shared"])
    assert shown["cuts"] == 1
    assert shown["shared"] == words(current[: divergence - 1])
    assert shown["old"] == words(current[divergence - 1 :])
    assert shown["new"] == words(proposal[divergence - 1 :])
    assert shown["fates"] == (["dropped", "kept"] if move["accepted"] else ["kept", "dropped"])
    log_ratio, log_uniform = nats(move["log_ratio"]), nats(move["log_uniform"])
    terms = (move["weight_new"], -move["weight_old"], move["cut_change"])
    assert shown["terms"] == [*(nats(term, "+") for term in terms), log_ratio, log_uniform]
    assert log_ratio in shown["reason"]
    assert f"log u = {log_uniform}" in shown["reason"].replace("\u00a0", " ")


def test_arrow_keys_step_through_what_the_data_say(open_page, evaluation):
    page = open_page()
    wanted = {"Accepted", "Rejected", "Rejected early", "Null move", "Extension"}
    for chain in evaluation["history"]:
        moves, pieces = chain["moves"], chain["pieces"]
        if not wanted & {viewer_history.verdict_of(move) for move in moves}:
            continue
        choose(page, chain["sampler"], chain["problem"], chain["seed"])
        page.locator("#steps-heading").click()
        page.keyboard.press("Home")
        for place, move in enumerate(moves):
            shown = page.evaluate(SHOWN)
            assert f"move {place + 1} of {len(moves)}" in shown["place"]
            assert shown["slider"] == str(place)
            check_move(shown, move, pieces)
            wanted.discard(shown["verdict"])
            page.keyboard.press("ArrowRight")
        last = page.evaluate(SHOWN)
        assert last["place"] == shown["place"]  # the key past the end changes nothing
        page.keyboard.press("ArrowLeft")
        check_move(page.evaluate(SHOWN), moves[-2], pieces)
        page.keyboard.press("End")
        assert page.evaluate(SHOWN) == last
    assert not wanted


def test_buttons_slider_and_columns_agree(open_page):
    page = open_page()
    page.click("#last")
    assert page.get_attribute("#forward", "aria-disabled") == "true"
    page.focus("#slider")
    page.keyboard.press("Home")
    assert "move 1 of" in text_of(page, "#place")
    page.keyboard.press("ArrowRight")  # the slider's own: one move, not two
    assert "move 2 of" in text_of(page, "#place")
    assert page.locator("#slider[aria-valuetext^='Stage 1, step 1: ']").count() == 1
    count = page.evaluate("view.moves.length")
    page.locator("#columns").scroll_into_view_if_needed()
    box = page.locator("#columns").bounding_box()
    width = box["width"] / count
    for place, inside in ((0, 0.5), (7, 0.9), (count - 3, 0.1), (count - 1, 0.1)):
        page.mouse.click(box["x"] + (place + inside) * width, box["y"] + 20)
        assert f"move {place + 1} of" in text_of(page, "#place")
        cursor = page.locator("rect.cursor").first.bounding_box()
        middle = cursor["x"] + cursor["width"] / 2 - box["x"]
        assert middle == pytest.approx((place + 0.5) * width, abs=1.5)


def test_keys_are_left_to_the_controls_that_use_them(open_page):
    page = open_page("hostile")  # one problem: its select has nowhere to go
    for selector in ("#problem", ".scroll"):
        page.focus(selector)
        page.keyboard.press("ArrowRight")
        assert "move 1 of 2" in text_of(page, "#place")
    page.evaluate("document.activeElement.blur()")
    for key in ("End", "Control+ArrowRight"):  # the page's own: to its end
        page.keyboard.press(key)
        assert "move 1 of 2" in text_of(page, "#place")
    page.keyboard.press("ArrowRight")
    assert "move 2 of 2" in text_of(page, "#place")


def test_tokens_are_shaded_by_their_jump_and_tell_their_numbers(open_page, evaluation):
    page = open_page()
    row = next(r for r in evaluation["rows"] if r["sampler"] == "standard")
    choose(page, "standard")
    tokens = page.locator("#completion .token")
    assert tokens.count() == row["num_tokens"]
    entropy = row["token_entropy"]
    jumps = [max(h - before, 0.0) for before, h in zip([0.0, *entropy], entropy, strict=False)]
    shades = [
        float(s) for s in tokens.evaluate_all("e => e.map(t => t.style.getPropertyValue('--jump'))")
    ]
    assert all((shade > 0) == (jump > 0) for shade, jump in zip(shades, jumps, strict=True))
    by_jump = sorted(range(len(jumps)), key=jumps.__getitem__)
    assert [shades[place] for place in by_jump] == sorted(shades)
    place = by_jump[-1]
    tokens.nth(place).hover()
    expected = [
        *(f"{place + 1}", f"{row['tokens'][place]}", f"{nats(entropy[place])} nats"),
        *(f"{nats(jumps[place])} nats", f"{nats(row['token_log_prob'][place])} nats"),
    ]
    assert page.locator("#tip dd").all_text_contents() == expected
    assert page.locator("#tip dt").all_text_contents()[-2:] == ["jump", "log p"]


def test_tokens_can_be_read_by_keyboard(open_page, evaluation):
    page = open_page()
    row = next(r for r in evaluation["rows"] if r["sampler"] == "entropy_cut")
    choose(page, "entropy_cut")
    before = text_of(page, "#place")
    page.focus("#show-text")
    page.keyboard.press("Tab")  # to the completion
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#tip dd").first.text_content() == "3"
    assert f"id {row['tokens'][2]}" in text_of(page, "#readout")
    page.keyboard.press("End")
    assert page.locator("#tip dd").first.text_content() == str(row["num_tokens"])
    assert text_of(page, "#place") == before
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")


def test_every_row_can_be_chosen(open_page, evaluation):
    page = open_page()
    for row in evaluation["rows"][::5]:
        choose(page, row["sampler"], row["problem"], row["seed"])
        outcome = text_of(page, "#outcome")
        assert ("right" if row["correct"] else "wrong") in outcome
        assert f"answer {row['answer'] or 'none'}" in outcome
        assert f"gold {row['gold']}" in outcome
        page.click("#show-text")
        assert text_of(page, "#completion") == row["text"]
        marks = page.locator("#outcomes [aria-pressed=true]").evaluate_all(
            "marks => marks.map((mark) => mark.ariaLabel.split(':')[0])"
        )
        assert marks == [f"{row['sampler']}, seed {row['seed']}"]
    page.locator("#outcomes button[aria-label^='standard, seed 2']").click()
    assert page.locator("#sampler option:checked").text_content() == "standard"
    assert page.locator("#seed option:checked").text_content() == "2"
    assert "drawn without steps" in text_of(page, "#steps-missing")
    page.get_by_role("button", name="Show a chain with recorded steps").click()
    assert page.is_visible("#stepper")


def test_what_the_page_does_not_hold_is_said(open_page, evaluation):
    page = open_page("partial")
    choose(page, "entropy_cut", "2", 1)
    assert "does not hold the text of this trace" in text_of(page, "#completion")
    assert "not in this page" in text_of(page, "#steps-missing")
    choose(page, "standard", "0", 0)  # its tokens are here, their texts are not
    row = evaluation["rows"][0]
    assert text_of(page, "#completion") == row["text"]
    page.click("#show-tokens")
    shown = page.locator("#completion .token").all_text_contents()
    assert shown == [str(token) for token in row["tokens"]]


def test_hostile_text_is_shown_and_inert(open_page):
    page = open_page("hostile")
    assert page.evaluate("window.hacked") is None
    assert page.title().startswith(ATTACK)
    # Compared there: lone surrogates do not survive the way here.
    assert page.evaluate("document.getElementById('completion').textContent === view.row.text")
    units = "".join(HOSTILE).encode("utf-16-le", "surrogatepass")
    assert page.evaluate("view.row.text.length") == len(units) // 2
    signs = page.locator("#completion .mark").evaluate_all("e => e.map(m => m.dataset.sign)")
    assert " ".join(signs) == "↵ ⇥ ␀ ␁ U+D800 ␍ ↵ U+202E U+2028 U+200F U+FEFF U+E0041"
    widths, order = page.evaluate("""() => {
        const left = (node, place) => {
            const range = document.createRange();
            range.setStart(node, place);
            range.setEnd(node, place + 1);
            return range.getBoundingClientRect().left;
        };
        const unseen = [...document.querySelectorAll("#completion .unseen")];
        const turned = unseen.find((e) => e.textContent === "\\u202e").parentElement.nextSibling;
        return [unseen.map((e) => e.offsetWidth), [left(turned, 0), left(turned, 2)]];
    }""")
    assert set(widths) == {0}
    assert order[0] < order[1]  # "abc" is not turned round
    page.keyboard.press("ArrowRight")
    assert page.locator("#terms dd").all_text_contents() == [
        *(f"{MINUS}∞", "not finite", "not finite", f"{MINUS}∞", f"{MINUS}0.10")
    ]
    assert page.locator("#new .unknown").all_text_contents() == ["999"]
    assert page.locator("img, svg, script").count() == 4  # figure, columns, data, script
    page.wait_for_function("document.querySelector('figure img').naturalWidth > 0")
    assert page.evaluate("window.hacked") is None


def test_policy_stops_scripts_and_requests(browser, files):
    page = browser.new_page()
    page.goto(files["usual"].as_uri())
    page.evaluate("""() => {
        window.stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => {
            window.stopped.push(event.effectiveDirective);
        });
        const add = (name, properties) => {
            document.body.append(Object.assign(document.createElement(name), properties));
        };
        add("script", { textContent: "window.hacked = 1" });
        add("style", { textContent: "body { display: none }" });
        add("div", { innerHTML: "<i onclick='window.hacked = 1'></i>" });
        add("div", { innerHTML: "<img src='http://127.0.0.1:9/'>" });
        add("iframe", { src: "http://127.0.0.1:9/" });
        document.querySelector("i[onclick]").click();
        fetch("http://127.0.0.1:9/").catch(() => {});
    }""")
    page.wait_for_function("window.stopped.length >= 6")
    directives = ("script-src-elem", "script-src-attr", "style-src-elem", "img-src", "frame-src")
    assert set(page.evaluate("window.stopped")) == {*directives, "connect-src"}
    assert page.evaluate("window.hacked") is None
    page.close()


def test_table_sorts(open_page):
    page = open_page()

    def column(place):
        return page.locator(f"#table tbody tr > :nth-child({place})").all_text_contents()

    page.get_by_role("button", name="log p").click()
    falling = column(3)
    assert falling == sorted(falling, key=lambda cell: -float(cell.replace(MINUS, "-")))
    assert page.get_attribute("th:nth-child(3)", "aria-sort") == "descending"
    page.get_by_role("button", name="log p").click()
    assert column(3) == falling[::-1]
    names = column(1)
    for _ in range(2):  # an empty cell comes last either way
        page.get_by_role("button", name="acceptance").click()
        assert column(6)[2:] == ["\u2013", "\u2013"]
    page.focus("#table th:first-child button")
    page.keyboard.press("Enter")
    assert column(1) == sorted(names)
    assert page.locator("[aria-sort]").count() == 1


@pytest.mark.parametrize("name", ["usual", "hostile", "partial"])
def test_nothing_sticks_out(open_page, name):
    page = open_page(name)
    for size, key in itertools.product((NARROW, WIDE), ("Home", "ArrowRight")):
        page.set_viewport_size(size)
        page.keyboard.press(key)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        outside = page.evaluate("""() => [...document.querySelectorAll("main *, header *")]
            .filter((e) => !e.closest(".scroll, [hidden], .visually-hidden, details:not([open])"))
            .filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth)
            .map((e) => e.outerHTML.slice(0, 80))""")
        assert outside == []


CONTRAST = """(selectors) => {
    const numbers = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = (color) => numbers(color)
        .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
    const back = light(getComputedStyle(document.documentElement).backgroundColor);
    return [back, selectors.map((selector) => {
        const front = light(getComputedStyle(document.querySelector(selector)).color);
        return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    })];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(open_page, scheme):
    page = open_page(color_scheme=scheme)
    texts = ["body", ".quiet", ".notes", "thead button", "summary", ".badge.right", "#verdict"]
    background, contrasts = page.evaluate(CONTRAST, texts)
    assert background < 0.05 if scheme == "dark" else background > 0.9
    assert min(contrasts) >= 4.5, dict(zip(texts, contrasts, strict=True))


def test_controls_have_names(open_page):
    page = open_page()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, select, input, img")]
        .filter((e) => !(e.ariaLabel || e.alt || e.textContent.trim() || e.closest("label")))
        .map((e) => e.outerHTML)""")
    assert nameless == []
    for role, name in (("slider", "Move of the chain"), ("combobox", "Problem"), ("img", "Share")):
        assert page.get_by_role(role, name=name).count() == 1
