// The steps of a chain, one at a time; follows page.js in the same script.

// Traces come as what they keep of the one before and what follows.
function unpack(packed, reference) {
  const join = (name) => reference[name].slice(0, packed.keep).concat(packed[name]);
  return { tokens: join("tokens"), entropy: join("entropy") };
}

function unpackMoves(moves) {
  let trace = { tokens: [], entropy: [] };
  return moves.map((move) => {
    if (move.kind === "extension") {
      const before = trace;
      trace = unpack(move.trace, trace);
      return { ...move, verdict: "extension", before, after: trace, from: move.trace.keep };
    }
    const before = unpack(move.current, trace);
    const proposal = unpack(move.proposal, before);
    trace = move.accepted ? proposal : before;
    const verdict = !move.divergence
      ? "null"
      : move.accepted
        ? "accepted"
        : move.stopped
          ? "stopped"
          : "rejected";
    const from = move.divergence ? move.divergence - 1 : before.tokens.length;
    return { ...move, verdict, before, proposal, after: trace, from };
  });
}

const NAMES = {
  extension: "Extension",
  accepted: "Accepted",
  rejected: "Rejected",
  stopped: "Rejected early",
  null: "Null move",
};

function showChain(row) {
  const moves = view.moves;
  find("stepper").hidden = !moves.length;
  const missing = find("steps-missing");
  missing.hidden = moves.length > 0;
  if (!moves.length) {
    const why =
      row.attempted === 0
        ? "This trace was drawn without steps."
        : "The steps of this trace are not in this page.";
    missing.replaceChildren(why);
    if (data.history.length) {
      const go = make("button", { type: "button" }, "Show a chain with recorded steps");
      const near = data.history.find(
        (chain) => chain.problem === row.problem && rows.has(keyOf(chain)),
      );
      const goal = near ?? data.history.find((chain) => rows.has(keyOf(chain)));
      go.addEventListener("click", () => choose(goal));
      if (goal) missing.append(" ", go);
    }
    return;
  }
  find("stepper").style.minHeight = "";
  drawColumns(moves);
  find("slider").max = `${moves.length - 1}`;
  const firstChange = moves.findIndex((move) => move.verdict === "accepted");
  show(Math.max(firstChange, 0));
}

// One column a move: the trace from its first token down, and what the move did to it.
function drawColumns(moves) {
  const longest = Math.max(
    ...moves.map((move) => Math.max(move.after.tokens.length, move.proposal?.tokens.length ?? 0)),
    1,
  );
  const height = 100;
  const y = (tokens) => (height * tokens) / longest;
  const gap = moves.length > 120 ? 0.04 : 0.1;
  const parts = [];
  const bar = (column, from, to, kind, margin = gap) => {
    const height = Math.max(y(to) - y(from), 0);
    const size = { x: column + margin, y: y(from), width: 1 - 2 * margin, height };
    parts.push(make("rect", { class: kind, ...size }));
  };
  moves.forEach((move, column) => {
    const length = move.before.tokens.length;
    const end = move.proposal ? move.proposal.tokens.length : move.after.tokens.length;
    bar(column, 0, move.kind === "extension" ? move.from : length, "kept");
    if (move.verdict !== "null")
      bar(column, move.from, end, move.verdict === "stopped" ? "rejected" : move.verdict);
    else bar(column, move.cut - 1, length, "null", 0.32);
    if (move.kind === "step") {
      const line = { x: column + gap, y: y(move.cut - 1) - 0.9, width: 1 - 2 * gap, height: 1.8 };
      parts.push(make("rect", { class: "cut", ...line }));
    }
  });
  // Where columns are thin a frame would hide the column: two ticks point at it instead.
  const wide = moves.length <= 60;
  const cursor = { class: wide ? "cursor frame" : "cursor", width: wide ? 1 : moves.length / 80 };
  for (const [top, extent] of wide
    ? [[0, height]]
    : [
        [-7, 5],
        [102, 5],
      ]) {
    parts.push(make("rect", { ...cursor, y: top, height: extent }));
  }
  find("columns").setAttribute("viewBox", `0 0 ${moves.length} ${height}`);
  find("columns").replaceChildren(...parts);
  find("tapestry").style.setProperty("--moves", moves.length);
  const stages = distinct("stage", moves).map((stage) => {
    const share = moves.filter((move) => move.stage === stage).length;
    const label = make("span", {}, `${stage}`);
    label.style.flexGrow = share;
    return label;
  });
  find("stages").replaceChildren(...stages);
  find("stages").style.setProperty("--moves", moves.length);
}

