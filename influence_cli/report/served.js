// The desk of a server: its cards come a few at a time, and it has every decision on disk before it says so.
// `kept` takes what the server holds, `lost` the changes that another tab was first with, `warn` a sentence or "".
const servedStore = ({ kept, lost, warn }) => {
  let version = -1, writes = true, busy = false, queue = [];
  const ask = async (options) => {
    const answer = await fetch(options ? "decisions" : `decisions?since=${version}`, options);
    return [answer.status, await answer.json()];
  };
  const adopt = (state) => {
    version = state.version;
    if (!state.rows) return;
    writes = state.writes;
    const rows = new Map(state.rows.map(([index, ...row]) => [index, row]));
    // What is still on its way is shown as decided.
    for (const [index, decision, label] of queue) {
      if (decision) rows.set(index, [decision, label, "", ""]); else rows.delete(index);
    }
    kept(rows);
    warn(writes ? "" : "Another influence review has this file of decisions: this one only shows it.");
  };
  const later = () => setTimeout(flush, 1000);
  const flush = async () => {
    if (busy || !queue.length) return;
    busy = true;
    // An example twice in the queue goes in two requests.
    const sent = [], seen = new Set();
    while (queue.length && !seen.has(queue[0][0])) { seen.add(queue[0][0]); sent.push(queue.shift()); }
    try {
      const body = JSON.stringify(sent), headers = { "content-type": "application/json" };
      const [status, state] = await ask({ method: "POST", headers, body });
      if (status === 200) {
        if (state.version === version + 1) version = state.version;
        warn("");
      } else if (status === 409 && state.rows) {
        const now = new Map(state.rows.map(([index, decision, label]) => [index, [decision, label]]));
        const first = ([index, , , decision, label]) => (now.get(index) ?? ["", ""]).join("\0") === [decision, label].join("\0");
        const others = new Set(sent.filter((change) => !first(change)).map(([index]) => index));
        queue = [...sent, ...queue].filter(([index]) => !others.has(index));
        adopt(state);
        lost([...others]);
      } else {
        queue = [];
        version = -1;
        await poll(true);
        warn(`Not kept: ${state.error}`);
      }
    } catch (error) {
      queue = [...sent, ...queue];
      warn(`influence review does not answer: ${queue.length} decisions are not on disk. Start it again and keep this page open to copy them.`);
      busy = false;
      later();
      return;
    }
    busy = false;
    flush();
  };
  const poll = async (now = false) => {
    if (!now && (busy || queue.length || document.hidden)) return;
    try {
      const [status, state] = await ask();
      if (status === 200) adopt(state); else warn(state.error);
    } catch (error) {
      warn("influence review does not answer: it has ended, or this computer slept.");
    }
  };
  addEventListener("beforeunload", (event) => { if (busy || queue.length) event.preventDefault(); });
  document.addEventListener("visibilitychange", () => poll());
  setInterval(poll, 2000);
  return {
    start: () => poll(true),
    save: (changes) => { queue.push(...changes); flush(); },
    writes: () => writes,
  };
};

// Cards of any number of examples, in lists of SIZE. Lists that are far away are empty, but as tall as they were.
const servedList = ({ gallery, places, attach, changed, held }) => {
  const SIZE = 60;
  let shown = [], lists = [], tall = 0, round = 0;
  const load = (list) => {
    if (list.loading) return list.loading;
    const mine = round;
    list.loading = (async () => {
      try {
        const at = list.indexes.map((index) => places.get(index)).join(",");
        const answer = await fetch(`cards?at=${at}`);
        if (!answer.ok) throw new Error(answer.statusText);
        const html = await answer.text();
        if (mine !== round) return;
        list.box.innerHTML = html;
        for (const card of list.box.children) attach(card);
        list.box.style.minHeight = "";
        tall = list.box.offsetHeight / list.indexes.length;
        changed();
      } catch (error) {
        list.loading = null;
        setTimeout(() => { if (mine === round && list.near) load(list); }, 1000);
      }
    })();
    return list.loading;
  };
  const leave = (list) => {
    if (!list.loading || held(list.box)) return;
    list.box.style.minHeight = `${list.box.offsetHeight}px`;
    list.box.replaceChildren();
    list.loading = null;
    changed();
  };
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const list = lists.find((other) => other.box === target);
      if (!list) continue;
      list.near = isIntersecting;
      if (isIntersecting) load(list); else leave(list);
    }
  }, { rootMargin: "2000px" });
  const box = document.createElement("div");
  box.className = "lists";
  gallery.append(box);
  return {
    show: (indexes) => {
      round += 1;
      near.disconnect();
      shown = indexes;
      lists = [];
      for (let from = 0; from < indexes.length; from += SIZE) {
        const part = document.createElement("ul");
        part.className = "cards wide";
        part.setAttribute("role", "list");
        const own = indexes.slice(from, from + SIZE);
        part.style.minHeight = `${Math.ceil(own.length * (tall || 110))}px`;
        lists.push({ box: part, indexes: own, loading: null, near: false });
      }
      box.replaceChildren(...lists.map((list) => list.box));
      for (const list of lists) near.observe(list.box);
      changed();
    },
    indexes: () => shown,
    // The card of an example, at once or as soon as it is there.
    card: (index) => {
      const list = lists.find((other) => other.indexes.includes(index));
      const find = () => list.box.querySelector(`li[data-index="${index}"]`);
      if (!list || find()) return list ? find() : null;
      return load(list).then(find);
    },
  };
};
