/* Parts are drawn when they come near the screen, so that a large page opens at once. */
"use strict";
(() => {
  const drawn = new WeakSet();
  const holder = (place) => place.closest(".window, main > section"); // whose data it draws

  function drawNow(place, data) {
    if (drawn.has(place)) return;
    drawn.add(place);
    sglprof.parts[place.dataset.part](place, holder(place), data);
  }

  async function draw(place) {
    drawNow(place, await sglprof.load(holder(place)));
  }

  /* Scripts stand before the data, and charts come after the first picture of the tables: the
     page answers while the rest is still read. */
  function afterFirstPicture(act) {
    addEventListener("load", () => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(act))));
  }

  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "300px" },
  );
  /* Of many ranks, the one that is marked is in sight. */
  function showMarked(box) {
    const mark = box.querySelector(".mark");
    if (mark && box.scrollHeight > box.clientHeight) box.scrollTop = mark.closest("tr").offsetTop - box.clientHeight / 2;
  }
  afterFirstPicture(() => {
    document.querySelectorAll(".heatmap .tall").forEach(showMarked);
    document.querySelectorAll("[data-part]").forEach((place) => near.observe(place));
  });
  document.querySelectorAll(".window .which").forEach((section) => sglprof.parts.which(section, section.closest(".window")));

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-shows]");
    if (!button) return;
    for (const other of button.parentElement.children) {
      other.setAttribute("aria-pressed", String(other === button));
      document.getElementById(other.dataset.shows).hidden = other !== button;
    }
  });

  function openTarget() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target || !target.matches("details")) return;
    target.open = true;
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
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((one) => { one.open = true; });
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    // Printing does not wait: what is unpacked by now is drawn, and all is soon after opening.
    for (const place of document.querySelectorAll("[data-part]")) {
      const data = sglprof.data(holder(place));
      if (data) drawNow(place, data);
    }
    sglprof.redraw();
    sglprof.resize(PRINTED);
  });
  addEventListener("afterprint", () => {
    folded.forEach((one) => { one.open = false; });
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    sglprof.redraw();
    sglprof.resize();
  });
  sglprof.draw = draw;
  sglprof.allLoaded = new Promise((done) => addEventListener("load", () => requestIdleCallback(async () => {
    for (const data of document.querySelectorAll('script[type="application/gzip"]')) await sglprof.load(document.getElementById(data.id.replace(/-data$/, "")));
    done(true);
  }, { timeout: 2000 })));
  document.documentElement.dataset.ready = "true";
})();
