// The leaderboard: sorting by any column, a filter by words and by kind, a choice of columns.
{
  const board = document.getElementById("board");
  const tools = document.getElementById("tools");
  const body = board.tBodies[0];
  const heads = [...board.tHead.rows[0].cells];
  const rows = [...body.rows];

  const value = (row, at) => {
    if (at === 0) return report.rows[row.dataset.row].label.toLowerCase();
    const text = row.cells[at].dataset.v;
    return text === "" || text === undefined ? null : Number(text);
  };

  // The first press puts the best row first; rows without a value are last in either order.
  function sort(at) {
    const head = heads[at];
    const before = head.getAttribute("aria-sort");
    const first = head.dataset.higher === "true" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = before === first ? other : first;
    heads.forEach((cell) => cell.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const sorted = [...rows].sort((a, b) => {
      const [x, y] = [value(a, at), value(b, at)];
      if (x === null || y === null) return (x === null) - (y === null) || a.dataset.row - b.dataset.row;
      return (x < y ? -sign : x > y ? sign : 0) || a.dataset.row - b.dataset.row;
    });
    body.append(...sorted);
  }

  heads.forEach((head, at) => {
    const button = make("button", { type: "button", class: "sort", onclick: () => sort(at) });
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });

  const words = make("input", { type: "search", id: "words", placeholder: "label or run" });
  const kind = make("select", { id: "kind" }, make("option", { value: "" }, "all"),
    [...new Set(page.kinds)].sort().map((name) => make("option", { value: name }, name)));
  const count = make("output", { "aria-live": "polite" });

  function filter() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const { label, run } = report.rows[row.dataset.row];
      const text = `${label} ${run} ${page.kinds[row.dataset.row]}`.toLowerCase();
      row.hidden = !(wanted.every((word) => text.includes(word))
        && (!kind.value || page.kinds[row.dataset.row] === kind.value));
      shown += !row.hidden;
    }
    count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  }

  const boxes = heads.slice(1).map((head, at) => {
    const box = make("input", { type: "checkbox", checked: true, onchange: () => {
      for (const row of [...board.rows]) if (row.cells[at + 1]) row.cells[at + 1].hidden = !box.checked;
    } });
    return make("label", {}, box, head.textContent);
  });
  const columns = make("details", { id: "columns" }, make("summary", {}, "Columns"),
    make("fieldset", { "aria-label": "columns that are shown" }, boxes));
  document.addEventListener("click", (event) => { if (!columns.contains(event.target)) columns.open = false; });
  columns.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { columns.open = false; columns.querySelector("summary").focus(); }
  });

  words.addEventListener("input", filter);
  kind.addEventListener("change", filter);
  tools.append(make("label", { for: "words" }, "Filter", words), make("label", { for: "kind" }, "Kind", kind), columns, count);
  tools.hidden = false;
  filter();
}
