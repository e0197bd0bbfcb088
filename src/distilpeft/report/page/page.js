"use strict";
(() => {
  const root = document.documentElement;

  // Theme: the system's until the reader chooses. A page from a file may not be allowed to remember.
  const button = document.getElementById("theme");
  const remembered = (value) => {
    try {
      if (value) localStorage.setItem("distilpeft-theme", value);
      return localStorage.getItem("distilpeft-theme");
    } catch { return null; }
  };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`);
  };
  const before = remembered();
  if (before === "dark" || before === "light") root.dataset.theme = before;
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remembered(root.dataset.theme);
    label();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();

  // Tables: a column's head sorts by it, once more turns it round; what is missing stays last.
  const key = (row, at, number) => {
    const cell = row.cells[at];
    if (!number) return cell.textContent.trim();
    return "value" in cell.dataset ? Number(cell.dataset.value) : null;
  };
  const sort = (head) => {
    const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
    const number = head.dataset.sort === "number";
    const up = head.getAttribute("aria-sort") !== "ascending";
    const sign = up ? 1 : -1;
    const rows = [...body.rows].map((row) => [key(row, at, number), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (number ? a - b : a.localeCompare(b));
    });
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows.map(([, row]) => row));
  };
  for (const head of document.querySelectorAll("th[data-sort]")) {
    const inner = document.createElement("button");
    inner.type = "button";
    inner.append(...head.childNodes);
    inner.addEventListener("click", () => sort(head));
    head.append(inner);
  }

  // Points: hovering and focus show the figures; each plot is one stop of the Tab key, arrows move within it.
  const tip = document.getElementById("tip");
  const show = (point) => {
    tip.textContent = point.dataset.tip;
    tip.hidden = false;
    const box = point.querySelector(".hit").getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = box.top - own.height - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  for (const chart of document.querySelectorAll("svg.chart")) {
    const points = [...chart.querySelectorAll(".point")].sort((a, b) => a.dataset.x - b.dataset.x || a.dataset.y - b.dataset.y);
    if (points.length) points[0].setAttribute("tabindex", "0");
    points.forEach((point, at) => {
      point.querySelector("title")?.remove();
      point.addEventListener("pointerenter", () => show(point));
      point.addEventListener("pointerleave", hide);
      point.addEventListener("click", () => point.focus());
      point.addEventListener("focus", () => show(point));
      point.addEventListener("blur", hide);
      point.addEventListener("keydown", (event) => {
        if (event.key === "Escape") return hide();
        const next = event.key in STEPS ? points[at + STEPS[event.key]] : null;
        if (!next) return;
        event.preventDefault();
        point.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
      });
    });
  }
  // What has the focus is scrolled to, and keeps its figures beside it.
  addEventListener("scroll", () => {
    const focused = document.activeElement?.closest?.(".point");
    if (focused && !tip.hidden) show(focused); else hide();
  }, { passive: true });

  // Paper has no way to open anything.
  const closed = new Set();
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not([open])")) { closed.add(one); one.open = true; }
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
    closed.clear();
  });
})();
