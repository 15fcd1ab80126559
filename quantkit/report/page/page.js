"use strict";
(() => {
  // Text from the model reaches the page through textContent and as data of figures only.
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const views = {};
  const state = { order: "index", up: true, filter: "", value: 0 };
  const ASCENDING = new Set(["index", "name", "bits", "kernel"]);
  const WIDTHS = ["1", "2", "3", "4", "5", "6", "7", "8", "float"];
  const NARROW = 560;
  const MANY = 250; // layers, beyond which figures are painted instead of made of elements

  // ---- theme -------------------------------------------------------------------------------------------------------
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => {
    try { return localStorage.getItem("quantkit-theme"); } catch { return null; }
  };
  const remember = (theme) => {
    try { localStorage.setItem("quantkit-theme", theme); } catch { /* a page from a file may have no storage */ }
  };
  const setTheme = (theme) => { root.dataset.theme = theme; };
  const hue = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const hueOfWidth = (width) => hue(width === "float" ? "--bf" : `--b${width}`);
  const named = () => ({
    "@predicted": hue("--bf"), "@measured": hue("--b6"), "@chosen": hue("--b2"), "@quiet": hue("--bf"), "@soft": hue("--soft"),
    "@ink": hue("--ink"), "@column": hue("--column"), "@codes": hue("--codes"), "@bitsoutput": hue("--b2"),
    ...Object.fromEntries(WIDTHS.map((width) => [`@bits${width}`, hueOfWidth(width)])),
  });
  const config = () => {
    const [ink, soft, line] = [hue("--ink"), hue("--soft"), hue("--line")];
    const font = hue("--sans");
    return {
      background: "transparent", font, view: { stroke: null }, padding: { left: 2, right: 12, top: 6, bottom: 4 },
      title: { anchor: "start", color: soft, fontSize: 12.5, fontWeight: 500, font, offset: 10, frame: "group" },
      axis: {
        labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11.5,
        titleFontSize: 12, titleFontWeight: 400, labelPadding: 6, tickSize: 4, titlePadding: 10,
      },
      axisY: { domain: false, ticks: false },
      legend: { labelColor: soft, titleColor: soft, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400, columnPadding: 14, columns: root.clientWidth < NARROW ? 4 : 10 },
    };
  };

  // ---- figures -----------------------------------------------------------------------------------------------------
  // A colour is written as @name; data, under `values`, is never looked at.
  const coloured = (spec, colours) => {
    if (typeof spec === "string") return spec.startsWith("@") ? (colours[spec] ?? spec) : spec;
    if (Array.isArray(spec)) return spec.map((item) => coloured(item, colours));
    if (spec === null || typeof spec !== "object") return spec;
    return Object.fromEntries(Object.entries(spec).map(([key, value]) => [key, key === "values" ? value : coloured(value, colours)]));
  };
  const SIDE = 66; // of the y axis, which all panels of a figure share
  const sized = (spec, width, columns) => {
    if (!spec.vconcat) return { ...spec, width, autosize: { type: "fit-x", contains: "padding" } };
    const inner = Math.min(width - SIDE, Math.max(240, 56 * columns));
    const named = columns > 0 && inner / columns >= 13;
    const panels = spec.vconcat.map((panel, at) => {
      const last = at === spec.vconcat.length - 1;
      const copy = { ...panel, width: inner };
      if (last) {
        const axis = named
          ? { labelAngle: -55, labelLimit: 130, labelOverlap: false, title: null, ticks: false,
            labelExpr: "slice(datum.value, indexof(datum.value, '|') + 1)" }
          : null;
        const layer = panel.layer.map((part) => ({ ...part, encoding: { ...part.encoding, x: { ...part.encoding.x, axis } } }));
        return { ...copy, layer };
      }
      return copy;
    });
    return { ...spec, vconcat: panels };
  };
  const DATASETS = {
    layers: () => ({ layers: shown() }),
    histogram: () => histogram(data.activations[state.value]),
  };
  const draw = async (name) => {
    const box = byId(`chart-${name}`);
    if (!box) return;
    const datasets = DATASETS[name] ? DATASETS[name]() : {};
    const columns = name === "layers" ? datasets.layers.length : 0;
    const spec = sized(coloured(data.charts[name], named()), box.clientWidth, columns);
    if (views[name]) views[name].finalize();
    views[name] = await window.vegaEmbed(box, { ...spec, datasets, config: config() }, {
      mode: "vega-lite", actions: false, renderer: data.layers.length > MANY ? "canvas" : "svg", ast: true, hover: false,
    });
    if (name === "layers") views[name].view.addEventListener("click", (_, item) => find(item));
    if (name === "ranges") views[name].view.addEventListener("click", (_, item) => choose(item));
  };
  const drawAll = async () => {
    paintKey();
    for (const name of Object.keys(data.charts)) await draw(name);
  };

  // ---- layers ------------------------------------------------------------------------------------------------------
  const figure = (value, unit) => {
    if (value === null) return "-";
    const digits = Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
    return `${digits}${unit}`;
  };
  const bytes = (count) => {
    for (const unit of ["B", "kB", "MB"]) {
      if (count < 999.5) return `${unit === "B" ? count : Number(count.toPrecision(3))} ${unit}`;
      count /= 1000;
    }
    return `${Number(count.toPrecision(3))} GB`;
  };
  const shown = () => {
    const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) => `${row.name} ${row.op} ${row.form} ${row.kernel} ${row.width === "float" ? "float" : `${row.width}bits`}`.toLowerCase();
    const wanted = words.join(" ").replace(/(\d)\s*-?bits?\b/g, "$1bits").split(" ");
    const rows = data.layers.filter((row) => wanted.every((word) => text(row).includes(word)));
    const sign = state.up ? 1 : -1;
    const by = state.order;
    return rows.sort((a, b) => {
      const [first, second] = [a[by], b[by]];
      if (first === null || second === null) return (first === null) - (second === null) || a.index - b.index;
      return sign * (first < second ? -1 : first > second ? 1 : 0) || a.index - b.index;
    });
  };
  const cell = (row, text, kind) => {
    const made = row.insertCell();
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const addBar = (parent, value, most) => {
    if (value === null || !(most > 0)) return;
    const track = document.createElement("span");
    const fill = document.createElement("i");
    track.className = "track";
    fill.style.width = `${Math.max(1, Math.min(100, (100 * value) / most)).toFixed(1)}%`;
    track.append(fill);
    parent.append(track);
  };
  const most = (field) => Math.max(0, ...data.layers.map((row) => row[field] ?? 0));
  const fillTable = () => {
    const table = byId("table");
    if (!table) return;
    const rows = shown();
    const [errors, shares, losses] = [most("error"), most("share"), most("sens")];
    const body = document.createElement("tbody");
    for (const row of rows) {
      const line = body.insertRow();
      line.id = `layer-${row.index}`;
      cell(line, row.index + 1, "wide");
      const name = cell(line, row.name, "name");
      const small = document.createElement("small");
      small.textContent = `${row.op}, ${row.shape}`;
      name.append(small);
      const bits = cell(line, "", "n");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.setProperty("--hue", `var(${row.width === "float" ? "--bf" : `--b${row.width}`})`);
      swatch.textContent = row.width === "float" ? "float" : Number(row.bits.toFixed(2));
      swatch.title = row.group > 0 ? `a scale for every ${row.group} inputs` : "a scale for every output";
      bits.append(swatch);
      cell(line, bytes(row.after), "n wide");
      addBar(cell(line, figure(row.sens, ""), "n wide"), row.sens, losses);
      addBar(cell(line, figure(row.error, " %"), "n"), row.error, errors);
      addBar(cell(line, figure(row.share, " %"), "n"), row.share, shares);
      cell(line, row.form === "float" ? row.reason : row.kernel ? `${row.form}: ${row.kernel}` : row.form, "wide");
    }
    table.tBodies[0].replaceWith(body);
    for (const head of table.tHead.querySelectorAll("th")) {
      if (head.dataset.by === state.order) head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    byId("count").textContent = rows.length === data.layers.length ? `${rows.length} layers` : `${rows.length} of ${data.layers.length} layers`;
  };
  const sortBy = (field) => {
    state.up = field === state.order ? !state.up : ASCENDING.has(field);
    state.order = field;
    const order = byId("order");
    order.value = [...order.options].some((option) => option.value === field) ? field : "";
    fillTable();
    draw("layers");
  };
  const find = (item) => {
    const row = item && item.datum && byId(`layer-${item.datum.index}`);
    if (!row) return;
    for (const other of document.querySelectorAll("tr.found")) other.classList.remove("found");
    row.classList.add("found");
    byId("table-box").scrollTop = row.offsetTop - 60;
  };
  const paintKey = () => {
    const key = byId("key");
    if (!key) return;
    key.replaceChildren(...WIDTHS.filter((width) => data.layers.some((row) => row.width === width)).map((width) => {
      const entry = document.createElement("li");
      const mark = document.createElement("i");
      mark.style.setProperty("--hue", hueOfWidth(width));
      entry.append(mark, width === "float" ? "float" : `${width} bits`);
      return entry;
    }));
  };

  // ---- activation ranges -------------------------------------------------------------------------------------------
  const histogram = (row) => {
    const step = (row.greatest - row.least) / (row.shares.length || 1);
    const bins = row.shares.map((share, at) => ({ from: row.least + at * step, to: row.least + (at + 1) * step, share: share / 10 }));
    return { bins, clips: [{ at: row.low }, { at: row.high }] };
  };
  const describe = () => {
    const row = data.activations[state.value];
    const seen = row.least === null ? "its range comes from the plan" : `calibration saw ${figure(row.least, "")} to ${figure(row.greatest, "")}`;
    const clipped = row.clipped === null ? "" : `, ${row.clipped < 0.001 ? "less than 0.001" : figure(row.clipped, "")} % is clipped`;
    byId("facts").textContent = `${row.name}: ${seen}; the codes 0 to 255 cover ${figure(row.low, "")} to ${figure(row.high, "")} in steps of `
      + `${figure(row.scale, "")}, zero is code ${row.zero}${clipped}.${row.readers ? ` Read by ${row.readers}.` : ""}`;
  };
  const show = (index) => {
    state.value = index;
    byId("value").value = String(index);
    describe();
    draw("histogram");
  };
  const choose = (item) => { if (item && item.datum && "index" in item.datum) show(item.datum.index); };

  // ---- begin -------------------------------------------------------------------------------------------------------
  const later = (work, wait) => {
    let timer = 0;
    return () => { clearTimeout(timer); timer = setTimeout(work, wait); };
  };
  const begin = async () => {
    setTheme(remembered() || (system.matches ? "dark" : "light"));
    system.addEventListener("change", () => { if (!remembered()) { setTheme(system.matches ? "dark" : "light"); drawAll(); } });
    byId("theme").addEventListener("click", () => {
      setTheme(root.dataset.theme === "dark" ? "light" : "dark");
      remember(root.dataset.theme);
      drawAll();
    });
    byId("copy").addEventListener("click", async () => {
      const text = byId("command").textContent;
      try { await navigator.clipboard.writeText(text); byId("copy").textContent = "Copied"; } catch {
        getSelection().selectAllChildren(byId("command")); // where the clipboard is closed to pages, it is marked at least
      }
    });
    if (byId("table")) {
      byId("order").addEventListener("change", (event) => { state.order = ""; sortBy(event.target.value); });
      byId("filter").addEventListener("input", later(() => { state.filter = byId("filter").value; fillTable(); draw("layers"); }, 120));
      for (const head of document.querySelectorAll("th[data-by]")) {
        head.tabIndex = 0;
        head.addEventListener("click", () => sortBy(head.dataset.by));
        head.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(head.dataset.by); });
      }
      fillTable();
    }
    if (byId("value")) {
      byId("value").append(...data.activations.map((row) => new Option(row.name, row.index)));
      byId("value").addEventListener("change", (event) => show(Number(event.target.value)));
      describe();
    }
    let width = root.clientWidth;
    window.addEventListener("resize", later(() => { if (root.clientWidth !== width) { width = root.clientWidth; drawAll(); } }, 150));
    await drawAll();
    root.dataset.ready = "yes";
  };
  begin();
})();