function show(place) {
  view.move = Math.min(Math.max(place, 0), view.moves.length - 1);
  view.wholePrefix = false;
  const move = view.moves[view.move];
  const slider = find("slider");
  const where = `Stage ${move.stage}, ${move.kind === "step" ? `step ${move.step}` : "extension"}`;
  slider.value = `${view.move}`;
  slider.setAttribute("aria-valuetext", `${where}: ${NAMES[move.verdict]}`);
  document.querySelectorAll("rect.cursor").forEach((cursor) => {
    cursor.setAttribute("x", view.move + (1 - cursor.getAttribute("width")) / 2);
  });
  find("place").textContent = `${where} · move ${view.move + 1} of ${view.moves.length}`;
  for (const id of ["first", "back"]) find(id).setAttribute("aria-disabled", `${view.move === 0}`);
  for (const id of ["last", "forward"])
    find(id).setAttribute("aria-disabled", `${view.move === view.moves.length - 1}`);
  find("verdict").textContent = NAMES[move.verdict];
  find("verdict").className = `badge ${move.verdict}`;
  find("story").textContent = storyOf(move);
  find("reason").textContent = reasonOf(move);
  showTerms(move);
  showPrefix(move);
  showSuffixes(move);
  showTip(null);
  // Never shorter than before: at the end of the page the controls would move under the pointer.
  find("stepper").style.minHeight = `${find("stepper").offsetHeight}px`;
}

function storyOf(move) {
  const length = move.before.tokens.length;
  if (move.verdict === "extension") {
    const added = move.after.tokens.length - move.from;
    return move.from
      ? `The trace of ${count(move.from, "token")} is continued by ${count(added, "token")}.`
      : `The first ${count(added, "token")} of the trace are drawn.`;
  }
  const start = `Cut at token ${move.cut} of ${length}.`;
  const same = (last) =>
    last === move.cut ? `Token ${last} was` : `Tokens ${move.cut} to ${last} were`;
  if (move.verdict === "null") return `${start} ${same(length)} drawn again as before.`;
  return move.divergence > move.cut
    ? `${start} ${same(move.divergence - 1)} drawn again as before; the proposal leaves ` +
        `the trace at token ${move.divergence}.`
    : `${start} The proposal leaves the trace at once.`;
}

function reasonOf(move) {
  const [ratio, threshold] = [nats(move.log_ratio), nats(move.log_uniform)];
  return {
    extension: "An extension is always taken; the steps of this stage then refine it.",
    null: "The proposal is the trace itself, so nothing changes and no token was decoded.",
    accepted: `log\u00a0A\u00a0=\u00a0${ratio} is not below log\u00a0u\u00a0=\u00a0${threshold}: the new suffix is taken.`,
    rejected: `log\u00a0A\u00a0=\u00a0${ratio} is below log\u00a0u\u00a0=\u00a0${threshold}: the old suffix stays.`,
    stopped:
      `log\u00a0A can only fall and is already ${ratio}, ` +
      `below log\u00a0u\u00a0=\u00a0${threshold}: the rest was never drawn.`,
  }[move.verdict];
}

// log A as a sum: each bar starts where the one before it ended.
function showTerms(move) {
  const box = find("terms");
  box.hidden = move.verdict === "extension" || move.verdict === "null";
  if (box.hidden) return;
  const changes = [number(move.weight_new), -number(move.weight_old), number(move.cut_change)];
  const bound = move.verdict === "stopped" ? "at most" : "";
  const lines = [
    ["weight of the new suffix", changes[0]],
    ["minus that of the old suffix", changes[1]],
    ["change of the cut law", changes[2]],
  ];
  const [total, threshold] = [number(move.log_ratio), number(move.log_uniform)];
  const ends = changes.reduce((sums, change) => [...sums, sums[sums.length - 1] + change], [0]);
  const marks = [...ends, total, threshold].filter(Number.isFinite);
  const [low, high] = [Math.min(...marks), Math.max(...marks)];
  const room = (high - low || 1) * 0.04;
  const percent = (value) =>
    Math.min(Math.max((100 * (value - low + room)) / (high - low + 2 * room), 0), 100) || 0;
  const line = (label, value, kind, from, to, signed) => {
    const bar = make("i", { class: `bar ${kind}` });
    bar.style.left = `${Math.min(percent(from), percent(to))}%`;
    bar.style.width = `${Math.abs(percent(to) - percent(from))}%`;
    const track = make("span", { class: "track", "aria-hidden": "true" }, bar);
    track.style.setProperty("--zero", `${percent(0)}%`);
    track.style.setProperty("--threshold", `${percent(threshold)}%`);
    return [make("dt", {}, label), make("dd", {}, nats(value, signed)), track];
  };
  box.replaceChildren(
    make(
      "dl",
      {},
      ...lines.flatMap(([label, change], place) =>
        line(label, change, change < 0 ? "less" : "more", ends[place], ends[place + 1], true),
      ),
      ...line(`log A${bound && `, ${bound}`}`, total, `total ${move.verdict}`, 0, total, false),
      ...line("log u", threshold, "none", threshold, threshold, false),
    ),
    make("p", { class: "quiet" }, "Nats. Bars add up to log A; the dashed line is log u."),
  );
}

