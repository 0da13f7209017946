/* The lanes: all ranks of one step on one time axis, one lane a stream. Waiting in a collective
   is hatched, and a line joins the arrivals of all ranks, so that the late one stands out. */
"use strict";
(() => {
  const { element, duration, three, colour } = sglprof;
  const TOO_NARROW = 34; // px below which a bar has no room for a name

  /* base: hue and saturation of the category; the kernel's name picks the lightness. */
  function kernelColour(name, base, dark) {
    let hash = 0;
    for (let at = 0; at < Math.min(name.length, 200); at += 1) hash = (hash * 31 + name.charCodeAt(at)) >>> 0;
    const [hue, saturation] = base;
    const lightness = (dark ? 50 : 62) + (hash % 4) * 5;
    return `hsl(${hue + (hash % 3) * 6 - 6} ${saturation}% ${lightness}%)`;
  }

  function collectives(picture) {
    const byMatch = new Map();
    picture.lanes.forEach((lane, at) => lane.match.forEach((match, event) => {
      if (match < 0) return;
      if (!byMatch.has(match)) byMatch.set(match, { latest: -Infinity, ends: [] });
      const one = byMatch.get(match);
      one.latest = Math.max(one.latest, lane.start_ns[event]);
      one.ends.push([at, lane.start_ns[event]]);
    }));
    return byMatch;
  }

  /* The first event of a lane that ends at or after `from`; starts ascend. */
  function firstAt(lane, from) {
    let low = 0;
    let high = lane.start_ns.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lane.start_ns[middle] < from) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  function chart(place, picture, names, categories, hues) {
    const lanes = picture.lanes;
    const joined = collectives(picture);
    const end = Math.max(1, ...lanes.map((lane) => lane.start_ns.reduce((most, start, at) => Math.max(most, start + lane.dur_ns[at]), 0)));
    const longest = lanes.map((lane) => lane.dur_ns.reduce((a, b) => Math.max(a, b), 0));
    const laneHeight = lanes.length > 32 ? 12 : lanes.length > 12 ? 18 : lanes.length > 4 ? 26 : 34;
    const severalStreams = new Set(lanes.map((lane) => lane.rank)).size < lanes.length;
    const labels = lanes.map((lane) => (severalStreams ? `${lane.rank} s${lane.stream}` : lane.rank));
    const readout = element("p", { class: "readout", "aria-live": "polite", text: "Point at a kernel, or click it to follow it across ranks." });
    const box = element("div", { class: "chart", tabindex: 0, role: "img", "aria-label": "All ranks of the step on one time axis. Left and right pan, plus and minus zoom, 0 shows all, n and p go to the next and the previous call of the chosen kernel." });
    const table = element("div");
    const state = { name: -1, call: 0, calls: [] };

    function paint(u) {
      const { ctx, bbox } = u;
      const pixels = devicePixelRatio;
      const height = bbox.height / lanes.length;
      const dark = sglprof.isDark();
      const { min, max } = u.scales.x;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      ctx.font = `${11 * pixels}px system-ui, sans-serif`;
      ctx.textBaseline = "middle";
      ctx.textAlign = "left";
      lanes.forEach((lane, at) => {
        const top = bbox.top + at * height + pixels;
        const tall = height - 2 * pixels;
        ctx.globalAlpha = 1;
        if (at && lane.rank !== lanes[at - 1].rank) {
          ctx.fillStyle = colour("line");
          ctx.fillRect(bbox.left, top - pixels, bbox.width, pixels);
        }
        for (let event = firstAt(lane, min - longest[at]); event < lane.start_ns.length; event += 1) {
          const start = lane.start_ns[event];
          if (start > max) break;
          const stop = start + lane.dur_ns[event];
          if (stop < min) continue;
          const name = lane.name[event];
          const left = u.valToPos(start, "x", true);
          const wide = Math.max(pixels * 0.6, u.valToPos(stop, "x", true) - left);
          ctx.globalAlpha = state.name < 0 || state.name === name ? 1 : 0.22;
          const late = lane.match[event] >= 0 ? Math.min(stop, joined.get(lane.match[event]).latest) : start;
          ctx.fillStyle = kernelColour(names[name], hues[name], dark);
          ctx.fillRect(left, top, wide, tall);
          if (late > start) {
            const waited = u.valToPos(late, "x", true) - left;
            if (waited > 1.5) {
              ctx.fillStyle = colour("bg");
              ctx.fillRect(left, top, waited, tall);
              sglprof.hatch(ctx, left, top, waited, tall, colour("muted"), 4);
              ctx.strokeStyle = colour("muted");
              ctx.lineWidth = pixels;
              ctx.strokeRect(left + 0.5, top + 0.5, waited - 1, tall - 1);
            }
          }
          if (wide > 3 * pixels && state.name === name) {
            ctx.strokeStyle = colour("fg");
            ctx.lineWidth = 1.5 * pixels;
            ctx.strokeRect(left, top, wide, tall);
          }
          const from = Math.max(left, bbox.left, late > start ? u.valToPos(late, "x", true) : 0);
          const room = Math.min(left + wide, bbox.left + bbox.width) - from;
          if (room > TOO_NARROW * pixels && tall >= 12 * pixels) {
            ctx.save();
            ctx.beginPath();
            ctx.rect(from, top, room - 2 * pixels, tall);
            ctx.clip();
            ctx.fillStyle = "#0b0d10";
            ctx.fillText(names[name].slice(0, 80), from + 4 * pixels, top + tall / 2);
            ctx.restore();
          }
        }
      });
      ctx.globalAlpha = 1;
      ctx.strokeStyle = colour("fail");
      ctx.lineWidth = 1.2 * pixels;
      for (const one of joined.values()) {
        const first = Math.min(...one.ends.map((arrival) => arrival[1]));
        if (one.latest < min || first > max) continue;
        if (u.valToPos(one.latest, "x", true) - u.valToPos(first, "x", true) < 2 * pixels) continue;
        ctx.beginPath();
        [...one.ends].sort((a, b) => a[0] - b[0]).forEach(([at, start], place_) => {
          const x = u.valToPos(start, "x", true);
          const y = bbox.top + at * height;
          if (place_) ctx.lineTo(x, y);
          else ctx.moveTo(x, y);
          ctx.lineTo(x, y + height);
        });
        ctx.stroke();
      }
      ctx.restore();
      sglprof.rowLabels(u, labels, height);
    }

    function eventAt(u) {
      const lane = lanes[Math.floor(u.cursor.top / (u.over.clientHeight / lanes.length))];
      if (!lane) return null;
      const at = u.posToVal(u.cursor.left, "x");
      const slack = (u.scales.x.max - u.scales.x.min) / u.over.clientWidth;
      let best = null;
      for (let event = firstAt(lane, at - longest[lanes.indexOf(lane)] - slack); event < lane.start_ns.length && lane.start_ns[event] <= at + slack; event += 1) {
        if (lane.start_ns[event] + lane.dur_ns[event] + slack >= at) best = event;
      }
      return best === null ? null : { lane, event: best };
    }

    function describe({ lane, event }) {
      const match = lane.match[event];
      const wait = match < 0 ? 0 : Math.min(lane.dur_ns[event], joined.get(match).latest - lane.start_ns[event]);
      const parts = [lane.rank, names[lane.name[event]].slice(0, 200), categories[lane.name[event]], `at ${duration(lane.start_ns[event])}`, duration(lane.dur_ns[event])];
      if (match >= 0) parts.push(wait > 0 ? `waits ${duration(wait)} for the last rank` : "arrives last");
      return parts.join(" · ");
    }

    const u = new uPlot(
      {
        width: sglprof.room(place),
        height: lanes.length * laneHeight + 44,
        legend: { show: false },
        padding: [4, 12, 0, 0],
        cursor: { drag: { x: true, y: false }, points: { show: false }, y: false },
        scales: { x: { time: false, range: (_, min, max) => [min, max] }, y: { range: [0, 1] } },
        axes: [
          sglprof.axis({ size: 40, label: "ms since the first kernel shown", labelSize: 16, labelFont: "12px system-ui, sans-serif", values: (chart_, splits) => splits.map((value) => {
            const span = chart_.scales.x.max - chart_.scales.x.min;
            return (value / 1e6).toFixed(span < 2e4 ? 4 : span < 2e5 ? 3 : span < 2e6 ? 2 : 1);
          }) }),
          sglprof.axis({ size: sglprof.AXIS, values: () => [], grid: { show: false }, ticks: { show: false } }),
        ],
        series: [{}, { paths: () => null, points: { show: false } }],
        hooks: { draw: [paint], setCursor: [(chart_) => { const found = chart_.cursor.left >= 0 && eventAt(chart_); if (found) readout.textContent = describe(found); }] },
      },
      [[0, end], [0, 0]],
      box,
    );
    sglprof.charts.add(u);

    function view(min, max) {
      const span = Math.min(end, Math.max(200, max - min)); // ns
      const low = Math.max(0, Math.min(min, end - span));
      u.setScale("x", { min: low, max: low + span });
    }
    const zoom = (factor, centre) => {
      const { min, max } = u.scales.x;
      const fixed = centre ?? (min + max) / 2;
      view(fixed - (fixed - min) * factor, fixed + (max - fixed) * factor);
    };
    const pan = (share) => {
      const { min, max } = u.scales.x;
      view(min + share * (max - min), max + share * (max - min));
    };

    function select(name, call = 0) {
      state.name = name;
      const perLane = new Map();
      lanes.forEach((lane) => lane.name.forEach((one, event) => {
        if (one === name) perLane.set(lane.rank, [...(perLane.get(lane.rank) ?? []), { lane, event }]);
      }));
      state.calls = [...perLane.values()];
      const most = Math.max(0, ...state.calls.map((calls) => calls.length));
      state.call = most ? (call + most) % most : 0;
      table.replaceChildren();
      choose.value = String(name);
      u.redraw(false);
      if (name < 0 || !most) return;
      const mine = state.calls.map((calls) => calls[state.call]).filter(Boolean);
      const durations = mine.map(({ lane, event }) => lane.dur_ns[event]).sort((a, b) => a - b);
      const median = durations[durations.length >> 1];
      const waiting = mine.some(({ lane, event }) => lane.match[event] >= 0);
      const head = ["Rank", "Start, µs", "Duration, µs", "of the median", ...(waiting ? ["Waits, µs"] : [])].map((text, at) => element("th", { scope: "col", class: at ? "n" : null, text }));
      const rows = mine.map(({ lane, event }) => {
        const wait = lane.match[event] < 0 ? null : Math.min(lane.dur_ns[event], joined.get(lane.match[event]).latest - lane.start_ns[event]);
        const ratio = lane.dur_ns[event] / median;
        return element("tr", {},
          element("th", { scope: "row", text: lane.rank }),
          element("td", { class: "n", text: three(lane.start_ns[event] / 1e3) }),
          element("td", { class: "n", text: three(lane.dur_ns[event] / 1e3) }),
          element("td", { class: `n s${lane.match[event] < 0 ? sglprof.shade(ratio) : 0}`, text: ratio.toFixed(2) }),
          waiting ? element("td", { class: "n", text: wait === null ? "–" : three(wait / 1e3) }) : null);
      });
      table.append(element("table", { class: "small followed" },
        element("caption", { text: `${names[name].slice(0, 200)}: call ${state.call + 1} of ${most} in this step` }),
        element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
      return mine;
    }

    function follow(direction) {
      if (state.name < 0) return;
      const mine = select(state.name, state.call + direction);
      if (!mine?.length) return;
      const starts = mine.map(({ lane, event }) => lane.start_ns[event]);
      const ends = mine.map(({ lane, event }) => lane.start_ns[event] + lane.dur_ns[event]);
      const span = Math.max(...ends) - Math.min(...starts);
      view(Math.min(...starts) - span, Math.max(...ends) + span);
    }

    u.over.addEventListener("click", () => {
      const found = eventAt(u);
      if (!found) return;
      const name = found.lane.name[found.event];
      let call = 0;
      for (let event = 0; event < found.event; event += 1) call += found.lane.name[event] === name;
      select(name, call);
    });
    u.over.addEventListener("wheel", (event) => {
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(Math.sign(event.deltaX || event.deltaY) * 0.1);
      else if (event.ctrlKey || document.activeElement === box) zoom(event.deltaY > 0 ? 1.25 : 0.8, u.posToVal(u.cursor.left, "x"));
      else return; // the page scrolls until the picture has been clicked
      event.preventDefault();
    }, { passive: false });
    u.over.addEventListener("mousedown", () => box.focus({ preventScroll: true }));
    const keys = {
      ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2), "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2),
      0: () => view(0, end), n: () => follow(1), p: () => follow(-1), Escape: () => select(-1),
    };
    box.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      keys[event.key]();
      event.preventDefault();
    });

    const total = new Map();
    lanes.forEach((lane) => lane.name.forEach((name, event) => total.set(name, (total.get(name) ?? 0) + lane.dur_ns[event])));
    const choose = element("select", { "aria-label": "Follow a kernel", onchange: () => select(Number(choose.value)) },
      element("option", { value: -1, text: "Follow a kernel …" }),
      ...[...total].sort((a, b) => b[1] - a[1]).map(([name, ns]) => element("option", { value: name, text: `${names[name].slice(0, 90)} (${duration(ns / lanes.length)})` })));
    const tool = (text, title, act) => element("button", { type: "button", title, "aria-label": title, text, onclick: act });
    const tools = element("div", { class: "tools" },
      tool("+", "Zoom in", () => zoom(0.5)), tool("−", "Zoom out", () => zoom(2)), tool("←", "Pan left", () => pan(-0.3)), tool("→", "Pan right", () => pan(0.3)), tool("All", "Show the whole step", () => view(0, end)),
      element("span", { class: "gap" }), choose, tool("Previous call", "Previous call of the chosen kernel", () => follow(-1)), tool("Next call", "Next call of the chosen kernel", () => follow(1)));
    place.append(tools, readout, box, table);
    box.sglprofChart = u;
  }

  sglprof.parts.lanes = (place, window, data) => {
    const { names, categories, colours, steps, left_out: leftOut } = data.lanes;
    const hues = categories.map((category) => colours[category] ?? colours.other);
    const shown = steps.filter((picture) => picture.lanes.length);
    const body = element("div");
    const buttons = element("span", { class: "switch", role: "group", "aria-label": "Step" });

    function show(at) {
      body.querySelectorAll(".chart").forEach((chart_) => sglprof.charts.delete(chart_.sglprofChart));
      body.replaceChildren();
      [...buttons.children].forEach((button, place_) => button.setAttribute("aria-pressed", String(place_ === at)));
      if (shown[at].dropped) body.append(sglprof.quiet(`The ${shown[at].dropped} shortest activities did not fit and are left out.`));
      chart(body, shown[at], names, categories, hues);
    }
    shown.forEach((picture, at) => {
      const what = picture.step === null ? "the window" : `step ${picture.step}`;
      buttons.append(element("button", { type: "button", text: `${picture.group ? `${picture.group} ` : ""}${what}${picture.step === null ? "" : ` (${picture.why.join(", ")})`}`, onclick: () => show(at) }));
    });
    place.append(
      element("div", { class: "bar" }, buttons),
      sglprof.quiet(`Same kernel, same colour. Hatched: a rank waits in a collective; the red line joins the arrivals of all ranks.${leftOut ? ` ${leftOut} more steps did not fit.` : ""} Drag or +/− to zoom.${shown.some((picture) => picture.step !== null) ? ` Any other step: sglprof report results.json --step N --window ${data.id}` : ""}`),
      body,
    );
    // The canvas needs its place in the document to know its width.
    show(0);
    window.addEventListener("sglprof-step", (event) => {
      const at = shown.findIndex((picture) => picture.step === event.detail.step && picture.group === event.detail.group);
      if (at < 0) return;
      show(at);
      place.scrollIntoView({ block: "nearest" });
    });
  };
})();
