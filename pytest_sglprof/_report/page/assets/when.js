/* When: step x rank, above it the slowest rank and the mean, below it the batch. */
"use strict";
sglprof.parts.when = (place, window, data) => {
  const { element, duration, strip } = sglprof;
  for (const series of data.series) {
    const columns = series.compute_ns;
    const present = columns.map((column) => column.filter((value) => value >= 0));
    const mean = present.map((column) => (column.length ? column.reduce((a, b) => a + b, 0) / column.length : null));
    const longest = present.map((column) => (column.length ? Math.max(...column) : null));
    const excluded = series.state.filter((state) => state !== "compared").length;
    const every = series.every > 1 ? `, each column the most unequal of ${series.every} steps` : "";
    const head = `${series.group ? `${series.group}: c` : "C"}ompute of each rank relative to the step's mean; ${series.numbers.length} steps${every}${excluded ? `, ${excluded} excluded (hatched)` : ""}`;
    const marks = [];
    if (data.onset) {
      const column = series.start_ns.findIndex((start) => start >= data.onset.ms * 1e6);
      if (column >= 0) {
        marks.push({ column });
        place.append(element("p", { class: "quiet", text: `Dashed line, step ${series.numbers[column]}: onset. ${data.onset.sentence}` }));
      }
    }
    const known = (values) => values.map((value) => (value < 0 ? null : value));
    // As many digits as it takes to tell one tick from the next.
    const milliseconds = (u, splits) => {
      const gap = Math.abs((splits[1] ?? 0) - (splits[0] ?? 0)) / 1e6;
      const digits = gap > 0 ? Math.min(6, Math.max(0, Math.ceil(-Math.log10(gap) - 1e-9))) : 3;
      return splits.map((value) => (value / 1e6).toFixed(digits + (gap * 10 ** digits % 1 > 1e-6 ? 1 : 0)));
    };
    const lines = [{ height: 110, label: "ms a step", values: milliseconds, series: [{ values: longest, colour: "fail" }, { values: mean, colour: "muted", dash: [4, 3] }] }];
    const batch = known(series.batch_size);
    if (batch.some((value) => value !== null)) lines.push({ height: 64, label: "batch", values: (u, splits) => splits.map((v) => (Number.isInteger(v) ? v : "")), series: [{ values: batch, colour: "accent", stepped: true }] });
    place.append(element("p", { class: "quiet", text: `${head}. Line: slowest rank; dashed: mean of the ranks${lines.length > 1 ? "; batch: requests" : ""}. Drag to zoom, double-click to see all.` }));
    strip(place, {
      rows: series.ranks,
      values: columns,
      lines,
      marks,
      title: "Point at a step, or move with the arrow keys",
      label: (column) => String(series.numbers[column]),
      excluded: (column) => series.state[column] !== "compared",
      tell: (column, row) => {
        const ns = columns[column][row];
        const wait = series.wait_ns?.[column][row];
        const state = series.state[column];
        return [
          `step ${series.numbers[column]} ${series.stages[column]}`,
          state === "compared" ? null : state === "cut" ? "excluded: cut by the window's edge" : "excluded: not on every rank",
          series.batch_size[column] >= 0 ? `batch ${series.batch_size[column]}` : null,
          series.tokens[column] >= 0 ? `${series.tokens[column]} tokens` : null,
          ns < 0 ? `${series.ranks[row]} has no such step` : `${series.ranks[row]} ${duration(ns)}, ${(ns / mean[column]).toFixed(2)} of the mean ${duration(mean[column])}`,
          wait >= 0 ? `waits ${duration(wait)}` : null,
          longest[column] == null ? null : `slowest ${series.ranks[columns[column].indexOf(longest[column])]} ${duration(longest[column])}`,
        ].filter(Boolean).join(" · ");
      },
      choose: (column) => window.dispatchEvent(new CustomEvent("sglprof-step", { detail: { step: series.numbers[column], group: series.group } })),
    });
  }
};