function showPrefix(move) {
  const cut = move.kind === "step" ? move.cut - 1 : move.from;
  const start = view.wholePrefix ? 0 : Math.max(cut - CONTEXT, 0);
  find("shared-heading").textContent =
    {
      extension: move.from ? "Trace so far" : "",
      null: "Trace, unchanged",
    }[move.verdict] ?? (move.from ? "Shared prefix" : "No shared prefix");
  const more = find("whole-prefix");
  more.hidden = start === 0;
  more.textContent = `Show the ${count(start, "token")} before`;
  const box = find("shared");
  box.hidden = !move.from;
  showTokens(box, move.before, start, move.from, (place) => (place >= cut ? "redrawn" : ""));
  if (move.kind === "step")
    box.insertBefore(make("span", { class: "cut-mark" }), box.children[cut - start] ?? null);
}

function showSuffixes(move) {
  const step = move.kind === "step";
  find("suffixes").hidden = move.verdict === "null";
  find("old-pane").hidden = !step;
  if (move.verdict === "null") return;
  const next = step ? move.proposal : move.after;
  const [oldCount, newCount] = [move.before, next].map((trace) =>
    count(Math.max(trace.tokens.length - move.from, 0), "token"),
  );
  const fate = (kept) => make("span", { class: "fate" }, kept ? "kept" : "dropped");
  if (step) {
    find("old-heading").replaceChildren(`Old suffix, ${oldCount} `, fate(!move.accepted));
    find("new-heading").replaceChildren(
      `New suffix, ${newCount}${move.stopped ? " drawn" : ""} `,
      fate(move.accepted),
    );
    showTokens(find("old"), move.before, move.from, move.before.tokens.length);
  } else {
    find("new-heading").replaceChildren(`Extension, ${newCount}`);
  }
  showTokens(find("new"), next, move.from, next.tokens.length);
  find("old-pane").className = move.accepted ? "dropped" : "kept";
  find("new-pane").className = step && !move.accepted ? "dropped" : "kept";
  find("new").classList.toggle("unfinished", move.verdict === "stopped");
}

// ---- what the reader does ----

function sortTable(button) {
  const heading = button.closest("th");
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const numeric = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const rising = before ? before === "descending" : !numeric;
  const value = (line) => {
    const cell = line.cells[column];
    return numeric ? Number(cell.dataset.sort) : cell.textContent;
  };
  const compare = (first, second) => {
    const [a, b] = [value(first), value(second)];
    if (!numeric) return (rising ? 1 : -1) * a.localeCompare(b);
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // empty last
    return (rising ? 1 : -1) * (a - b);
  };
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

function pressKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const { target } = event;
  if (event.key === "Escape") showTip(null);
  const box = target.closest(".trace");
  if (box && box.matches(":focus-visible")) {
    walkTokens(event, box);
    return;
  }
  // Selects and the slider know these keys themselves; the page keeps Home and End elsewhere.
  if (target.closest("select, input, .scroll") || !view.moves.length) return;
  const inside = target.closest("#steps");
  const goal = { ArrowLeft: view.move - 1, ArrowRight: view.move + 1 };
  if (inside) Object.assign(goal, { Home: 0, End: view.moves.length - 1 });
  if (!(event.key in goal) || !(inside || target === document.body || target.closest("#viewer")))
    return;
  event.preventDefault();
  show(goal[event.key]);
}

function start() {
  document.querySelectorAll("#table th button").forEach((button) => {
    button.addEventListener("click", () => sortTable(button));
  });
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((details) => details.setAttribute("open", ""));
  });
  if (!data.rows.length) return;
  find("viewer").hidden = false;
  const readSelects = () =>
    choose({
      problem: chosen(find("problem")),
      sampler: chosen(find("sampler")),
      seed: chosen(find("seed")),
    });
  for (const id of ["problem", "sampler", "seed"]) find(id).addEventListener("change", readSelects);
  const moveProblem = (by) => {
    const problems = find("problem").values;
    const place = (find("problem").selectedIndex + by + problems.length) % problems.length;
    choose({ ...view.row, problem: problems[place] });
  };
  const jump = {
    first: () => 0,
    back: () => view.move - 1,
    forward: () => view.move + 1,
    last: () => view.moves.length - 1,
  };
  for (const [id, goal] of Object.entries(jump))
    find(id).addEventListener("click", () => show(goal()));
  find("previous-problem").addEventListener("click", () => moveProblem(-1));
  find("next-problem").addEventListener("click", () => moveProblem(1));
  find("slider").addEventListener("input", () => show(Number(find("slider").value)));
  find("whole-prefix").addEventListener("click", () => {
    view.wholePrefix = true;
    showPrefix(view.moves[view.move]);
    find("shared").focus();
  });
  for (const [id, asText] of [
    ["show-tokens", false],
    ["show-text", true],
  ]) {
    find(id).addEventListener("click", () => {
      Object.assign(view, { asText, asked: true });
      showResult(view.row);
    });
  }
  document.addEventListener("pointerover", (event) => showTip(event.target.closest(".token")));
  document.addEventListener("focusout", () => showTip(null));
  document.addEventListener("keydown", pressKey);
  const recorded = data.history.filter((chain) => rows.has(keyOf(chain)));
  choose(recorded.find((chain) => chain.sampler === "entropy_cut") ?? recorded[0] ?? data.rows[0]);
}

start();
