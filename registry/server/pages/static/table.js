// The list of checkpoints: what is chosen, short addresses, and tags in a dialog. Without it forms and links do the same.
"use strict";
(() => {
  const buttons = () => document.querySelectorAll("#chosen button[data-from]");
  const count = () => {
    const chosen = document.querySelectorAll("input[name=ref][form=chosen]:checked").length;
    const place = document.querySelector("#chosen [data-count]");
    if (place) { place.hidden = !chosen; place.textContent = `${chosen} chosen`; }
    buttons().forEach((each) => { each.disabled = chosen < Number(each.dataset.from) || chosen > Number(each.dataset.to); });
    const all = document.querySelector("input[data-all]");
    const boxes = document.querySelectorAll("input[name=ref][form=chosen]").length;
    if (all) { all.checked = chosen > 0 && chosen === boxes; all.indeterminate = chosen > 0 && chosen < boxes; }
  };
  const dialog = () => document.getElementById("tagging");

  document.addEventListener("change", (event) => { if (event.target.matches?.("input[name=ref]")) queueMicrotask(count); });

  // Fields that say nothing stay out of the address; that no column is wanted is said by an empty metric.
  document.addEventListener("htmx:configRequest", (event) => {
    if (event.target.id !== "filters") return;
    const said = event.detail.formData;
    for (const name of ["sort", "adapter", "where"]) if (!said.get(name)) said.delete(name);
    if (said.get("limit") === "50") said.delete("limit");
    const columns = said.getAll("metric").filter(Boolean);
    if (columns.length) { said.delete("metric"); columns.forEach((each) => said.append("metric", each)); }
  });

  let isOpen = false;
  document.addEventListener("htmx:beforeSwap", () => { isOpen = Boolean(document.getElementById("choice")?.open); });
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail?.target?.id === "tagging") {
      if (!dialog().open) dialog().showModal();
    } else if (document.getElementById("choice")) {
      document.getElementById("choice").open = isOpen;
    }
    count();
  });
  document.addEventListener("click", (event) => {
    const choice = document.getElementById("choice");
    if (choice?.open && !choice.contains(event.target)) choice.open = false;
    if (event.target.closest("[data-close-tagging]") && dialog()?.open) { event.preventDefault(); dialog().close(); }
  });
  document.addEventListener("keydown", (event) => {
    const choice = document.getElementById("choice");
    if (event.key === "Escape" && choice?.open) { choice.open = false; choice.querySelector("summary").focus(); }
  });

  // What was done is said aloud, once: it stays out of the address that is passed on.
  const done = document.querySelector("[data-say]");
  if (done) {
    const said = document.getElementById("said");
    setTimeout(() => { said.textContent = done.textContent; }, 100);
    const url = new URL(location.href);
    url.searchParams.delete("tagged");
    history.replaceState(history.state, "", url);
  }
  count();
})();
