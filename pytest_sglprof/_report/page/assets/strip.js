/* A strip: columns along x (steps, calls), a row a rank, shade by the ratio to the column's mean.
   Keys: left and right move, + and - zoom, 0 shows all. */
"use strict";
sglprof.AXIS = 92; // px left of every chart, so that charts under each other line up

sglprof.axis = (more) => ({
  stroke: () => sglprof.colour("muted"),
  grid: { stroke: () => sglprof.colour("line"), width: 1 },
  ticks: { stroke: () => sglprof.colour("line"), width: 1 },
  font: "12px system-ui, sans-serif",
  ...more,
});

sglprof.hatch = (context, left, top, width, height, style, gap = 5) => {
  context.save();
  context.beginPath();
  context.rect(left, top, width, height);
  context.clip();
  context.strokeStyle = style;
  context.lineWidth = devicePixelRatio;
  context.beginPath();
  const step = gap * devicePixelRatio;
  // Lines of one hatch meet across neighbours, since they start from the canvas's origin.
  for (let at = Math.floor((left - height) / step) * step; at < left + width; at += step) {
    context.moveTo(at, top + height);
    context.lineTo(at + height, top);
  }
  context.stroke();
  context.restore();
};

sglprof.rowLabels = (u, rows, height) => {
  const { ctx, bbox } = u;
  const every = Math.max(1, Math.ceil((12 * devicePixelRatio) / height));
  ctx.save();
  ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.fillStyle = sglprof.colour("fg");
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  rows.forEach((row, at) => {
    if (at % every === 0) ctx.fillText(row, bbox.left - 8 * devicePixelRatio, bbox.top + (at + 0.5) * height, bbox.left - 10 * devicePixelRatio);
  });
  ctx.restore();
};

/* place: element. rows: labels. values: columns of rows, negative where absent.
   label(column): text of an x value. tell(column, row): the readout.
   marks: [{column, text}] vertical lines. excluded(column): true where it is hatched.
   above, below: series as uPlot draws them, sharing the x axis. choose(column): on Enter. */
