// Sorts a table by the column whose head is pressed: numbers by value, everything else as text, empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.value ?? cell.textContent.trim();
        const number = Number(text.replace(/[,\u2212]/g, (sign) => (sign === "," ? "" : "-")));
        return text === "" ? null : Number.isNaN(number) ? text : number;
      };
      const order = (a, b) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const numbers = typeof a === "number" && typeof b === "number";
        return (numbers ? a - b : String(a).localeCompare(String(b))) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].map((row) => [key(row), row]).sort((a, b) => order(a[0], b[0])).map(([, row]) => row));
    });
  });
}
