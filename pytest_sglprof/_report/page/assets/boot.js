/* Tables come first; then the charts of open windows are drawn, one after another, wherever they
   are on the page. Those of a closed window are drawn when it is opened. */
"use strict";
(() => {
  // Letters of packed data that are unpacked for printing: before `load`, and when there is time.
  const [AT_ONCE, AHEAD] = [1e6, 16e6];
  const HELD_MS = 3000; // at most
  const drawn = new WeakSet();
  const holder = (place) => place.closest(".window, main > section"); // whose data it draws
  const isOpen = (place) => !place.closest("details:not([open])");
  const pause = () => new Promise((go) => setTimeout(go)); // so that the page answers meanwhile

  function drawNow(place, data) {
    if (drawn.has(place)) return;
    drawn.add(place);
    sglprof.parts[place.dataset.part](place, holder(place), data);
  }

  async function draw(place) {
    drawNow(place, await sglprof.load(holder(place)));
  }

  async function drawOpen(root) {
    for (const place of root.querySelectorAll("[data-part]")) {
      if (!isOpen(place)) continue;
      await draw(place);
      await pause();
    }
  }

  /* Printing does not wait, so that data of closed windows must be there before it begins. */
  async function unpackAhead(most) {
    let letters = 0;
    for (const data of document.querySelectorAll('script[type="application/gzip"]')) {
      const place = document.getElementById(data.id.replace(/-data$/, ""));
      if (place.matches("[data-packed]")) continue;
      letters += data.textContent.length;
      if (letters > most) return;
      await sglprof.load(place);
      await pause();
    }
  }

  /* Scripts stand before the data, and charts come after the first picture of the tables: the
     page answers while the rest is still read. A page in the background is not painted. */
  function afterFirstPicture(act) {
    const painted = new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)));
    const waited = new Promise((go) => setTimeout(go, 100));
    addEventListener("DOMContentLoaded", () => Promise.race([painted, waited]).then(() => setTimeout(act)));
  }

  /* What prints or captures a page does so at its `load`, which waits for a frame that is open. */
  function holdLoad() {
    const frame = sglprof.element("iframe", { hidden: true });
    document.body.append(frame);
    frame.contentDocument.open();
    return () => { frame.contentDocument?.close(); frame.remove(); };
  }

  /* What a box hides is said above it. */
  const hints = new Map();
  function hint(box) {
    const right = box.scrollWidth - box.clientWidth - box.scrollLeft > 1;
    const isWide = box.scrollWidth - box.clientWidth > 1;
    const isTall = box.scrollHeight - box.clientHeight > 1;
    box.classList.toggle("goes-right", right);
    box.classList.toggle("goes-left", isWide && box.scrollLeft > 1);
    if (!hints.has(box) && (isWide || isTall)) {
      hints.set(box, sglprof.element("p", { class: "hint quiet" }));
      box.before(hints.get(box));
    }
    const words = hints.get(box);
    if (!words) return;
    const sides = [isWide ? "sideways for more columns →" : "", isTall ? "down for more rows ↓" : ""];
    words.textContent = isWide || isTall ? `Scroll ${sides.filter(Boolean).join(", ")}` : "";
    words.hidden = box.hidden || !words.textContent;
  }
  const sizes = new ResizeObserver((entries) => entries.forEach((entry) => hint(entry.target.closest(".scroll"))));
  function watch(root) {
    for (const box of root.querySelectorAll(".scroll")) {
      if (!box.sglprofWatched && isOpen(box)) {
        box.sglprofWatched = true;
        sizes.observe(box);
        if (box.firstElementChild) sizes.observe(box.firstElementChild);
        box.addEventListener("scroll", () => hint(box), { passive: true });
      }
    }
  }

  /* Of many ranks, the one that is marked is in sight. */
  function showMarked(box) {
    const mark = box.querySelector(".mark");
    if (mark && box.scrollHeight > box.clientHeight) box.scrollTop = mark.closest("tr").offsetTop - box.clientHeight / 2;
  }
  async function fill(window) {
    if (!window?.matches("[data-packed]") || !sglprof.canUnpack) return;
    await sglprof.load(window);
    sglprof.fill(window);
  }
  document.addEventListener("toggle", async (event) => {
    if (!event.target.open) return;
    await fill(event.target);
    watch(event.target);
    drawOpen(event.target);
  }, true);
  document.querySelectorAll(".window").forEach(sglprof.begin);

  document.addEventListener("click", (event) => {
    const more = event.target.closest("button[data-more]");
    if (more) {
      const isMore = document.getElementById(more.dataset.more).classList.toggle("all");
      more.setAttribute("aria-pressed", String(isMore));
    }
    const button = event.target.closest("button[data-shows]");
    if (!button) return;
    for (const other of button.parentElement.children) {
      other.setAttribute("aria-pressed", String(other === button));
      const box = document.getElementById(other.dataset.shows);
      box.hidden = other !== button;
      hint(box);
    }
  });

  async function openTarget() {
    const name = decodeURIComponent(location.hash.slice(1));
    await fill(document.getElementById(name.match(/^window-\d+/)?.[0]));
    const target = name && document.getElementById(name);
    if (!target) return;
    for (let around = target.closest("details"); around; around = around.parentElement.closest("details")) around.open = true;
    target.scrollIntoView();
  }
  addEventListener("hashchange", openTarget);
  openTarget();

  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = sglprof.isDark() ? "light" : "dark";
    sglprof.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", sglprof.redraw);
  let resizing;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(() => sglprof.resize(), 150);
  });
  const PRINTED = 980; // px that a sheet of A4 or Letter across has
  let folded = [];
  let theme;
  addEventListener("beforeprint", () => {
    document.querySelectorAll("[data-packed]").forEach(sglprof.fill);
    folded = [...document.querySelectorAll("details:not([open], [data-packed])")];
    folded.forEach((one) => { one.open = true; });
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    for (const place of document.querySelectorAll("[data-part]")) {
      const data = sglprof.data(holder(place));
      if (data) drawNow(place, data);
      else if (place.matches(":empty")) place.append(sglprof.quiet("Not drawn: open this window before you print."));
    }
    sglprof.redraw();
    sglprof.resize(PRINTED);
  });
  addEventListener("afterprint", () => {
    folded.forEach((one) => { one.open = false; });
    document.querySelectorAll("[data-part]").forEach((place) => drawn.has(place) || place.replaceChildren());
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    sglprof.redraw();
    sglprof.resize();
  });
  if (!sglprof.canUnpack) {
    document.querySelector("main").prepend(sglprof.element("p", { class: "notice", text: "This browser cannot unpack the data of the charts (it has no DecompressionStream). The tables are complete. For the charts, open this file in Chromium 123, Firefox 120, Safari 17.5 or newer." }));
  }
  sglprof.draw = draw;
  const release = holdLoad();
  setTimeout(release, HELD_MS);
  sglprof.allLoaded = new Promise((done) => afterFirstPicture(async () => {
    document.querySelectorAll(".heatmap .tall").forEach(showMarked);
    watch(document);
    if (sglprof.canUnpack) {
      await drawOpen(document);
      await unpackAhead(AT_ONCE);
    }
    release();
    if (sglprof.canUnpack) {
      await new Promise((go) => requestIdleCallback(go, { timeout: 2000 }));
      await unpackAhead(AHEAD);
    }
    document.documentElement.dataset.drawn = "true"; // all is laid out from now on, seen or not
    done(true);
  }));
  document.documentElement.dataset.ready = "true";
})();
