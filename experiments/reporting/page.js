"use strict";
// Tokens, the choice of a trace and its result. Everything from the data reaches the document as text
// nodes or attributes. page_chain.js follows in the same script: the steps of a chain.
const FULL_SHADE = 2; // nats: jumps from here on have the deepest shade
const CONTEXT = 48; // tokens of a shared prefix that are shown unasked
// What cannot be seen or turns the order of the text: it gets a sign.
const SPECIAL =
  /[\n\t\p{Cc}\p{Cs}\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const tips = new WeakMap(); // token's element -> what its tooltip says
const view = { row: null, moves: [], move: 0, asText: false, wholePrefix: false };

function make(tag, attributes = {}, ...children) {
  const element =
    tag === "rect"
      ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// JSON has no infinities: they come as words, or as null where all that is known is "not finite".
const number = (value) =>
  value === null ? NaN : typeof value === "string" ? Number(value) : value;
function nats(value, signed = false) {
  const amount = number(value);
  if (Number.isNaN(amount)) return "not finite";
  const digits = Number.isFinite(amount) ? Math.abs(amount).toFixed(2) : "∞";
  return (amount < 0 && digits !== "0.00" ? "−" : signed ? "+" : "") + digits;
}
const count = (amount, noun) => `${amount} ${noun}${amount === 1 ? "" : "s"}`;

// ---- tokens ----

// Text as nodes whose textContent is exactly that text; what cannot be seen gets a sign by CSS.
function markUp(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(SPECIAL)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    from = match.index + match[0].length;
    const code = match[0].codePointAt(0);
    const sign =
      code === 10
        ? "↵"
        : code === 9
          ? "⇥"
          : code < 32
            ? String.fromCharCode(0x2400 + code)
            : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    const mark = make("span", { class: "mark", "data-sign": sign });
    const hidden = make("span", { class: code === 10 || code === 9 ? "" : "unseen" }, match[0]);
    mark.append(hidden);
    nodes.push(mark);
  }
  nodes.push(text.slice(from));
  return nodes;
}

const pieceOf = (token) => (Object.hasOwn(data.pieces, token) ? data.pieces[token] : null);

function tokenElement(trace, place, extra = "") {
  const piece = pieceOf(trace.tokens[place]);
  const entropy = number(trace.entropy[place]);
  const before = place ? number(trace.entropy[place - 1]) : 0;
  const jump = Math.max(entropy - before, 0);
  const element = make("span", { class: `token ${extra}` });
  if (piece === null) element.append(make("span", { class: "unknown" }, `${trace.tokens[place]}`));
  else element.append(...markUp(piece));
  const shade = Math.min(jump / FULL_SHADE, 1);
  element.style.setProperty("--jump", shade ? (0.08 + 0.92 * shade).toFixed(3) : 0);
  const facts = [
    ["token", `${place + 1}`],
    ["id", `${trace.tokens[place]}`],
    ["entropy", `${nats(entropy)} nats`],
    ["jump", `${nats(jump)} nats`],
  ];
  if (trace.logProb) facts.push(["log p", `${nats(trace.logProb[place])} nats`]);
  tips.set(element, { piece, facts });
  return element;
}

function showTokens(box, trace, from, to, extra) {
  const elements = [];
  for (let place = from; place < to; place += 1) {
    elements.push(tokenElement(trace, place, extra ? extra(place) : ""));
  }
  box.replaceChildren(...elements);
  box.tabIndex = elements.length ? 0 : -1;
}

function showTip(element) {
  const tip = find("tip");
  document.querySelectorAll(".token.current").forEach((other) => other.classList.remove("current"));
  tip.hidden = !element;
  if (!element) return;
  element.classList.add("current");
  const { piece, facts } = tips.get(element);
  const list = facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  tip.replaceChildren(
    make(
      "p",
      { class: "verbatim", dir: "auto" },
      ...(piece === null ? ["(text unknown)"] : markUp(piece)),
    ),
    make("dl", {}, ...list),
  );
  const at = element.getClientRects()[0] || element.getBoundingClientRect();
  const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = at.bottom + 6;
  const fits = below + tip.offsetHeight < document.documentElement.clientHeight;
  tip.style.left = `${Math.max(left, 8) + window.scrollX}px`;
  tip.style.top = `${(fits ? below : at.top - tip.offsetHeight - 6) + window.scrollY}px`;
}

// In a focused trace the arrow keys go from token to token; elsewhere they step the chain.
function walkTokens(event, box) {
  const tokens = [...box.querySelectorAll(".token")];
  const now = tokens.findIndex((token) => token.classList.contains("current"));
  const goal = {
    ArrowLeft: Math.max(now - 1, 0),
    ArrowRight: Math.min(now + 1, tokens.length - 1),
  };
  goal.Home = 0;
  goal.End = tokens.length - 1;
  if (!tokens.length || !(event.key in goal)) return;
  event.preventDefault();
  const token = tokens[goal[event.key]];
  token.scrollIntoView({ block: "nearest" });
  showTip(token);
  const { piece, facts } = tips.get(token);
  find("readout").textContent = `${piece ?? ""} ${facts.map((fact) => fact.join(" ")).join(", ")}`;
}

// ---- what is chosen ----

const keyOf = (record) => JSON.stringify([record.problem, record.sampler, record.seed]);
const rows = new Map(data.rows.map((row) => [keyOf(row), row]));
const chains = new Map(data.history.map((chain) => [keyOf(chain), chain]));
const prompts = new Map(data.history.map((chain) => [chain.problem, chain.prompt]));
const distinct = (name, among) => [...new Set(among.map((row) => row[name]))];
const byProblem = new Map();
for (const row of data.rows) {
  if (!byProblem.has(row.problem)) byProblem.set(row.problem, []);
  byProblem.get(row.problem).push(row);
}

function fill(select, values, chosen, label = String) {
  const options = values.map((value, place) => {
    const option = make("option", { value: `${place}` }, label(value));
    option.selected = value === chosen;
    return option;
  });
  select.replaceChildren(...options);
  select.values = values;
}

const chosen = (select) => select.values[select.selectedIndex];

function choose(wanted) {
  const ofProblem = byProblem.get(wanted.problem);
  const closeness = (row) =>
    4 * (row.sampler === wanted.sampler) + 2 * (row.seed === wanted.seed) + chains.has(keyOf(row));
  const row = ofProblem.reduce((best, other) =>
    closeness(other) > closeness(best) ? other : best,
  );
  const ofSampler = ofProblem.filter((other) => other.sampler === row.sampler);
  if (!view.row) {
    fill(find("problem"), [...byProblem.keys()], row.problem);
  }
  find("problem").selectedIndex = find("problem").values.indexOf(row.problem);
  fill(find("sampler"), distinct("sampler", ofProblem), row.sampler);
  fill(find("seed"), distinct("seed", ofSampler), row.seed);
  view.row = row;
  const chain = chains.get(keyOf(row));
  view.moves = chain ? unpackMoves(chain.moves) : [];
  showPrompt(row, ofProblem);
  showResult(row);
  showChain(row);
}

function showPrompt(row, ofProblem) {
  const prompt = prompts.get(row.problem);
  find("prompt-box").hidden = prompt === undefined;
  find("prompt").replaceChildren(...markUp(prompt ?? ""));
  const lines = distinct("sampler", ofProblem).map((sampler) => {
    const marks = ofProblem
      .filter((other) => other.sampler === sampler)
      .map((other) => {
        const recorded = chains.has(keyOf(other));
        const label = `${sampler}, seed ${other.seed}: ${other.correct ? "right" : "wrong"}`;
        const mark = make(
          "button",
          {
            type: "button",
            class: `mark-button ${other.correct ? "right" : "wrong"} ${recorded ? "recorded" : ""}`,
            "aria-label": recorded ? `${label}, steps recorded` : label,
            "aria-pressed": `${other === row}`,
            title: recorded ? `${label}, steps recorded` : label,
          },
          other.correct ? "✓" : "✗",
        );
        mark.addEventListener("click", () => {
          choose(other);
          find("outcomes").querySelector("[aria-pressed=true]").focus({ preventScroll: true });
        });
        return mark;
      });
    return make("div", {}, make("span", {}, sampler), make("span", { class: "marks" }, ...marks));
  });
  find("outcomes").replaceChildren(...lines);
}

const ENDINGS = {
  eos: "ended by itself",
  length: "cut off at the longest length",
  not_finite: "stopped: not finite",
};

function showResult(row) {
  const answer = (value) =>
    value === null ? make("i", {}, "none") : make("b", { dir: "auto" }, ...markUp(`${value}`));
  const facts = [
    make(
      "span",
      { class: `badge ${row.correct ? "right" : "wrong"}` },
      row.correct ? "✓ right" : "✗ wrong",
    ),
    make("span", {}, "answer ", answer(row.answer)),
    make("span", {}, "gold ", answer(row.gold)),
    make("span", {}, `${count(row.num_tokens, "token")}, ${ENDINGS[row.ended] ?? row.ended}`),
  ];
  const held = row.tokens !== undefined;
  if (held) {
    facts.push(
      make("span", {}, `log p ${nats(row.log_prob)} nats`),
      make("span", {}, `entropy ${nats(row.entropy)} nats`),
    );
    if (row.attempted) {
      const taken = `accepted ${row.accepted} of ${count(row.attempted, "step")}`;
      facts.push(make("span", {}, `${taken}, ${count(row.null_moves, "null move")}`));
    }
  }
  find("outcome").replaceChildren(...facts);
  const known = held && row.tokens.every((token) => pieceOf(token) !== null);
  find("completion-tools").hidden = !held;
  const asText = view.asText || (held && !known && !view.asked);
  find("show-tokens").setAttribute("aria-pressed", `${!asText}`);
  find("show-text").setAttribute("aria-pressed", `${asText}`);
  find("legend").hidden = asText;
  const box = find("completion");
  box.classList.toggle("verbatim", asText);
  if (!held) {
    box.removeAttribute("tabindex");
    box.replaceChildren(
      make(
        "span",
        { class: "quiet" },
        "This page does not hold the text of this trace; rows.jsonl does.",
      ),
    );
  } else if (asText) {
    box.removeAttribute("tabindex");
    box.replaceChildren(...markUp(row.text));
  } else {
    showTokens(
      box,
      { tokens: row.tokens, entropy: row.token_entropy, logProb: row.token_log_prob },
      0,
      row.tokens.length,
    );
  }
}
