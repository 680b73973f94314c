"use strict";
// Shows what data/*.js hand over. Texts of the model reach the page through textContent and title alone.
const saelib = (() => {
  const PER_FILE = 64;
  const COLUMNS = [
    { key: "id", name: "#", number: true },
    { key: "fires", name: "fires on", tokens: true },
    { key: "explanation", name: "rule", wide: true },
    { key: "promotes", name: "promotes", tokens: true, wide: true },
    { key: "score", name: "score", number: true, digits: 2 },
    { key: "frequency", name: "active", number: true, percent: true },
    { key: "max", name: "max", number: true, wide: true },
    { key: "mean", name: "mean", number: true, wide: true },
    { key: "purity", name: "purity", number: true, digits: 2, medium: true },
  ];
  const GROUPS = {
    top: "Strongest",
    high: "Random, above half of the maximum",
    low: "Random, up to half of the maximum",
  };
  const $ = (id) => document.getElementById(id);
  const body = () => document.querySelector("tbody");
  let about, all, text, order = [], sorting = { key: "id", down: false }, logScale = false, scrolled = 0;
  const loaded = new Map();

  // An element with attributes and children; strings become text nodes.
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (key.startsWith("--")) element.style.setProperty(key, value);
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
  const chip = (token) => make("span", { class: "token" }, visible(token));
  const percent = (share) => (100 * share).toPrecision(share >= 0.1 ? 3 : 2) + "%";
  const digits = (value, n) => (value === null || value === undefined ? "–" : value.toFixed(n));

  function load(name) {
    if (!loaded.has(name)) {
      loaded.set(name, new Promise((resolve, reject) => {
        const script = make("script", { src: `data/${name}.js`, onload: resolve, onerror: () => reject(name) });
        document.head.append(script);
      }));
    }
    return loaded.get(name);
  }

  // ---- the list

  function cell(column, feature) {
    const value = feature[column.key];
    const td = make("td", { class: `${column.key} ${column.wide ? "wide" : column.medium ? "medium" : ""}` });
    if (column.key === "id") td.append(make("a", { href: `#f${value}` }, String(value)));
    else if (column.tokens) td.append(...(value.length ? value.map(chip) : feature.n ? [] : [make("em", {}, "dead")]));
    else if (column.percent) td.append(percent(value));
    else if (column.number) td.append(column.digits ? digits(value, column.digits) : String(value));
    else td.append(make("span", { class: "clip" }, value || "–"));
    return td;
  }

  function row(feature) {
    feature.row ??= make("tr", { onclick: (event) => open(event, feature.id) }, ...COLUMNS.map((c) => cell(c, feature)));
    return feature.row;
  }

  function open(event, id) {
    if (event.target.tagName !== "A" && !String(getSelection())) location.hash = `f${id}`;
  }

  function compare(a, b) {
    let [x, y] = [a[sorting.key], b[sorting.key]];
    if (Array.isArray(x)) [x, y] = [x.join("\0"), y.join("\0")];
    const [nothingX, nothingY] = [x, y].map((value) => value === null || value === undefined || value === "");
    if (nothingX || nothingY) return nothingX - nothingY || a.id - b.id; // last in both directions
    const sign = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (sorting.down ? -sign : sign) || a.id - b.id;
  }

  function matches(feature, wanted) {
    if (/^#?\d+$/.test(wanted) && feature.id === Number(wanted.replace("#", ""))) return true;
    feature.words ??= [...feature.fires, ...feature.promotes, feature.explanation, feature.n ? "" : "dead"].join("\n").toLowerCase();
    return feature.words.includes(wanted) || feature.words.replaceAll(" ", "␣").includes(wanted);
  }

  function draw() {
    const wanted = $("filter").value.toLowerCase();
    order = all.filter((feature) => !wanted || matches(feature, wanted)).sort(compare);
    $("count").textContent = `${order.length.toLocaleString("en")} of ${all.length.toLocaleString("en")}`;
    for (const th of document.querySelectorAll("th")) {
      th.removeAttribute("aria-sort");
      if (th.dataset.key === sorting.key) th.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    }
    const now = order; // the first rows at once, the others when they have been painted
    body().replaceChildren(...now.slice(0, 60).map(row));
    setTimeout(() => now === order && body().append(...now.slice(60).map(row)));
  }

  function sortBy(column) {
    const again = sorting.key === column.key;
    sorting = { key: column.key, down: again ? !sorting.down : Boolean(column.number) && column.key !== "id" };
    draw();
  }

  // ---- one feature

  function bars(feature) {
    const totals = feature.bins.map((bin) => bin.reduce((sum, n) => sum + n, 0));
    const scale = (n) => (logScale ? Math.log1p(n) : n);
    const highest = scale(Math.max(...totals));
    const step = feature.max / feature.bins.length;
    const chart = make("div", { class: "chart", role: "img", "aria-label": `Active tokens per bin: ${totals.join(", ")}` });
    feature.bins.forEach((bin, place) => {
      const stack = make("div", { class: "stack", "--height": scale(totals[place]) / highest });
      bin.forEach((n, token) => n && stack.append(make("i", { class: `c${token < feature.legend.length ? token : "other"}`, "--share": n, title: `${visible(feature.legend[token] ?? "other")}: ${n}` })));
      stack.append(make("b", {}, totals[place].toLocaleString("en")));
      const low = make("small", {}, String(Number((place * step).toPrecision(2))));
      chart.append(make("div", { class: "bin" }, make("div", { class: "room" }, stack), low));
    });
    return chart;
  }

  function histogram(feature) {
    const figure = make("figure", {}, bars(feature));
    const toggle = make("input", { type: "checkbox", onchange: (event) => {
      logScale = event.target.checked;
      figure.firstChild.replaceWith(bars(feature));
    } });
    toggle.checked = logScale;
    const sums = feature.bins[0].map((_, token) => feature.bins.reduce((sum, bin) => sum + bin[token], 0));
    const legend = make("ul", { class: "legend" }, ...sums.map((n, token) => {
      const known = token < feature.legend.length;
      return make("li", {}, make("i", { class: `c${known ? token : "other"}` }), known ? chip(feature.legend[token]) : "other", ` ${n.toLocaleString("en")}`);
    }));
    figure.append(make("figcaption", {}, "Activation (lower edge of each of ten equal bins, 0 to the maximum) and number of tokens."), legend,
      make("label", {}, toggle, " log scale (height log(1 + n); colours share a bar by counts)"));
    return figure;
  }

  function effects(title, tokens) {
    const largest = Math.max(...tokens.map(([, value]) => Math.abs(value)));
    return make("div", {}, make("h4", {}, title), make("ol", { class: "effects" }, ...tokens.map(([token, value]) =>
      make("li", { "--share": Math.abs(value) / largest }, chip(token), make("span", {}, (value > 0 ? "+" : "") + value.toFixed(1))))));
  }

  function context([number, start, stop, position, levels], feature) {
    const ids = text.rows[number].slice(start, stop);
    const level = new Map();
    for (let place = 0; place < levels.length; place += 2) level.set(levels[place], levels[place + 1]);
    const owner = text.documents[number].findLast(([first]) => first <= position)[1];
    const line = make("p", { class: "text" });
    let quiet = "";
    const flush = () => { if (quiet) line.append(make("bdi", {}, quiet)); quiet = ""; };
    ids.forEach((id, place) => {
      const shown = text.names[id].replaceAll("\n", "↵").replaceAll("\t", "⇥");
      const a = level.get(place);
      if (a === undefined && start + place !== position) return void (quiet += shown);
      flush();
      const kind = start + place === position ? "here" : a < 0 ? "unknown" : "";
      line.append(make("bdi", { class: `on ${kind}`, "--a": Math.max(0, a) / feature.max, title: a < 0 ? "left out as an outlier" : `activation ${a}` }, shown));
    });
    flush();
    return make("li", {}, make("div", { class: "where" }, make("b", {}, level.get(position - start).toPrecision(3)), " ", owner), line);
  }

  function card(name, value) {
    return make("div", {}, make("dt", {}, name), make("dd", {}, value));
  }

  function explanation(feature) {
    if (feature.explanation === null) {
      return make("p", {}, feature.n ? "Not scored: active in fewer than 20 fragments of the held-out text." : "Not scored: dead.");
    }
    const scores = `both ${digits(feature.scores.both, 2)}, top ${digits(feature.scores.top, 2)}, random ${digits(feature.scores.random, 2)}`;
    return make("div", {}, make("p", { class: "rule" }, feature.explanation), make("p", {}, `Score: ${scores}.`));
  }

  function page(id, feature) {
    const place = order.findIndex((other) => other.id === id);
    const [before, after] = [order[place - 1], order[place + 1]].map((other) => place >= 0 && other);
    const link = (target, name) => (target ? make("a", { href: `#f${target.id}` }, name) : make("span", {}, name));
    const scored = feature.scores.both;
    const parts = [
      make("nav", {}, make("a", { href: "#" }, "All features"), link(before, "← previous"), link(after, "next →")),
      make("h2", { tabindex: "-1" }, `Feature ${id} `, ...(feature.n ? feature.fires.map(chip) : [make("em", { class: "dead" }, "dead")])),
      make("dl", { class: "cards" }, card("active on", feature.n ? `${feature.n.toLocaleString("en")} tokens` : "no token"),
        card("frequency", percent(feature.frequency)), card("max", String(feature.max)), card("mean", String(feature.mean)),
        card("purity", digits(feature.purity, 2)), card("score", digits(scored, 2))),
      make("h3", {}, "Explanation by token rules"), explanation(feature),
    ];
    const left = make("section", {}, make("h3", {}, "Activations"), feature.n ? histogram(feature) : make("p", {}, `Not active on any of ${about.tokens.toLocaleString("en")} held-out tokens.`));
    const right = make("section", {}, make("h3", {}, "Direct effect on the output"), make("div", { class: "both" }, effects("promotes", feature.promoted), effects("suppresses", feature.suppressed.toReversed())),
      make("h3", {}, "Nearest features"), make("ul", { class: "nearest" }, ...feature.nearest.map(([other, cosine]) =>
        make("li", {}, make("a", { href: `#f${other}` }, `#${other}`), ` ${cosine.toFixed(2)} `, ...all[other].fires.slice(0, 2).map(chip)))));
    parts.push(make("div", { class: "columns" }, left, right));
    for (const [group, chosen] of Object.entries(feature.contexts)) {
      if (chosen.length) parts.push(make("h3", {}, GROUPS[group]), make("ol", { class: "contexts" }, ...chosen.map((one) => context(one, feature))));
    }
    return parts;
  }

  async function show() {
    const found = /^#f(\d+)$/.exec(location.hash);
    const id = found && Number(found[1]);
    if (!found) return list();
    if ($("feature").hidden) scrolled = scrollY;
    if (!all[id]) return open_page([make("nav", {}, make("a", { href: "#" }, "All features")), make("h2", { tabindex: "-1" }, `There is no feature ${id}`)]);
    try {
      await Promise.all([load("text"), load(`features-${String(Math.floor(id / PER_FILE)).padStart(3, "0")}`)]);
    } catch (name) {
      return open_page([make("h2", { tabindex: "-1" }, `data/${name}.js cannot be loaded: was the folder copied whole?`)]);
    }
    if (location.hash === found[0]) open_page(page(id, all[id].whole)); // unless another one was asked for meanwhile
  }

  function open_page(parts) {
    $("feature").replaceChildren(...parts);
    $("list").hidden = true;
    $("feature").hidden = false;
    document.title = `${location.hash.slice(2)} · ${about.dictionary}`;
    scrollTo(0, 0);
    document.querySelector("h2").focus({ preventScroll: true });
  }

  function list() {
    const last = /\d+/.exec($("feature").querySelector("h2")?.textContent ?? "");
    $("feature").hidden = true;
    $("list").hidden = false;
    document.title = `${about.dictionary} · features`;
    scrollTo(0, scrolled);
    if (last) all[Number(last[0])]?.row?.querySelector("a").focus({ preventScroll: true });
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [opened, typing] = [!$("feature").hidden, document.activeElement === $("filter")];
    if (event.key === "Escape") {
      if (opened) location.hash = "";
      else if (typing || $("filter").value) ($("filter").value = "", $("filter").blur(), draw());
    } else if (event.key === "/" && !typing) {
      event.preventDefault();
      if (opened) location.hash = "";
      setTimeout(() => $("filter").focus()); // when the list is back
    } else if (opened && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      document.querySelectorAll("nav a, nav span")[event.key === "ArrowLeft" ? 1 : 2]?.click();
    } else if (!opened && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      const here = document.activeElement.closest("tbody tr");
      const next = here ? (event.key === "ArrowDown" ? here.nextElementSibling : here.previousElementSibling) : body().firstElementChild;
      if (next) (event.preventDefault(), next.querySelector("a").focus());
    } else if (!opened && typing && event.key === "Enter" && order.length) location.hash = `f${order[0].id}`;
  }

  function summary(head, features) {
    about = head;
    all = features.map((feature, id) => Object.assign(feature, { id }));
    const dead = all.filter((feature) => !feature.n).length;
    const facts = [`${about.kind} dictionary ${about.dictionary} of ${about.hook}`, about.model, `profile ${about.profile}`,
      `${all.length.toLocaleString("en")} features, ${dead} dead`, `${about.tokens.toLocaleString("en")} held-out tokens of ${about.text}`];
    $("about").textContent = facts.join(" · ");
    document.querySelector("thead tr").append(...COLUMNS.map((column) =>
      make("th", { scope: "col", "data-key": column.key, class: `${column.key} ${column.wide ? "wide" : column.medium ? "medium" : ""}` },
        make("button", { type: "button", onclick: () => sortBy(column) }, column.name))));
    $("filter").addEventListener("input", draw);
    addEventListener("keydown", keys);
    addEventListener("hashchange", show);
    draw();
    show();
  }

  return {
    summary,
    text: (names, rows, documents) => { text = { names, rows, documents }; },
    features: (first, part) => part.forEach((feature, place) => { all[first + place].whole = feature; }),
  };
})();
