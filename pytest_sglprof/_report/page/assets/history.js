/* Over these runs: small charts of one figure each, a point a run, its sign the verdict. */
"use strict";
sglprof.parts.history = (place, _window, data) => {
  const { element, colour, charts } = sglprof;
  const { runs, charts: wanted } = data[Number(place.dataset.index)];
  if (!wanted.length) return;
  const SIGNS = { fail: "✗", inconclusive: "?" };
  const knowsAccepted = runs.some((run) => run.is_accepted != null);
  const KEY = knowsAccepted ? "● accepted, ○ not accepted, ✗ fail, ? inconclusive, dashed: change" : "● pass, ✗ fail, ? inconclusive";
  const isBad = (run) => !run.is_accepted && (run.verdict === "fail" || run.verdict === "inconclusive");
  const sign = (run) => (isBad(run) ? SIGNS[run.verdict] : run.is_accepted === false ? "○" : "●");
  const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
  const x = runs.map((_run, at) => at + 1);
  const readout = element("p", { class: "readout", "aria-live": "polite", text: `Point at a run, or move with the arrow keys. ${KEY}` });
  const box = element("div", { class: "chart small-multiples", tabindex: 0, role: "img", "aria-label": `Figures of ${runs.length} runs; the table below has them all. Left and right move.` });
  place.append(readout, box);
  const room = sglprof.room(place);
  const width = Math.floor(room / (room >= 900 ? 3 : room >= 620 ? 2 : 1)) - 12;
  const key = `history-${place.dataset.index}`;
  const plots = [];
  let at = 0;

  const figure = (value) => (value == null ? "?" : value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(4));

  function tell(index) {
    at = index;
    const run = runs[at];
    const figures = wanted.flatMap((chart) => chart.series.map((one) => `${chart.title}${one.label ? ` (${one.label})` : ""} ${figure(one.values[at])}`));
    readout.textContent = [`${at + 1}: ${run.run}`, run.opened, run.verdict, run.is_accepted ? "accepted" : "", ...figures].filter(Boolean).join(" · ");
  }

  function paint(u, chart) {
    const { ctx } = u;
    ctx.save();
    ctx.font = `600 ${13 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    for (const one of chart.series) {
      one.values.forEach((value, index) => {
        if (value == null) return;
        ctx.fillStyle = colour(isBad(runs[index]) ? runs[index].verdict : "accent");
        ctx.fillText(sign(runs[index]), u.valToPos(x[index], "x", true), u.valToPos(value, "y", true));
      });
    }
    ctx.strokeStyle = colour("inconclusive");
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const change of chart.changes ?? []) {
      const place = u.valToPos(x[change] - 0.5, "x", true);
      ctx.beginPath();
      ctx.moveTo(place, u.bbox.top);
      ctx.lineTo(place, u.bbox.top + u.bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  const few = (u, splits) => splits.map((value) => (Number.isInteger(value) && value >= 1 && value <= runs.length ? value : ""));
  for (const chart of wanted) {
    const cell = element("div", { class: "figure" }, element("p", { text: `${chart.title}; ${chart.better} is better` }));
    if (chart.series.length > 1) cell.append(element("p", { class: "quiet", text: chart.series.map((one, index) => `${["—", "– –", "· ·", "— ·"][index % 4]} ${one.label}`).join("  ") }));
    box.append(cell);
    const options = {
      width,
      height: 150,
      legend: { show: false },
      cursor: { sync: { key, scales: ["x", null] }, drag: { x: false, y: false }, points: { show: false }, y: false },
      padding: [10, 12, 0, 0],
      scales: {
        x: { time: false, range: () => [0.6, runs.length + 0.4] },
        y: { range: (_u, low, high) => { const room = Math.max((high - low) * 0.15, Math.abs(high) * 0.01); return [low - room, high + room]; } },
      },
      axes: [
        sglprof.axis({ values: few, incrs: [1, 2, 5, 10, 20, 50, 100], space: 28, size: 26, grid: { show: false } }),
        sglprof.axis({ size: 62, space: 26 }),
      ],
      series: [{}, ...chart.series.map((_one, index) => ({ stroke: () => colour("muted"), width: 1.5, dash: DASHES[index % 4], points: { show: false }, spanGaps: false }))],
      hooks: { draw: [(u) => paint(u, chart)], setCursor: [(u) => { if (u.cursor.idx != null) tell(u.cursor.idx); }] },
    };
    const u = new uPlot(options, [x, ...chart.series.map((one) => one.values)], cell);
    u.whole = width;
    plots.push(u);
    charts.add(u);
  }
  plots.forEach((u) => uPlot.sync(key).sub(u));
  box.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    tell(Math.min(runs.length - 1, Math.max(0, at + (event.key === "ArrowRight" ? 1 : -1))));
    const left = plots[0].valToPos(x[at], "x");
    plots[0].setCursor({ left, top: 10 });
    event.preventDefault();
  });
  box.sglprofChart = plots[0];
};