sglprof.strip = (place, { rows, values, label, tell, marks = [], excluded = () => false, lines = [], choose, title }) => {
  const { element, colour, shade, charts } = sglprof;
  const count = values.length;
  const positions = Array.from({ length: count }, (_, at) => at);
  const readout = element("p", { class: "readout", "aria-live": "polite", text: title });
  const box = element("div", { class: "chart", tabindex: 0, role: "img", "aria-label": `${title}. Left and right move, plus and minus zoom, 0 shows all.` });
  place.append(readout, box);
  const width = sglprof.room(place);
  const rowHeight = Math.min(26, Math.max(6, Math.floor(160 / rows.length)));
  const key = `strip-${(sglprof.strips = (sglprof.strips ?? 0) + 1)}`;
  const sync = uPlot.sync(key);
  const mine = [];
  let at = 0;
  let row = 0;

  function zoom(min, max) {
    const low = Math.max(-0.5, min);
    const high = Math.min(count - 0.5, max);
    if (high - low < 2) return;
    mine.forEach((u) => u.setScale("x", { min: low, max: high }));
  }

  function means() {
    return values.map((column) => {
      const present = column.filter((value) => value >= 0);
      return present.length ? present.reduce((a, b) => a + b, 0) / present.length : 0;
    });
  }
  const mean = means();

  function paint(u) {
    const { ctx, bbox } = u;
    const height = bbox.height / rows.length;
    const first = Math.max(0, Math.floor(u.scales.x.min + 0.5));
    const last = Math.min(count - 1, Math.ceil(u.scales.x.max));
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    const fills = [colour("raised"), ...[1, 2, 3, 4, 5, 6, 7].map((level) => colour(`s${level}`))];
    for (let column = first; column <= last; column += 1) {
      const left = Math.round(u.valToPos(column - 0.5, "x", true));
      const wide = Math.max(1, Math.round(u.valToPos(column + 0.5, "x", true)) - left);
      const gap = wide > 6 * devicePixelRatio ? 1 : 0;
      for (let r = 0; r < rows.length; r += 1) {
        const value = values[column][r];
        if (value < 0) continue;
        ctx.fillStyle = fills[mean[column] ? shade(value / mean[column]) : 0];
        ctx.fillRect(left, bbox.top + r * height, wide - gap, height - (height > 4 ? 1 : 0));
      }
      if (excluded(column)) sglprof.hatch(ctx, left, bbox.top, wide, bbox.height, colour("muted"));
    }
    for (const mark of marks) {
      const x = u.valToPos(mark.column - 0.5, "x", true);
      ctx.strokeStyle = colour("fail");
      ctx.lineWidth = 2 * devicePixelRatio;
      ctx.setLineDash([6, 4]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
    sglprof.rowLabels(u, rows, height);
  }

  function move(u) {
    const index = u.cursor.idx;
    if (index == null) return;
    at = index;
    if (u === heat && u.cursor.top >= 0) row = Math.min(rows.length - 1, Math.max(0, Math.floor(u.cursor.top / (u.over.clientHeight / rows.length))));
    readout.textContent = tell(at, row);
  }

  const x = (u, splits) => splits.map((value) => (Number.isInteger(value) && value >= 0 && value < count ? label(value) : ""));
  const shared = (height, more) => ({
    width,
    height,
    legend: { show: false },
    cursor: { sync: { key, scales: ["x", null] }, drag: { x: true, y: false }, points: { show: false }, y: false },
    padding: [8, 8, 4, 0],
    ...more,
    hooks: {
      setCursor: [move],
      setScale: [(u, scale) => {
        if (scale !== "x") return;
        const { min, max } = u.scales.x;
        for (const other of mine) if (other !== u && (other.scales.x.min !== min || other.scales.x.max !== max)) other.setScale("x", { min, max });
      }],
      ...more.hooks,
    },
  });
  for (const line of lines) {
    const options = shared(line.height, {
      scales: { x: { time: false, range: (u, min, max) => [min === 0 ? -0.5 : min, max === count - 1 ? count - 0.5 : max] } },
      axes: [sglprof.axis({ show: false }), sglprof.axis({ size: sglprof.AXIS - 18, label: line.label, labelSize: 18, labelFont: "12px system-ui, sans-serif", space: 24, values: line.values })],
      series: [{}, ...line.series.map((one) => ({ stroke: () => colour(one.colour), width: 1.5, dash: one.dash, points: { show: false }, spanGaps: false, paths: one.stepped ? uPlot.paths.stepped({ align: 0 }) : undefined }))],
      hooks: {},
    });
    const u = new uPlot(options, [positions, ...line.series.map((one) => one.values)], box);
    mine.push(u);
    sync.sub(u);
  }
  const heat = new uPlot(
    shared(rows.length * rowHeight + 34, {
      scales: { x: { time: false, range: (u, min, max) => [min === 0 ? -0.5 : min, max === count - 1 ? count - 0.5 : max] }, y: { range: [0, 1] } },
      axes: [sglprof.axis({ values: x, grid: { show: false }, size: 28 }), sglprof.axis({ size: sglprof.AXIS, values: () => [], grid: { show: false }, ticks: { show: false } })],
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: { draw: [paint] },
    }),
    [positions, positions.map(() => 0)],
    box,
  );
  mine.push(heat);
  sync.sub(heat);
  mine.forEach((u) => charts.add(u));

  box.addEventListener("keydown", (event) => {
    const { min, max } = heat.scales.x;
    const span = max - min;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      at = Math.min(count - 1, Math.max(0, at + (event.key === "ArrowRight" ? 1 : -1)));
      if (at < min || at > max) zoom(at - span / 2, at + span / 2);
      heat.setCursor({ left: heat.valToPos(at, "x"), top: (row + 0.5) * rowHeight });
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      row = Math.min(rows.length - 1, Math.max(0, row + (event.key === "ArrowDown" ? 1 : -1)));
      heat.setCursor({ left: heat.valToPos(at, "x"), top: (row + 0.5) * rowHeight });
    } else if (event.key === "+" || event.key === "=") zoom(at - span / 4, at + span / 4);
    else if (event.key === "-") zoom(at - span, at + span);
    else if (event.key === "0") zoom(-0.5, count - 0.5);
    else if (event.key === "Enter" && choose) choose(at);
    else return;
    event.preventDefault();
  });
  if (choose) heat.over.addEventListener("click", () => choose(at));
  box.sglprofChart = heat;
  return heat;
};
