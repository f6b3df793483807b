// Tables that their reader sorts and filters.

const COLLATOR = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/** Numbers before texts, nothing last; the direction turns all but the last. */
function compareCells(left, right, direction) {
  const [a, b] = [left, right].map((cell) => cell.dataset.sort);
  if (a === "" || b === "") return (a === "") - (b === "");
  if (a === undefined && b === undefined) return direction * COLLATOR.compare(left.textContent, right.textContent);
  if (a === undefined || b === undefined) return direction * ((a === undefined) - (b === undefined));
  return direction * (Number(a) < Number(b) ? -1 : Number(a) > Number(b) ? 1 : 0);
}

function sortBy(table, heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const each of heading.parentElement.children) each.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const column = heading.cellIndex;
  rows.sort((a, b) => compareCells(a.cells[column], b.cells[column], ascending ? 1 : -1));
  body.append(...rows);
}

/** Rows that hold every word of the filter, in any column. */
function startFilter(sheet) {
  const input = sheet.querySelector(".filter input");
  if (!input) return;
  const output = sheet.querySelector(".filter output");
  const rows = Array.from(sheet.querySelectorAll("tbody tr"), (row) => [
    row, Array.from(row.cells, (cell) => cell.textContent).join("\t").toLowerCase()]);
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      left += !row.hidden;
    }
    output.textContent = words.length ? `${left} of ${rows.length} rows` : `${rows.length} rows`;
  };
  input.addEventListener("input", apply);
  apply();
}

function startSheet(sheet) {
  const table = sheet.querySelector("table");
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => sortBy(table, button.parentElement));
  }
  startFilter(sheet);
}
