"use strict";
// Sorts and folds the table of layers, and copies code. Without it the page shows everything, in the model's order.
(() => {
  const say = (text) => { document.getElementById("status").textContent = text; };
  const button = (text, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.append(text);
    made.addEventListener("click", () => act(made));
    return made;
  };

  for (const code of document.querySelectorAll("pre[data-copy]")) {
    const copied = async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }
      say(`Copied the code for ${code.dataset.copy}.`);
    };
    const copy = button("Copy", copied);
    copy.setAttribute("aria-label", `Copy the code for ${code.dataset.copy}`);
    code.before(copy);
  }

  const table = document.getElementById("layers-table");
  if (!table || !table.tBodies.length) return;
  const blocks = [...table.tBodies].map((body) => ({ body, head: body.rows[0], rows: [...body.rows].slice(1) }));
  const rows = blocks.flatMap((block) => block.rows);
  const heads = [...table.tHead.rows[0].cells];
  const flat = document.createElement("tbody");
  flat.className = "flat";
  const fold = (block, folded) => {
    block.body.classList.toggle("folded", folded);
    block.toggle.setAttribute("aria-expanded", String(!folded));
  };
  const foldAll = (folded) => {
    blocks.forEach((block) => fold(block, folded));
    say(folded ? "All blocks are folded." : "All blocks are open.");
  };
  const modelOrder = () => {
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    flat.remove();
    for (const block of blocks) {
      block.body.append(...block.rows);
      table.append(block.body);
    }
  };
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.v ?? cell.textContent;
    return cell.dataset.v === undefined ? value : value === "" ? -Infinity : Number(value);
  };
  const sortBy = (column) => {
    const before = heads[column].getAttribute("aria-sort");
    const numeric = rows.some((row) => row.cells[column].dataset.v !== undefined);
    const descending = before ? before === "ascending" : numeric;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    const keyed = rows.map((row) => [valueOf(row, column), row]);
    const order = new Intl.Collator("en", { numeric: true }).compare;
    keyed.sort(([a], [b]) => (numeric ? a - b : order(a, b)) || 0);
    if (descending) keyed.reverse();
    blocks.forEach((block) => block.body.remove());
    flat.replaceChildren(...keyed.map(([, row]) => row));
    table.append(flat);
    say(`Sorted by ${heads[column].textContent.trim()}, ${descending ? "largest first" : "smallest first"}.`);
  };

  heads.forEach((head, column) => {
    const text = head.textContent.trim();
    head.replaceChildren(button(text, () => sortBy(column)));
  });
  for (const block of blocks) {
    const cell = block.head.cells[0];
    const words = [...cell.childNodes];
    block.toggle = button("", () => fold(block, !block.body.classList.contains("folded")));
    block.toggle.append(...words);
    block.toggle.setAttribute("aria-expanded", "true");
    cell.replaceChildren(block.toggle);
  }
  const tools = document.getElementById("layers-tools");
  tools.append(
    button("Fold all blocks", () => { modelOrder(); foldAll(true); }),
    button("Open all blocks", () => { modelOrder(); foldAll(false); }),
    button("Model's order", () => { modelOrder(); say("In the model's order."); }),
  );
  const every = button("All columns", () => {
    every.setAttribute("aria-pressed", String(table.classList.toggle("all")));
  });
  every.setAttribute("aria-pressed", "false");
  every.className = "narrow";
  tools.append(every);
  if (rows.length > 60) blocks.forEach((block) => fold(block, true));
})();
