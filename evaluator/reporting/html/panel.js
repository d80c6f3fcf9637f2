// A cell's panel: its numbers seed by seed, its place, the run behind it, and the commands that remake it.
{
  const panel = document.getElementById("panel");
  const board = document.getElementById("board");
  let from = null;

  function facts(pairs) {
    return make("dl", {}, pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined)
      .map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }

  function commands(part, score) {
    const origin = page.columns[score] || { sets: [] };
    const answers = origin.sets.map((name) => (part.answers || {})[name]);
    const all = [...(part.make || []), ...answers, (part.scores || {})[origin.command]];
    return [...new Set(all.filter(Boolean))];
  }

  // a line breaks between words alone, not behind the hyphens of a flag
  const code = (lines) => make("code", {}, lines.map((line) => make("span", { class: "line" },
    line.split(" ").map((word) => [make("span", { class: "word" }, word), " "]))));

  function copied(button, text) {
    const done = (word) => { button.textContent = word; };
    if (!navigator.clipboard) { done("select and copy"); return; }
    navigator.clipboard.writeText(text).then(() => done("copied"), () => done("select and copy"));
  }

  function close() {
    panel.hidden = true;
    if (from) from.focus();
  }

  function open(link, at, score) {
    const row = report.rows[at];
    const column = report.columns.find((item) => item.name === score);
    const cell = row.cells[score];
    const rank = (page.ranks[score] || [])[at];
    const parts = page.runs[at];
    const several = parts.length > 1;
    panel.replaceChildren(
      make("button", { type: "button", class: "close", onclick: close }, "Close"),
      make("small", {}, column.title), make("h3", {}, row.label), make("p", { class: "says" }, column.definition),
      facts([
        ["value", `${number(cell.value)} ${interval(cell.low, cell.high)}`], ["rows", cell.n],
        ["rank", rank ? (rank[0] === rank[1] ? rank[0] : `${rank[0]} to ${rank[1]} of ${page.ranks[score].filter(Boolean).length}`) : ""],
        ...(several ? row.seeds.map((seed, i) => [seed, number(cell.per_seed[i])]) : []),
        ["kind", page.kinds[at]],
      ]),
      ...parts.map((part, i) => {
        const listed = commands(part, score);
        const lines = listed.join("\n");
        const button = make("button", { type: "button", class: "copy", onclick: () => copied(button, lines) }, "Copy commands");
        return make("div", {}, make("h4", {}, `${several ? `${part.name}: ` : ""}${part.run}`),
          facts([["folder", part.folder], ["made by", part.method], ["finished", part.finished],
            ["took", part.seconds ? `${Math.round(part.seconds).toLocaleString("en")} s` : ""],
            ["peak memory", part.peak_memory_mb ? `${Math.round(part.peak_memory_mb).toLocaleString("en")} MB` : ""],
            ["inputs", Object.entries(part.inputs || {}).map(([name, value]) => `${name} ${String(value).slice(0, 16)}`).join(", ")]]),
          i === 0 && lines ? [make("pre", { tabindex: 0 }, code(listed)), button]
            : lines ? make("details", {}, make("summary", {}, "commands"), make("pre", {}, code(listed)), button)
              : make("p", { class: "says" }, "No manifest says how it was made."));
      }),
    );
    from = link;
    panel.hidden = false;
    panel.scrollTop = 0;
    panel.focus();
  }

  board.addEventListener("click", (event) => {
    const link = event.target.closest("td a[data-score]");
    const whole = link || (event.target.closest("td") || board).querySelector?.("a[data-score]");
    if (!whole || !event.target.closest("td") || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    open(whole, Number(whole.closest("tr").dataset.row), whole.dataset.score);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.hidden) close(); });
}
