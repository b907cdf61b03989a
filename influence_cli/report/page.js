"use strict";
const filter = document.getElementById("filter");
// What else a card has to be, and what to do instead where cards come from a server: the desk sets them.
let wanted = () => true, instead = null, filterCards = () => {};
{
  const cards = [...document.querySelectorAll(".cards > li")];
  const apply = () => {
    const group = filter?.value ?? "";
    if (instead) { instead(group); return; }
    for (const card of cards) card.hidden = (group !== "" && card.dataset.group !== group) || !wanted(card);
    for (const list of document.querySelectorAll(".cards")) {
      list.nextElementSibling.hidden = [...list.children].some((card) => !card.hidden);
    }
    const shown = cards.filter((card) => !card.hidden).length;
    if (filter) document.getElementById("shown").textContent = `${shown} of ${cards.length} images`;
  };
  filter?.addEventListener("change", apply);
  filterCards = apply;
  if (filter) apply();  // a reloaded page keeps its choice
}
const number = (text) => (/\d/.test(text) ? parseFloat(text.replace(/[,\s%]/g, "").replace("−", "-")) : null);
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
    const numeric = head.classList.contains("num"), before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numeric;  // numbers: largest first
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => { const text = row.cells[column].textContent.trim(); return numeric ? number(text) : text; };
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);  // missing numbers stay last
      return (down ? -1 : 1) * (numeric ? x - y : x.localeCompare(y));
    };
    body.append(...[...body.rows].sort(order));
  });
}
for (const button of document.querySelectorAll(".unfold")) {
  button.addEventListener("click", () => {
    button.previousElementSibling.classList.remove("folded");
    button.closest(".scroll").focus();  // the button is gone
    button.hidden = true;
  });
}
const closed = () => [...document.querySelectorAll("details:not([open])")];
let opened = [];
addEventListener("beforeprint", () => { opened = closed(); for (const part of opened) part.open = true; });
addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
