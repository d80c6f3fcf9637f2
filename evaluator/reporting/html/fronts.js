// The fronts: any two scores against each other, a third as the size of the points, the Pareto front of the two.
{
  const place = document.getElementById("plot");
  const tip = document.getElementById("tip");
  const [LEFT, RIGHT, TOP, BELOW] = [64, 24, 16, 56];
  // a picture that is drawn small keeps the size of its letters
  const narrow = matchMedia("(max-width: 640px)");
  const SHAPES = [
    "M-6 0A6 6 0 1 0 6 0A6 6 0 1 0 -6 0Z", "M-5.5 -5.5H5.5V5.5H-5.5Z", "M0 -7.5L7 5.5H-7Z", "M0 -7.5L7.5 0L0 7.5L-7.5 0Z",
    "M0 7.5L7 -5.5H-7Z", "M-2 -7H2V-2H7V2H2V7H-2V2H-7V-2H-2Z", "M-7 -3L0 -7.5L7 -3L4.5 6H-4.5Z", "M-7 -3.5H7V3.5H-7Z",
  ];

  const axes = [
    ...report.columns.map((column) => ({ name: column.name, title: column.title, higher: column.higher_is_better,
      of: (at) => report.rows[at].cells[column.name] || null })),
    ...page.costs.map((cost) => ({ name: cost.name, title: cost.title, higher: cost.higher_is_better,
      of: (at) => (cost.values[at] === null ? null : { value: cost.values[at], low: null, high: null }) })),
  ].filter((axis) => report.rows.filter((_, at) => axis.of(at)).length > 0);
  const named = (name) => axes.find((axis) => axis.name === name);
  const kinds = [...new Set(page.kinds)];

  const digits = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : number(value));
  const said = (axis, at) => {
    const cell = axis.of(at);
    return `${axis.title}: ${cell ? digits(cell.value) : "not measured"} ${cell ? interval(cell.low, cell.high) : ""}`.trim();
  };

  function choice(id, label, start, more) {
    const select = make("select", { id, onchange: draw }, more,
      axes.map((axis) => make("option", { value: axis.name, selected: axis.name === start }, axis.title)));
    return [make("label", { for: id }, label, select), select];
  }

  function ticks(low, high, most) {
    let step = 10 ** Math.floor(Math.log10((high - low) / most));
    step *= [1, 2, 5, 10].find((times) => (high - low) / (step * times) <= most);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i += 1) found.push(Number((i * step).toPrecision(10)));
    return found;
  }

  function ends(axis, points) {
    const values = points.flatMap((at) => { const c = axis.of(at); return [c.value, c.low, c.high]; })
      .filter((value) => value !== null && value !== undefined);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.5;
    return [low - room, high + room];
  }

  // points that no other one is at least as good as on both axes and better on one
  function front(points, x, y) {
    const better = (axis, a, b) => (axis.higher ? 1 : -1) * (axis.of(a).value - axis.of(b).value);
    return points.filter((a) => !points.some((b) => better(x, b, a) >= 0 && better(y, b, a) >= 0
      && (better(x, b, a) > 0 || better(y, b, a) > 0)))
      .sort((a, b) => x.of(a).value - x.of(b).value || y.of(a).value - y.of(b).value);
  }

  function showTip(at, where, shown, under) {
    const also = under.length ? [`also here: ${under.map((other) => report.rows[other].label).join(", ")}`] : [];
    tip.textContent = clean([report.rows[at].label, ...shown.map((axis) => said(axis, at)), ...also].join("\n"));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(where.x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${Math.max(8, where.y - box.height - 12)}px`;
  }

  const first = (...names) => (names.map(named).find(Boolean) || axes[0]).name;
  const up = choice("y", "Up", first("auc", "safe_refusal", "refusal"));
  const across = choice("x", "Across", first("overrefusal", "overrefusal_edgy", "mc2", "nll"));
  const size = choice("size", "Size", "", make("option", { value: "" }, "all alike"));
  size[1].value = "";
  const picture = make("div", {});
  const legend = make("ul", { class: "legend", "aria-label": "kinds of rows" }, kinds.map((kind, i) => make("li", {},
    make("svg", { viewBox: "-9 -9 18 18", class: `plot k${i % 8}`, "aria-hidden": "true" },
      make("g", { class: `k${i % 8}` }, make("path", { d: SHAPES[i % 8], class: "mark" }))), kind)),
    make("li", {}, "dashed: rows that no other row beats on both axes"));

  function draw() {
    const [WIDE, HIGH] = narrow.matches ? [440, 440] : [960, 520];
    const [x, y, z] = [named(across[1].value), named(up[1].value), named(size[1].value)];
    const points = report.rows.map((_, at) => at).filter((at) => x.of(at) && y.of(at));
    if (points.length === 0) {
      picture.replaceChildren(make("p", { class: "says" }, "No row has both scores."));
      return;
    }
    const [xs, ys] = [ends(x, points), ends(y, points)];
    const px = (value) => LEFT + ((WIDE - LEFT - RIGHT) * (value - xs[0])) / (xs[1] - xs[0]);
    const py = (value) => HIGH - BELOW - ((HIGH - TOP - BELOW) * (value - ys[0])) / (ys[1] - ys[0]);
    const svg = make("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, class: points.length > 12 ? "plot many" : "plot", role: "group",
      "aria-label": `${y.title} against ${x.title}: ${points.length} rows; each one can be reached by the Tab key` });
    for (const tick of ticks(...ys, 7)) {
      svg.append(make("line", { x1: LEFT, x2: WIDE - RIGHT, y1: py(tick), y2: py(tick), class: "grid" }),
        make("text", { x: LEFT - 8, y: py(tick) + 4, "text-anchor": "end" }, tick.toLocaleString("en")));
    }
    for (const tick of ticks(...xs, narrow.matches ? 5 : 9)) {
      svg.append(make("line", { x1: px(tick), x2: px(tick), y1: TOP, y2: HIGH - BELOW, class: "grid" }),
        make("text", { x: px(tick), y: HIGH - BELOW + 20, "text-anchor": "middle" }, tick.toLocaleString("en")));
    }
    svg.append(make("text", { x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 8, "text-anchor": "middle", class: "title" }, x.title),
      make("text", { x: 16, y: (TOP + HIGH - BELOW) / 2, "text-anchor": "middle", class: "title",
        transform: `rotate(-90 16 ${(TOP + HIGH - BELOW) / 2})` }, y.title));
    const best = front(points, x, y);
    if (best.length > 1) {
      svg.append(make("path", { d: `M${best.map((at) => `${px(x.of(at).value)} ${py(y.of(at).value)}`).join("L")}`, class: "front" }));
    }
    const sizes = z ? points.filter((at) => z.of(at)).map((at) => z.of(at).value) : [];
    const scale = (at) => {
      if (!z || !z.of(at)) return 1;
      const [low, high] = [Math.min(...sizes), Math.max(...sizes)];
      return high > low ? Math.sqrt(0.5 + (2.5 * (z.of(at).value - low)) / (high - low)) : 1;
    };
    const taken = points.map((at) => [px(x.of(at).value) - 9, py(y.of(at).value) - 9, px(x.of(at).value) + 9, py(y.of(at).value) + 9]);
    const labels = make("g", { "aria-hidden": "true" });
    const shown = [y, x, ...(z ? [z] : [])];
    // in reading order for the Tab key: best first on the upward axis
    points.sort((a, b) => (y.higher ? -1 : 1) * (y.of(a).value - y.of(b).value));
    for (const at of points) {
      const [cx, cy] = [px(x.of(at).value), py(y.of(at).value)];
      const [xc, yc] = [x.of(at), y.of(at)];
      const kind = kinds.indexOf(page.kinds[at]) % 8;
      const group = make("g", { class: `point k${kind}`, tabindex: 0, role: "img", "data-row": at,
        "aria-label": [report.rows[at].label, ...shown.map((axis) => said(axis, at))].join("; ") });
      if (xc.low !== null && xc.high !== null) group.append(make("line", { x1: px(xc.low), x2: px(xc.high), y1: cy, y2: cy, class: "whisker" }));
      if (yc.low !== null && yc.high !== null) group.append(make("line", { x1: cx, x2: cx, y1: py(yc.low), y2: py(yc.high), class: "whisker" }));
      group.append(make("path", { d: SHAPES[kind], class: "mark", transform: `translate(${cx} ${cy}) scale(${scale(at)})` }),
        make("circle", { cx, cy, r: 11, class: "halo" }));
      const whole = clean(report.rows[at].label);
      const label = whole.length > 28 ? `${whole.slice(0, 26)}…` : whole;
      // a point over another one speaks for both
      const under = points.filter((other) => other !== at && Math.hypot(px(x.of(other).value) - cx, py(y.of(other).value) - cy) < 7);
      const half = label.length * 6.4;
      // the first place beside the point that covers nothing; without one the label waits for the pointer
      const spots = [[10, -9, "start"], [-10, -9, "end"], [10, 19, "start"], [-10, 19, "end"], [14, 4, "start"], [-14, 4, "end"],
        [0, -14, "middle"], [0, 24, "middle"]];
      for (const [dx, dy, anchor] of spots) {
        const left = cx + dx - (anchor === "end" ? half : anchor === "middle" ? half / 2 : 0);
        const box = [left, cy + dy - 12, left + half, cy + dy + 3];
        const free = !taken.some((o) => box[0] < o[2] && o[0] < box[2] && box[1] < o[3] && o[1] < box[3])
          && box[0] > LEFT && box[2] < WIDE && box[1] > 0 && box[3] < HIGH - BELOW;
        if (free) {
          taken.push(box);
          labels.append(make("text", { x: cx + dx, y: cy + dy, "text-anchor": anchor }, label));
          break;
        }
      }
      const near = () => { const box = group.querySelector(".mark").getBoundingClientRect(); return { x: box.right, y: box.top }; };
      group.addEventListener("pointerenter", () => showTip(at, near(), shown, under));
      group.addEventListener("focus", () => showTip(at, near(), shown, under));
      for (const leave of ["pointerleave", "blur"]) group.addEventListener(leave, () => { tip.hidden = true; });
      svg.append(group);
    }
    svg.append(labels);
    picture.replaceChildren(svg);
  }

  narrow.addEventListener("change", draw);
  place.append(make("div", { class: "choices" }, up[0], across[0], size[0]), picture, legend);
  document.getElementById("no-plot").hidden = true;
  place.hidden = false;
  draw();
}
