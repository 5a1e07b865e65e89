"use strict";
// The page reads without this. It adds the table's search, sorting and pages, the choice of a coreset, live figures.
{
  const PAGE_ROWS = 50;
  const SHORT = 160; // characters of a text before it is folded
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const rows = data.rows;
  const count = rows.row.length;
  const everyRow = rows.row.map((_, i) => i);
  const haystack = everyRow.map((i) => `${rows.row[i]}\n${rows.prompt[i]}\n${rows.response[i]}`.toLowerCase());
  const state = { coreset: 0, column: "row", direction: 1, page: 0 };

  // A column's value in row i; null where it is not known.
  const coreset = () => data.coresets[state.coreset];
  const stratumOf = (i) => (coreset().stratum[i] < 0 ? null : coreset().stratum[i]);
  const value = {
    stratum: stratumOf,
    ratio: (i) => (stratumOf(i) === null ? null : coreset().ratio[stratumOf(i)]),
    chosen: (i) => data.groups[coreset().group[i]].chosen,
    reason: (i) => data.groups[coreset().group[i]].reason,
  };
  for (const name of ["row", "prompt", "response", "effort", "target", "length"]) value[name] = (i) => rows[name][i];

  function format(x, digits = 4) {
    if (x === null) return "–";
    return (Number.isInteger(x) ? x.toLocaleString("en") : String(Number(x.toPrecision(digits)))).replace("-", "−");
  }

  function cell(row, text, kind) {
    const td = row.insertCell();
    if (kind) td.className = kind;
    td.textContent = text; // never as HTML: the texts are of strangers
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

  let found = everyRow;
  let marked = null; // the one row that is searched for by its number

  function find() {
    const words = byId("search").value.toLowerCase().trim();
    const number = words.match(/^row:\s*(\d+)$/);
    marked = number && Number(number[1]);
    const which = byId("which").value;
    const stratum = byId("stratum").value;
    found = everyRow.filter(
      (i) =>
        (number ? rows.row[i] === marked : haystack[i].includes(words)) &&
        (which === "" || value.chosen(i) === (which === "1")) &&
        (stratum === "" || stratumOf(i) === (stratum === "none" ? null : Number(stratum))),
    );
    const of = value[state.column];
    const keys = everyRow.map(of);
    found.sort((a, b) => {
      const [x, y] = [keys[a], keys[b]];
      if (x === null || y === null) return (x === null) - (y === null) || a - b; // unknown last, either way
      return (x < y ? -1 : x > y ? 1 : 0) * state.direction || a - b;
    });
    state.page = 0;
    show();
  }

  function show() {
    const body = byId("table").tBodies[0];
    const first = state.page * PAGE_ROWS;
    const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
    body.replaceChildren();
    for (const i of found.slice(first, first + PAGE_ROWS)) {
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
    byId("found").value = `${found.length.toLocaleString("en")} of ${count.toLocaleString("en")} rows`;
    byId("page").textContent = `page ${state.page + 1} of ${pages}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page >= pages - 1;
    for (const th of document.querySelectorAll("#table th")) {
      const direction = state.direction === 1 ? "ascending" : "descending";
      th.setAttribute("aria-sort", th.dataset.column === state.column ? direction : "none");
    }
  }

  // The figures' named data for the coreset; with_points in selection/report/page.py does the same.
  function figureData() {
    const { status, ...named } = coreset().data;
    for (const [name, columns] of Object.entries(data.bases)) {
      named[name] = columns.row.map((_, i) => {
        const point = { status: data.statuses[status[name][i]] };
        for (const [column, values] of Object.entries(columns)) point[column] = values[i];
        return point;
      });
    }
    return named;
  }

  const live = new Map(); // chart's name: what vega-embed made

  async function draw(element) {
    const name = element.dataset.chart;
    const holder = document.createElement("div");
    const options = {
      actions: false,
      ast: true, // expressions are interpreted, not compiled: the page's policy forbids code out of text
      defaultStyle: false,
      renderer: "svg",
      tooltip: { disableDefaultStyle: true },
    };
    const made = await window.vegaEmbed(holder, { ...data.charts[name], datasets: figureData() }, options);
    live.get(name)?.finalize();
    live.set(name, made);
    element.replaceChildren(holder);
    made.view.addEventListener("click", (_, item) => {
      if (item?.datum?.row === undefined) return;
      byId("which").value = byId("stratum").value = "";
      byId("search").value = `row:${item.datum.row}`;
      find();
      byId("samples").scrollIntoView({ behavior: "smooth" });
    });
  }

  function choose(number) {
    state.coreset = number;
    for (const part of document.querySelectorAll("[data-coreset]")) part.hidden = part.dataset.coreset !== coreset().name;
    const options = [["", "all"], ...coreset().ratio.map((_, i) => [i, i])];
    if (coreset().ratio.length) options.push(["none", "none: the hardest, left out"]);
    byId("stratum").replaceChildren(...options.map(([of, text]) => new Option(text, of)));
    find();
  }

  for (const th of document.querySelectorAll("#table th")) {
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
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    byId(id).addEventListener("click", () => {
      state.page += step;
      show();
    });
  }
  byId("coreset").addEventListener("change", (event) => {
    choose(event.target.selectedIndex);
    document.querySelectorAll("[data-chart]").forEach(draw);
  });
  document.documentElement.classList.add("js");
  byId("settings").open = false;
  choose(0);

  // Figures become live as they come into sight; until then, and on paper, the page's own drawings stand.
  const sight = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        sight.unobserve(target);
        if (!live.has(target.dataset.chart)) draw(target);
      }
    }
  });
  document.querySelectorAll("[data-chart]").forEach((element) => sight.observe(element));
}
