/* What all parts of the page share. Text only ever enters the document as text, but for the content
   of packed windows: made with all others, by the templates of the page. */
"use strict";
const sglprof = (() => {
  const parts = {};
  const charts = new Set(); // what has to be drawn again when colours change

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") made.textContent = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value != null) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child != null));
    return made;
  }

  function three(value) {
    const size = Math.abs(value);
    if (!size) return "0";
    // Times are cut after four digits: one that ends in 5 must round up, as what it stands for.
    return (value * (1 + 1e-12)).toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3);
  }

  function duration(ns) {
    const size = Math.abs(ns);
    if (size < 1e3) return `${three(ns)} ns`;
    if (size < 1e6) return `${three(ns / 1e3)} µs`;
    return size < 1e10 ? `${three(ns / 1e6)} ms` : `${three(ns / 1e9)} s`;
  }

  const probe = element("span", { hidden: true });
  let known = {};

  function colour(name) {
    if (!(name in known)) {
      if (!probe.isConnected) document.body.append(probe);
      probe.style.color = `var(--${name})`;
      known[name] = getComputedStyle(probe).color;
    }
    return known[name];
  }

  function isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function redraw() {
    known = {};
    for (const chart of charts) chart.redraw(false, true);
  }

  /* Width for a chart in `place`, px. */
  function room(place) {
    const { paddingLeft, paddingRight } = getComputedStyle(place);
    return Math.max(320, Math.floor(place.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight)));
  }

  /* Charts as wide as their places, at most `widest` px. */
  function resize(widest = Infinity) {
    for (const chart of charts) {
      const place = chart.root.closest(".chart").parentElement;
      const few = chart.root.closest(".small-multiples"); // keep their width, side by side
      if (place.clientWidth) chart.setSize({ width: few ? Math.min(chart.whole, widest / 3 - 12) : Math.min(widest, room(place)), height: chart.height });
    }
  }

  // Shades are those of the tables: how far above the mean, on one scale everywhere.
  const SHADES = [1.01, 1.02, 1.05, 1.1, 1.2, 1.35, 1.6];

  function shade(ratio) {
    let level = 0;
    while (level < SHADES.length && ratio >= SHADES[level]) level += 1;
    return level;
  }

  /* What is drawn of a window, unpacked once; null until `load` has ended. */
  const unpacked = new Map();
  const loading = new Map();

  function load(window) {
    if (!loading.has(window)) loading.set(window, unpack(window).then((value) => unpacked.set(window, value).get(window)));
    return loading.get(window);
  }

  const canUnpack = typeof DecompressionStream === "function";

  async function unpack(window) {
    if (!canUnpack) return new Promise(() => {}); // the page says so
    if (document.readyState === "loading") await new Promise((go) => addEventListener("DOMContentLoaded", go)); // data stands last
    const text = document.getElementById(`${window.id}-data`).textContent;
    const letters = atob(text);
    const bytes = new Uint8Array(letters.length); // filled by a loop: `from` takes ten times as long
    for (let at = 0; at < letters.length; at += 1) bytes[at] = letters.charCodeAt(at);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const value = await new Response(stream).json();
    for (const picture of value.lanes?.steps ?? []) {
      for (const lane of picture.lanes) {
        let end = 0;
        lane.start_ns = lane.gap_ns.map((gap, at) => {
          const start = end + gap;
          end = start + lane.dur_ns[at];
          return start;
        });
      }
    }
    return value;
  }

  /* The content of a window whose data holds that as well: only the worst of many have it at once. */
  function fill(window) {
    const value = unpacked.get(window);
    if (!value || !window.matches("[data-packed]")) return;
    window.removeAttribute("data-packed");
    while (window.lastElementChild.tagName !== "SUMMARY") window.lastElementChild.remove();
    window.insertAdjacentHTML("beforeend", value.content);
    delete value.content;
    begin(window);
  }

  /* The scripts of what stands in a window. */
  function begin(window) {
    window.querySelectorAll(".which").forEach((section) => parts.which(section, window));
  }

  const data = (window) => unpacked.get(window) ?? null;

  function quiet(text) {
    return element("p", { class: "quiet", text });
  }

  return { parts, charts, element, three, duration, colour, isDark, redraw, room, resize, shade, load, fill, begin, data, quiet, canUnpack };
})();
