/* Which: a row of the kernel table opens into its calls, rank by rank. */
"use strict";
sglprof.parts.which = (section, window) => {
  const { element, duration } = sglprof;

  function boxes(ranks, quantiles) {
    const present = quantiles.filter(Boolean);
    const low = Math.min(...present.map((points) => points[0]));
    const high = Math.max(...present.map((points) => points[4]));
    const medians = quantiles.map((points) => (points ? points[2] : -1));
    const slowest = medians.indexOf(Math.max(...medians));
    const width = 360;
    const x = (value) => (high > low ? ((value - low) / (high - low)) * (width - 4) + 2 : width / 2);
    const body = element("tbody");
    ranks.forEach((rank, at) => {
      const points = quantiles[at];
      const row = element("tr", {}, element("th", { scope: "row", text: rank }));
      if (points) {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        const shape = (tag, cls, attributes) => {
          const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
          made.setAttribute("class", cls);
          for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
          svg.append(made);
        };
        svg.setAttribute("class", at === slowest ? "box slowest" : "box");
        svg.setAttribute("width", width);
        svg.setAttribute("height", 16);
        svg.setAttribute("aria-hidden", "true");
        shape("line", "range", { x1: x(points[0]), x2: x(points[4]), y1: 8, y2: 8 });
        shape("rect", "body", { x: x(points[1]), width: Math.max(2, x(points[3]) - x(points[1])), y: 4, height: 8 });
        shape("line", "mid", { x1: x(points[2]), x2: x(points[2]), y1: 2, y2: 14 });
        row.append(element("td", {}, svg), ...[0, 2, 4].map((q) => element("td", { class: "n", text: sglprof.three(points[q] / 1e3) })));
      } else row.append(element("td", { text: "no call" }));
      body.append(row);
    });
    const head = ["Rank", "", "shortest, µs", "median, µs", "longest, µs"].map((text, at) => element("th", { scope: "col", class: at > 1 ? "n" : null, text }));
    return element("table", {}, element("thead", {}, element("tr", {}, ...head)), body);
  }

  function detail(place, group, row) {
    place.append(element("p", { class: "full", text: row.name.slice(0, 2000) }));
    place.append(element("h4", { text: "Durations of its calls: from the shortest to the longest, half of them in the box, line at the median" }));
    place.append(boxes(group.ranks, row.quantiles));
    const readout = (values, what) => (column, at) => {
      const ns = values[column][at];
      const present = values[column].filter((value) => value >= 0);
      const mean = present.reduce((a, b) => a + b, 0) / Math.max(1, present.length);
      return ns < 0 ? `${what(column)} · ${group.ranks[at]} has none` : `${what(column)} · ${group.ranks[at]} ${duration(ns)}, ${mean ? (ns / mean).toFixed(2) : "–"} of the mean ${duration(mean)}`;
    };
    if (!row.by_step) {
      place.append(sglprof.quiet("By step and by call only the kernels with the most lost time are kept."));
      return;
    }
    place.append(element("h4", { text: "Step by step: kernel time relative to the mean of the ranks" }));
    sglprof.strip(place, { rows: group.ranks, values: row.by_step, label: (column) => String(group.numbers[column]), title: "Point at a step", tell: readout(row.by_step, (column) => `step ${group.numbers[column]}`) });
    if (row.by_call.length > 1) {
      place.append(element("h4", { text: "Call by call: the k-th call in a step (layer by layer, for most kernels), mean over the steps" }));
      sglprof.strip(place, { rows: group.ranks, values: row.by_call, label: (column) => String(column + 1), title: "Point at a call", tell: readout(row.by_call, (column) => `call ${column + 1}`) });
    }
  }

  /* The rows that do not stand in the page. */
  async function showAll(table) {
    const rest = section.querySelector(`button.all[data-table="${table.id}"]`);
    if (!rest || rest.disabled) return;
    rest.disabled = true;
    const data = await sglprof.load(window);
    const body = table.tBodies[0];
    data.more[Number(table.dataset.group)].forEach((kernel) => {
      const button = element("button", { type: "button", class: "opens", "aria-expanded": "false", "data-row": body.querySelectorAll("tr:not(.opened)").length, title: kernel.full.slice(0, 2000), text: kernel.name });
      body.append(element("tr", { class: kernel.outside ? "outside" : null },
        element("td", { class: "name" }, button),
        ...kernel.cells.map((cell) => element("td", { class: cell.of || null, text: cell.text }))));
    });
    rest.parentElement.remove();
  }

  section.addEventListener("click", async (event) => {
    if (event.target.matches("button.all")) showAll(document.getElementById(event.target.dataset.table));
    const button = event.target.closest("button.opens");
    if (!button) return;
    const line = button.closest("tr");
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) {
      line.nextElementSibling.querySelectorAll(".chart").forEach((chart) => sglprof.charts.delete(chart.sglprofChart));
      line.nextElementSibling.remove();
      return;
    }
    const cell = element("td", { colspan: 8, class: "detail" });
    line.after(element("tr", { class: "opened" }, cell));
    const data = await sglprof.load(window);
    const group = data.kernels[Number(line.closest("table").dataset.group)];
    detail(cell, group, group.rows[Number(button.dataset.row)]);
  });

  for (const input of section.querySelectorAll("input[data-filters]")) {
    input.addEventListener("input", async () => {
      const table = document.getElementById(input.dataset.filters);
      await showAll(table);
      const wanted = input.value.toLowerCase();
      for (const line of table.tBodies[0].rows) {
        if (line.className === "opened") line.hidden = line.previousElementSibling.hidden;
        else line.hidden = !line.textContent.toLowerCase().includes(wanted);
      }
    });
  }
};
