// What changes something is asked for in a dialog; without this each question has a page of its own.
"use strict";
(() => {
  const dialog = document.getElementById("asking");
  if (!dialog) return;
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.target.id !== "asked") return;
    if (!dialog.open) dialog.showModal();
    (event.target.querySelector("input:not([type=hidden])") ?? event.target.querySelector("button"))?.focus();
  });
  // Where there is no dialog, to cancel is to go back.
  dialog.addEventListener("click", (event) => { if (event.target.closest("[data-closes]")) event.preventDefault(); });
  // What goes wrong is said on the page, which the dialog covers.
  document.addEventListener("htmx:responseError", () => { if (dialog.open) dialog.close(); });
})();
