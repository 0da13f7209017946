/* Load: requests of each rank over time, as the server told them; samples need not share times. */
"use strict";
sglprof.parts.load = (place, window, data) => {
  const POINTS = 300;
  const series = data.load.filter((one) => one.time.length);
  if (!series.length) return;
  const begin = Math.min(...series.map((one) => one.time[0]));
  const end = Math.max(...series.map((one) => one.time[one.time.length - 1]));
  const count = Math.min(POINTS, Math.max(...series.map((one) => one.time.length)));
  const times = Array.from({ length: count }, (_, at) => begin + ((end - begin) * at) / Math.max(1, count - 1));

  /* Index of the last sample at or before each time; -1 before the first. */
  const latest = series.map((one) => {
    let at = -1;
    return times.map((time) => {
      while (at + 1 < one.time.length && one.time[at + 1] <= time + 1e-6) at += 1;
      return at;
    });
  });
  const value = (column, row) => {
    const at = latest[row][column];
    return at < 0 ? -1 : series[row].running[at] ?? -1;
  };
  const values = times.map((_, column) => series.map((_one, row) => value(column, row)));
  const highest = values.map((column) => Math.max(...column.map((one) => Math.max(0, one))));
  const digits = end - begin < 5 ? 2 : end - begin < 100 ? 1 : 0;
  const moment = (column) => `${(times[column] - begin).toFixed(digits)} s`;
  const marks = [];
  if (data.onset) {
    const column = times.findIndex((time) => time >= data.onset.ms / 1000);
    if (column >= 0) marks.push({ column });
  }
  place.append(sglprof.quiet(`Requests that run on each rank relative to the mean of the ranks, from ${series[0].source}. Line: the most on one rank. ${marks.length ? "Dashed: onset." : ""}`));
  sglprof.strip(place, {
    rows: series.map((one) => one.rank),
    values,
    marks,
    title: "Point at a moment, or move with the arrow keys",
    lines: [{ height: 72, label: "requests", values: (u, splits) => splits.map((one) => (Number.isInteger(one) ? one : "")), series: [{ values: highest, colour: "accent", stepped: true }] }],
    label: moment,
    tell: (column, row) => {
      const at = latest[row][column];
      if (at < 0) return `${moment(column)} · ${series[row].rank} has not told anything yet`;
      const one = series[row];
      return `${moment(column)} · ${one.rank} ${one.running[at] ?? "?"} running, ${one.waiting[at] ?? "?"} waiting, ${one.tokens[at] ?? "?"} tokens`;
    },
  });
};
