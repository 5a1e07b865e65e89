"use strict";
// The page reads without this. It adds the table's search, sorting and pages, and the choice of a coreset.
{
  const PAGE_ROWS = 50;
  const SHORT = 160; // characters of a text before it is folded
  const { rows, reasons, coresets } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const everyRow = rows.row.map((_, i) => i);
  const searched = everyRow.map((i) => `${rows.row[i]}\n${rows.prompt[i]}\n${rows.response[i]}`.toLowerCase());
  const state = { coreset: coresets[0], column: "row", direction: 1, page: 0, found: everyRow, marked: null };

  // A column's value in row i; null where it is not known.
  const value = {
    stratum: (i) => (state.coreset.stratum[i] < 0 ? null : state.coreset.stratum[i]),
    ratio: (i) => state.coreset.ratio[state.coreset.stratum[i]] ?? null,
    reason: (i) => reasons[state.coreset.reason[i]],
    chosen: (i) => value.reason(i).startsWith("chosen"),
  };
  for (const name of Object.keys(rows)) value[name] = (i) => rows[name][i];

  function format(x, digits = 4) {
    if (x === null) return "–";
    return (Number.isInteger(x) ? x.toLocaleString("en") : String(Number(x.toPrecision(digits)))).replace("-", "−");
  }

  function cell(row, text, kind = "") {
    const td = row.insertCell();
    td.className = kind;
    td.textContent = text; // never as HTML: anyone may have written the texts
    return td;
  }

  function textCell(row, text) {
    if (text.length <= SHORT + 20) return cell(row, text, "text");
    const details = document.createElement("details");
    const [summary, whole] = ["summary", "div"].map((name) => details.appendChild(document.createElement(name)));
    summary.textContent = `${text.slice(0, SHORT)}…`;
    whole.textContent = text;
    cell(row, "", "text").append(details);
  }

  function find() {
    const words = byId("search").value.toLowerCase().trim();
    const number = words.match(/^row:\s*(\d+)$/);
    state.marked = number && Number(number[1]);
    const [which, stratum] = [byId("which").value, byId("stratum").value];
    const keys = everyRow.map(value[state.column]);
    state.found = everyRow
      .filter(
        (i) =>
          (number ? rows.row[i] === state.marked : searched[i].includes(words)) &&
          (which === "" || String(value.chosen(i)) === which) &&
          (stratum === "" || String(value.stratum(i)) === stratum),
      )
      .sort((a, b) => {
        const [x, y] = [keys[a], keys[b]];
        if (x === null || y === null) return (x === null) - (y === null) || a - b; // unknown last, either way
        return (x < y ? -1 : x > y ? 1 : 0) * state.direction || a - b;
      });
    show(0);
  }

  function show(page) {
    const { found, marked } = state;
    const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
    const body = byId("table").tBodies[0];
    state.page = page;
    body.replaceChildren();
    for (const i of found.slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS)) {
      const row = body.insertRow();
      row.classList.toggle("chosen", value.chosen(i));
      row.classList.toggle("marked", rows.row[i] === marked);
      cell(row, String(rows.row[i]));
      textCell(row, rows.prompt[i]);
      textCell(row, rows.response[i]);
      for (const name of ["effort", "target", "length", "stratum"]) cell(row, format(value[name](i)));
      cell(row, format(value.ratio(i), 3));
      cell(row, value.chosen(i) ? "yes" : "no");
      cell(row, value.reason(i), "reason");
    }
    byId("found").value = `${found.length.toLocaleString("en")} of ${everyRow.length.toLocaleString("en")} rows`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
    for (const th of all("#table th")) {
      const direction = state.direction === 1 ? "ascending" : "descending";
      th.setAttribute("aria-sort", th.dataset.column === state.column ? direction : "none");
    }
  }

  function choose(number) {
    state.coreset = coresets[number];
    for (const part of all("[data-coreset]")) part.hidden = part.dataset.coreset !== state.coreset.name;
    for (const part of all("details[data-coreset]")) part.open = true;
    const options = [["", "all"], ...state.coreset.ratio.map((_, i) => [i, i])];
    if (state.coreset.ratio.length) options.push(["null", "none: the hardest, left out"]);
    byId("stratum").replaceChildren(...options.map(([of, text]) => new Option(text, of)));
    find();
  }

  for (const th of all("#table th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = th.textContent;
    th.replaceChildren(button);
    button.addEventListener("click", () => {
      state.direction = state.column === th.dataset.column ? -state.direction : 1;
      state.column = th.dataset.column;
      find();
    });
  }
  for (const id of ["search", "which", "stratum"]) byId(id).addEventListener("input", find);
  byId("previous").addEventListener("click", () => show(state.page - 1));
  byId("next").addEventListener("click", () => show(state.page + 1));
  byId("download").addEventListener("click", () => {
    const names = all("#table th").map((th) => th.dataset.column);
    const lines = state.found.map((i) => `${JSON.stringify(Object.fromEntries(names.map((n) => [n, value[n](i)])))}\n`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = `${state.coreset.name}.jsonl`;
    link.click();
  });
  for (const button of all("[data-copy]")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
    });
  }
  byId("coreset").addEventListener("change", (event) => choose(event.target.selectedIndex));
  for (const point of all("figure path:has(> title)")) {
    const row = point.textContent.match(/^row (\d+)/);
    if (!row) continue;
    point.addEventListener("click", () => {
      byId("which").value = byId("stratum").value = "";
      byId("search").value = `row:${row[1]}`;
      find();
      byId("samples").scrollIntoView({ behavior: "smooth" });
    });
  }
  document.documentElement.classList.add("js");
  byId("settings").open = false;
  choose(0);
}
