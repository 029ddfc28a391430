"use strict";
// The page is complete without this: it sorts and filters the table of layers, and opens what a link points to.
(() => {
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const filter = document.getElementById("filter");
  const bits = document.getElementById("bits");
  const shown = document.getElementById("shown");

  const valueOf = (row, column, kind) => {
    const cell = row.cells[column];
    if (kind === "text") return cell.textContent.toLowerCase();
    const value = cell.dataset.v ?? cell.textContent;
    return value === "" ? null : Number(value);
  };

  const sort = (button) => {
    const header = button.closest("th");
    const kind = button.dataset.kind;
    // Numbers begin with the largest, texts and the order of execution with the first.
    const first = kind === "text" || header.cellIndex === 0 ? "ascending" : "descending";
    const second = first === "ascending" ? "descending" : "ascending";
    const order = header.getAttribute("aria-sort") === first ? second : first;
    for (const other of header.parentNode.cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    header.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const keyed = rows.map((row, place) => ({ row, place, value: valueOf(row, header.cellIndex, kind) }));
    keyed.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.place - b.place;
      if (kind === "text") return sign * a.value.localeCompare(b.value, "en", { numeric: true }) || a.place - b.place;
      return sign * (a.value - b.value) || a.place - b.place;
    });
    body.append(...keyed.map(({ row }) => row));
  };

  const show = () => {
    const wanted = filter.value.trim().toLowerCase();
    let count = 0;
    rows.forEach((row, place) => {
      const words = `${row.cells[1].textContent} ${row.cells[2].textContent}`.toLowerCase();
      const fits = words.includes(wanted) && (bits.value === "" || row.dataset.bits === bits.value);
      row.hidden = !fits;
      document.getElementById(`layer-${place + 1}`).hidden = !fits;
      count += fits;
    });
    shown.textContent = `${count} of ${rows.length} layers`;
  };

  const open = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) {
      target.hidden = false;
      target.open = true;
      target.scrollIntoView();
      target.querySelector("summary").focus({ preventScroll: true });
    }
  };

  for (const button of table.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
  filter.addEventListener("input", show);
  bits.addEventListener("change", show);
  addEventListener("hashchange", open);
  document.querySelector(".controls").hidden = false;
  show();
  open();
})();
