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
  const places = new Map(desk.examples.map((example, place) => [example.index, place]));
  let cards = [...document.querySelectorAll("li[data-index]")];
  const status = document.getElementById("status"), progress = document.getElementById("progress");
  const bar = document.querySelector(".bar");
  const undoButton = document.getElementById("undo"), acceptButton = document.getElementById("accept");
  const indexOf = (card) => Number(card.dataset.index);
  let decisions = new Map();  // index → a row of COLUMNS
  const past = [];  // the state before each step: lists of [index, row or undefined]
  const chosen = new Set();  // indexes of the selection
  let current = null, reachable = null, keeps = true, waiting = false, anchor = null;
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

  const unkept = document.getElementById("unkept");
  const store = desk.served === undefined ? null : servedStore({
    kept: (rows) => {
      decisions = new Map();
      for (const [index, [decision, newLabel, who, when]] of rows) {
        const example = examples.get(index);
        decisions.set(index, [index, example?.path ?? "", example?.label ?? "", decision, newLabel, who, when]);
      }
      paint();
    },
    lost: (indexes) => {
      for (let at = past.length - 1; at >= 0; at--) if (past[at].some(([index]) => indexes.includes(index))) past.splice(at, 1);
      say(`${indexes.map((index) => `Example ${index}`).join(", ")}: decided elsewhere in the meantime, and left so.`);
      paint();
    },
    warn: (text) => { if (unkept.textContent !== text) { unkept.textContent = text; unkept.hidden = !text; } },
  });
  const load = () => {
    if (store) { store.start(); return; }
    try {
      const rows = JSON.parse(localStorage.getItem(KEY) ?? "[]");
      decisions = new Map(rows.filter((row) => Array.isArray(row) && fault(row) === null).map((row) => [row[0], row]));
    } catch (error) {
      decisions = new Map();
    }
  };
  const save = (changes) => {
    if (store) {
      const pair = (row) => (row ? [row[3], row[4]] : ["", ""]);
      if (changes) store.save(changes.map(([index, row, before]) => [index, ...pair(row), ...pair(before)]));
      return;
    }
    try {
      localStorage.setItem(KEY, JSON.stringify([...decisions.values()]));
    } catch (error) {
      keeps = false;
      unkept.hidden = false;
    }
  };
  addEventListener("beforeunload", (event) => { if (!keeps && past.length) event.preventDefault(); });
  addEventListener("storage", (event) => { if (event.key === KEY) { load(); paint(); } });

  const words = (row) => {
    if (!row) return "";
    return row[3] === "relabel" ? `relabel → ${shown.get(row[4])}` : row[3];
  };
  const signed = (row) => (row?.[6] ? ` (${[row[5], row[6].slice(0, 10)].filter(Boolean).join(", ")})` : "");
  const paint = () => {
    for (const card of cards) {
      const row = decisions.get(indexOf(card)), example = examples.get(indexOf(card));
      card.dataset.decision = row ? row[3] : "";
      card.toggleAttribute("data-chosen", chosen.has(indexOf(card)));
      card.querySelector(".decided").textContent = [chosen.has(indexOf(card)) ? "selected" : "", words(row) + signed(row)].filter(Boolean).join(" · ");
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
    acceptButton.disabled = !chosen.size;
    acceptButton.textContent = chosen.size ? `Accept selection (${chosen.size})` : "Accept selection";
  };

  const put = (rows) => {
    const changes = rows.map(([index, row]) => [index, row, decisions.get(index)]);
    for (const [index, row] of rows) {
      if (row) decisions.set(index, row); else decisions.delete(index);
    }
    save(changes);
    paint();
  };
  const change = (rows) => {
    if (store && !store.writes()) {
      say("This page only shows the decisions: another influence review has the file.");
      return;
    }
    past.push(rows.map(([index]) => [index, decisions.get(index)]));
    put(rows);
  };
  // The same decision again undoes it.
  const decide = (card, decision, newLabel = "") => {
    const index = indexOf(card), { path, label } = examples.get(index), before = decisions.get(index);
    const same = before && before[3] === decision && before[4] === newLabel;
    change([[index, same ? undefined : [index, path ?? "", label, decision, newLabel]]]);
    const was = before && !same ? ` (it was ${words(before)}; z undoes)` : "";
    say(`Example ${index}: ${words(decisions.get(index)) || "undecided"}${was}.`);
  };
  const undo = () => {
    const step = past.pop();
    if (!step) return;
    put(step);
    const card = cards.find((other) => indexOf(other) === step[0]?.[0]);
    if (card && step.length === 1) select(card);
    say(step.length === 1 ? `Example ${step[0][0]}: undone.` : `${step.length} decisions are undone.`);
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
    if (card instanceof Promise) {
      waiting = true;
      card.then((there) => { waiting = false; select(there); });
      return;
    }
    take(card);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  };
  const beside = (card, by) => {
    if (list) {
      const indexes = list.indexes(), at = indexes.indexOf(indexOf(card)) + by;
      return list.card(indexes[Math.min(indexes.length - 1, Math.max(0, at))]);
    }
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

  // The example after this one that nobody has decided on, round to the beginning.
  const undecided = (card) => {
    const indexes = list ? list.indexes() : visible().map(indexOf);
    const from = card ? indexes.indexOf(indexOf(card)) + 1 : 0;
    const next = [...indexes.slice(from), ...indexes.slice(0, from)].find((index) => !decisions.has(index));
    if (next === undefined) {
      say("Every example shown is decided.");
      return null;
    }
    return list ? list.card(next) : visible().find((other) => indexOf(other) === next);
  };
  const choose = (card, through) => {
    const index = indexOf(card), indexes = list ? list.indexes() : visible().map(indexOf);
    const [from, to] = [indexes.indexOf(anchor), indexes.indexOf(index)].sort((a, b) => a - b);
    if (through && from >= 0) for (const other of indexes.slice(from, to + 1)) chosen.add(other);
    else if (!chosen.delete(index)) chosen.add(index);
    anchor = index;
    paint();
    say(`${chosen.size} selected.`);
  };
  const accept = () => {
    const free = [...chosen].filter((index) => !decisions.has(index));
    const rows = free.map((index) => {
      const { path, label, suggested } = examples.get(index);
      return [index, [index, path ?? "", label, suggested === label ? "keep" : "relabel", suggested === label ? "" : suggested]];
    });
    const before = chosen.size - free.length;
    chosen.clear();
    if (rows.length) change(rows); else paint();
    say(`${rows.length} accepted as suggested${before ? `; ${before} were decided before and stay so` : ""}. z undoes.`);
  };
  const photo = document.getElementById("photo"), keys = document.getElementById("keys");
  const enlarge = (card) => {
    const image = photo.querySelector("img"), small = card.querySelector(".frame img"), link = document.getElementById("file-link");
    if (!small) {
      say("This image cannot be read.");
      return;
    }
    image.src = list ? `photo/${indexOf(card)}` : small.src;
    image.alt = small.alt;
    const { path } = examples.get(indexOf(card));
    link.hidden = true;
    try {
      if (!list && path?.startsWith("/")) {
        link.href = `file://${path.split("/").map(encodeURIComponent).join("/")}`;
        link.hidden = false;
      }
    } catch (error) { /* a name that is no text has no link */ }
    photo.showModal();
  };
  photo.addEventListener("click", (event) => { if (event.target !== document.getElementById("file-link")) photo.close(); });
  const gone = (image) => {
    const text = document.createElement("span");
    text.className = "no-image";
    text.setAttribute("role", "img");
    text.setAttribute("aria-label", image.alt);
    text.textContent = image.closest(".beside") ? "–" : "no image";
    image.replaceWith(text);
  };
  document.addEventListener("error", ({ target }) => { if (target instanceof HTMLImageElement && target.closest("li")) gone(target); }, true);

  // Of a few pixels each one is shown as it is.
  document.addEventListener("load", ({ target }) => {
    if (target instanceof HTMLImageElement && target.naturalWidth <= 128) target.classList.add("tiny");
  }, true);

  const attach = (card) => {
    card.addEventListener("focusin", () => take(card));
    card.querySelector(".frame").addEventListener("click", () => enlarge(card));
    for (const button of card.querySelectorAll("button[data-do]")) {
      button.addEventListener("click", () => {
        if (button.dataset.do === "relabel") relabel(card); else decide(card, button.dataset.do);
      });
    }
    const input = card.querySelector("input");
    // Enter completes to the one class that begins with what was typed.
    const relabelAs = (completes) => {
      const text = input.value.trim(), low = text.toLowerCase();
      if (text === "") return true;
      let name = typed.get(text) ?? [...typed].find(([spelt]) => spelt.toLowerCase() === low)?.[1];
      const begin = desk.classes.filter(([, spelt]) => spelt.toLowerCase().startsWith(low));
      if (name === undefined && completes && begin.length > 1) {
        say(`${begin.length} classes begin with "${text}": ${begin.slice(0, 5).map(([, spelt]) => spelt).join(", ")}${begin.length > 5 ? ", …" : ""}.`);
        return false;
      }
      if (name === undefined && completes) name = begin[0]?.[0];
      if (name === undefined) {
        say(`There is no class "${text}".`);
        return false;
      }
      if (name === examples.get(indexOf(card)).label) {
        say(`Example ${indexOf(card)} is already labelled "${shown.get(name)}". Choose keep.`);
        return false;
      }
      decide(card, "relabel", name);
      input.value = "";
      return true;
    };
    input.addEventListener("change", () => relabelAs(false));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") input.value = "";
      if (event.key === "Escape" || event.key === "Enter") {
        event.preventDefault();
        const typedClass = event.key === "Enter" && input.value.trim() !== "";
        if (event.key === "Escape" || !typedClass) select(card);
        else if (relabelAs(true)) select(beside(card, 1));
      }
    });
  };

  addEventListener("keydown", (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.defaultPrevented || event.altKey || event.target.closest("input, select, textarea")) return;
    if (key === "z" && !event.shiftKey) {
      event.preventDefault();
      undo();
      return;
    }
    if (event.ctrlKey || event.metaKey || document.querySelector("dialog[open]")) return;
    if (waiting) {
      if (key in KEYS) say("The next images are on their way: decide when you see them.");
      return;
    }
    if (key === "?") {
      event.preventDefault();
      keys.showModal();
      return;
    }
    if (event.shiftKey && key !== "x") return;
    if (key === "n" || key === "a") {
      event.preventDefault();
      if (key === "n") select(undecided(current)); else accept();
      return;
    }
    let card = current && !current.hidden && current.isConnected ? current : null;
    if (!card) {
      const begins = key in KEYS || "cxo".includes(key);
      if (!begins && key !== "ArrowLeft" && key !== "ArrowRight") return;
      // The first key decides too, if the reader can see what about.
      card = visible()[0];
      select(card);
      if (!begins || !card) {
        event.preventDefault();
        return;
      }
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
    } else if (key === "o" || key === "x") {
      event.preventDefault();
      if (key === "o") enlarge(card); else choose(card, event.shiftKey);
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
  document.getElementById("export")?.addEventListener("click", () => {
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
    const width = head?.[1].join() === [...COLUMNS, "who", "when"].join() ? COLUMNS.length + 2 : COLUMNS.length;
    if (!head || head[1].slice(0, COLUMNS.length).join() !== COLUMNS.join() || head[1].length !== width) throw new Error(`the first line is not ${COLUMNS.join()}`);
    const found = new Map();
    for (const [line, fields] of rows) {
      if (fields.length !== width) throw new Error(`line ${line}: ${fields.length} fields, not ${width}`);
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
  acceptButton.addEventListener("click", accept);
  document.getElementById("next").addEventListener("click", () => select(undecided(current)));
  document.getElementById("all").addEventListener("click", () => {
    for (const index of list ? list.indexes() : visible().map(indexOf)) chosen.add(index);
    paint();
    say(`${chosen.size} selected.`);
  });

  // Filters beside that of the label: the pair of label and suggestion, and what is undecided at that moment.
  const pair = document.getElementById("pair"), open = document.getElementById("open"), counts = new Map();
  const pairOf = ({ label, suggested }) => (label === suggested ? "" : `${shown.get(label)} → ${shown.get(suggested)}`);
  for (const example of desk.examples) counts.set(pairOf(example), (counts.get(pairOf(example)) ?? 0) + 1);
  counts.delete("");
  for (const [name, count] of [...counts].sort((a, b) => b[1] - a[1]).slice(0, 500)) pair.add(new Option(`${name} (${count})`, name));
  const passes = (index) => {
    const example = examples.get(index);
    return (pair.value === "" || pairOf(example) === pair.value) && !(open.checked && decisions.has(index));
  };
  wanted = (card) => (card.dataset.index === undefined ? pair.value === "" : passes(indexOf(card)));
  pair.addEventListener("change", () => filterCards());
  open.addEventListener("change", () => filterCards());
  const list = desk.served === undefined ? null : servedList({
    gallery: document.getElementById("gallery"),
    places,
    attach: (card) => { attach(card); stops(card, -1); },
    changed: () => {
      cards = [...document.querySelectorAll("li[data-index]")];
      if (!reachable?.isConnected && cards.length) {
        reachable = cards[0];
        stops(reachable, 0);
      }
      paint();
    },
    held: (box) => current !== null && box.contains(current),
  });
  if (list) {
    instead = (group) => {
      const indexes = desk.examples.map(({ index }) => index).filter((index) => passes(index) && (group === "" || shown.get(examples.get(index).label) === group));
      current = null;
      list.show(indexes);
      const text = document.getElementById("shown");
      if (text) text.textContent = `${indexes.length} of ${examples.size} images`;
    };
  }

  // Scrolling must not hide a card behind the bar, whose height depends on its text.
  new ResizeObserver(() => {
    const covers = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
    document.documentElement.style.setProperty("--bar", `${covers}px`);
  }).observe(bar);
  progress.max = examples.size;
  for (const card of cards) { attach(card); stops(card, -1); }
  if (cards.length) {
    reachable = cards[0];
    stops(reachable, 0);
  }
  filterCards();
  load();
  save();  // warns at once if the browser keeps nothing
  paint();
}
