// The review desk: decide on labels by mouse or keys. The browser keeps the decisions; decisions.csv exports and imports.
{
  const desk = JSON.parse(document.getElementById("desk").textContent);
  const KEY = `influence:${desk.key}`;
  const COLUMNS = ["index", "path", "label", "decision", "new_label"];
  const DECISIONS = ["keep", "relabel", "drop", "unsure"];
  const KEYS = { k: "keep", r: "relabel", d: "drop", u: "unsure" };
  const examples = new Map(desk.examples.map((example) => [example.index, example]));
  const shown = new Map(desk.classes);
  const typed = new Map([...desk.classes.map(([name, spelt]) => [spelt, name]), ...desk.classes.map(([name]) => [name, name])]);
  const cards = [...document.querySelectorAll("li[data-index]")];
  const status = document.getElementById("status"), progress = document.getElementById("progress");
  const bar = document.querySelector(".bar");
  const undoButton = document.getElementById("undo");
  const indexOf = (card) => Number(card.dataset.index);
  let decisions = new Map();  // index → a row of COLUMNS
  const past = [];  // the state before each step: lists of [index, row or undefined]
  let current = null, reachable = null, keeps = true;
  const tail = (path) => path.split(/[/\\]/).slice(-2).join("/");

  const say = (text) => { status.textContent = text; };

  // Why a row is refused, or null.
  const fault = (row) => {
    const [index, path, label, decision, newLabel] = row;
    if (!Number.isSafeInteger(index) || index < 0) return `${row[0]} is not an index`;
    if (index >= desk.count) return `there is no example ${index}; the data set has ${desk.count}`;
    if (!DECISIONS.includes(decision)) return `there is no decision "${decision}"; known: ${DECISIONS.join(", ")}`;
    if (!shown.has(label)) return `there is no class "${label}"`;
    if (decision === "relabel" && !shown.has(newLabel)) return `there is no class "${newLabel}"`;
    if (decision !== "relabel" && newLabel !== "") return `${decision} takes no new label, but "${newLabel}" is given`;
    const example = examples.get(index);
    if (example && example.label !== label) return `example ${index} is labelled "${shown.get(example.label)}" here, "${label}" in the file`;
    // A saved file has U+FFFD for a byte that is not UTF-8. The whole project may have moved.
    const own = example?.path?.replace(/[\uD800-\uDFFF]/g, "\uFFFD");
    if (own && path !== "" && tail(own) !== tail(path.replace(/[\uD800-\uDFFF]/g, "\uFFFD"))) {
      return `example ${index} is ${tail(own)} here, ${tail(path)} in the file`;
    }
    return null;
  };

  const load = () => {
    try {
      const rows = JSON.parse(localStorage.getItem(KEY) ?? "[]");
      decisions = new Map(rows.filter((row) => Array.isArray(row) && fault(row) === null).map((row) => [row[0], row]));
    } catch (error) {
      decisions = new Map();
    }
  };
  const save = () => {
    try {
      localStorage.setItem(KEY, JSON.stringify([...decisions.values()]));
    } catch (error) {
      keeps = false;
      document.getElementById("unkept").hidden = false;
    }
  };
  addEventListener("beforeunload", (event) => { if (!keeps && past.length) event.preventDefault(); });
  addEventListener("storage", (event) => { if (event.key === KEY) { load(); paint(); } });

  const words = (row) => {
    if (!row) return "";
    return row[3] === "relabel" ? `relabel → ${shown.get(row[4])}` : row[3];
  };
  const paint = () => {
    for (const card of cards) {
      const row = decisions.get(indexOf(card)), example = examples.get(indexOf(card));
      card.dataset.decision = row ? row[3] : "";
      card.querySelector(".decided").textContent = words(row);
      for (const button of card.querySelectorAll("button[data-do]")) {
        const suggested = button.dataset.do !== "relabel" || row?.[4] === example.suggested;
        button.setAttribute("aria-pressed", String(row?.[3] === button.dataset.do && suggested));
      }
    }
    const own = [...examples.keys()].map((index) => decisions.get(index)?.[3]).filter(Boolean);
    const counts = DECISIONS.map((name) => [name, own.filter((decision) => decision === name).length]);
    const parts = counts.filter(([, count]) => count).map(([name, count]) => `${count} ${name}`);
    document.getElementById("decided").textContent = `${own.length} of ${examples.size} decided${parts.length ? `: ${parts.join(", ")}` : ""}`;
    progress.value = own.length;
    undoButton.disabled = !past.length;
  };

  const change = (rows) => {
    past.push(rows.map(([index]) => [index, decisions.get(index)]));
    for (const [index, row] of rows) {
      if (row) decisions.set(index, row); else decisions.delete(index);
    }
    save();
    paint();
  };
  // The same decision again undoes it.
  const decide = (card, decision, newLabel = "") => {
    const index = indexOf(card), { path, label } = examples.get(index), before = decisions.get(index);
    const same = before && before[3] === decision && before[4] === newLabel;
    change([[index, same ? undefined : [index, path ?? "", label, decision, newLabel]]]);
    say(`Example ${index}: ${same ? "undecided" : words(decisions.get(index))}.`);
  };
  const undo = () => {
    const step = past.pop();
    if (!step) return;
    for (const [index, row] of step) {
      if (row) decisions.set(index, row); else decisions.delete(index);
    }
    save();
    paint();
    const card = cards.find((other) => indexOf(other) === step[0]?.[0]);
    if (card && step.length === 1) select(card);
    say(step.length === 1 ? `Example ${step[0][0]}: undone.` : `The import of ${step.length} decisions is undone.`);
  };

  const visible = () => cards.filter((card) => !card.hidden);
  // Tab stops at one card at a time, and at its buttons.
  const stops = (card, index) => {
    card.tabIndex = index;
    for (const control of card.querySelectorAll("button, input")) control.tabIndex = index;
  };
  const take = (card) => {
    if (reachable && reachable !== card) stops(reachable, -1);
    stops(card, 0);
    current = reachable = card;
  };
  const select = (card) => {
    if (!card) return;
    take(card);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  };
  const beside = (card, by) => {
    const all = visible();
    return all[Math.min(all.length - 1, Math.max(0, all.indexOf(card) + by))];
  };
  // The nearest card in the row above or below.
  const across = (card, sign) => {
    const from = card.getBoundingClientRect();
    let best = card, cost = Infinity;
    for (const other of visible()) {
      const to = other.getBoundingClientRect(), down = sign * (to.top - from.top);
      const own = down * 1000 + Math.abs(to.left - from.left);
      if (down > 4 && own < cost) [best, cost] = [other, own];
    }
    return best;
  };
  const relabel = (card) => {
    const { label, suggested } = examples.get(indexOf(card));
    if (suggested === label) {
      card.querySelector("input").focus();
      return false;
    }
    decide(card, "relabel", suggested);
    return true;
  };

  for (const card of cards) {
    card.addEventListener("focusin", () => take(card));
    stops(card, -1);
    for (const button of card.querySelectorAll("button[data-do]")) {
      button.addEventListener("click", () => {
        if (button.dataset.do === "relabel") relabel(card); else decide(card, button.dataset.do);
      });
    }
    const input = card.querySelector("input");
    const relabelAs = () => {
      const text = input.value.trim();
      if (text === "") return;
      const name = typed.get(text) ?? [...typed].find(([spelt]) => spelt.toLowerCase() === text.toLowerCase())?.[1];
      if (name === undefined) {
        say(`There is no class "${text}".`);
      } else if (name === examples.get(indexOf(card)).label) {
        say(`Example ${indexOf(card)} is already labelled "${shown.get(name)}". Choose keep.`);
      } else {
        decide(card, "relabel", name);
        input.value = "";
      }
    };
    input.addEventListener("change", relabelAs);
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") input.value = "";
      if (event.key === "Escape" || event.key === "Enter") {
        event.preventDefault();
        select(card);  // leaving the field takes what was typed
      }
    });
  }

  addEventListener("keydown", (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.defaultPrevented || event.altKey || event.target.closest("input, select, textarea")) return;
    if (key === "z" && !event.shiftKey) {
      event.preventDefault();
      undo();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    const card = current && !current.hidden ? current : null;
    if (!card) {
      if (key in KEYS || key === "c" || key === "ArrowLeft" || key === "ArrowRight") {
        event.preventDefault();
        select(visible()[0]);
      }
      return;
    }
    const inside = card.contains(document.activeElement);
    if (key.startsWith("Arrow") && !inside) return;  // the page scrolls
    const moved = {
      ArrowLeft: () => beside(card, -1),
      ArrowRight: () => beside(card, 1),
      ArrowUp: () => across(card, -1),
      ArrowDown: () => across(card, 1),
    }[key];
    if (moved) {
      event.preventDefault();
      select(moved());
    } else if (key === "c") {
      event.preventDefault();
      card.querySelector("input").focus();
    } else if (key in KEYS) {
      event.preventDefault();
      const done = key === "r" ? relabel(card) : (decide(card, KEYS[key]), true);
      if (done) select(beside(card, 1));
    }
  });

  // decisions.csv: RFC 4180. An apostrophe goes before text that a spreadsheet would run as a formula, and one more if
  // the name itself begins that way.
  const guarded = (text) => (/^'*[=+\-@\t\r]/.test(text) ? `'${text}` : text);
  const unguarded = (text) => (/^'+[=+\-@\t\r]/.test(text) ? text.slice(1) : text);
  const field = (value) => {
    const text = typeof value === "number" ? String(value) : guarded(value);
    return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  document.getElementById("export").addEventListener("click", () => {
    const rows = [...decisions.values()].sort((a, b) => a[0] - b[0]);
    const text = [COLUMNS, ...rows].map((row) => row.map(field).join(",") + "\n").join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "decisions.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    const on = desk.split === "train" ? "" : ` --on ${desk.split}`;
    const others = rows.filter(([index]) => !examples.has(index)).length;
    const beside = others ? ` (${others} of them for examples that this page does not show)` : "";
    say(`${rows.length} decisions exported${beside}; next: influence relabel decisions.csv${on}`);
  });

  // Rows of fields, with the line number on which each row begins.
  const parse = (text) => {
    const rows = [];
    let row = [], value = "", quoted = false, wasQuoted = false, line = 1, start = 1;
    const close = () => { row.push(value); value = ""; wasQuoted = false; };
    const end = () => {
      close();
      if (row.length > 1 || row[0] !== "") rows.push([start, row]);
      row = [];
    };
    for (let at = 0; at < text.length; at++) {
      const letter = text[at];
      if (letter === "\n") line += 1;
      if (quoted) {
        if (letter !== '"') value += letter;
        else if (text[at + 1] === '"') { value += '"'; at += 1; }
        else quoted = false;
      } else if (letter === '"' && value === "" && !wasQuoted) { quoted = true; wasQuoted = true; }
      else if (letter === ",") close();
      else if (letter === "\n") { end(); start = line; }
      else if (letter !== "\r") value += letter;
    }
    if (quoted) throw new Error(`line ${start}: a quotation mark is not closed`);
    if (value !== "" || row.length) end();
    return rows;
  };
  const read = (text) => {
    const [head, ...rows] = parse(text.replace(/^\uFEFF/, ""));
    if (!head || head[1].join() !== COLUMNS.join()) throw new Error(`the first line is not ${COLUMNS.join()}`);
    const found = new Map();
    for (const [line, fields] of rows) {
      if (fields.length !== COLUMNS.length) throw new Error(`line ${line}: ${fields.length} fields, not ${COLUMNS.length}`);
      const [index, path, label, decision, newLabel] = fields;
      const row = [/^\d+$/.test(index) ? Number(index) : index, unguarded(path), unguarded(label), decision, unguarded(newLabel)];
      const wrong = fault(row);
      if (wrong) throw new Error(`line ${line}: ${wrong}`);
      const before = found.get(row[0]);
      if (before && before.join("\0") !== row.join("\0")) throw new Error(`line ${line}: example ${row[0]} has two decisions`);
      found.set(row[0], row);
    }
    return found;
  };
  const file = document.getElementById("file");
  document.getElementById("import").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    const [given] = file.files;
    file.value = "";  // allows choosing the same file again
    if (!given) return;
    try {
      const found = read(await given.text());
      if (found.size) change([...found]);
      const here = [...found.keys()].filter((index) => examples.has(index)).length;
      say(`${found.size} decisions imported, ${here} of them on this page.`);
    } catch (error) {
      say(`${given.name}: ${error.message}. Nothing was imported.`);
    }
  });
  undoButton.addEventListener("click", undo);

  // Scrolling must not hide a card behind the bar, whose height depends on its text.
  new ResizeObserver(() => {
    const covers = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
    document.documentElement.style.setProperty("--bar", `${covers}px`);
  }).observe(bar);
  progress.max = examples.size;
  if (cards.length) {
    reachable = cards[0];
    stops(reachable, 0);
  }
  load();
  save();  // warns at once if the browser keeps nothing
  paint();
}
