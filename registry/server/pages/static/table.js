// The list of checkpoints: what is chosen, on this page of it and on others, short addresses, and tags in a dialog. Without it forms and links do
// the same, for one page of the list.
"use strict";
(() => {
  const chosen = new Set();
  const boxes = () => [...document.querySelectorAll("input[type=checkbox][name=ref]")];
  const count = () => {
    const form = document.getElementById("chosen");
    if (!form) return;
    const shown = boxes(), here = shown.filter((each) => each.checked).length, elsewhere = chosen.size - here;
    const place = form.querySelector("[data-count]");
    place.hidden = !chosen.size;
    place.textContent = `${chosen.size} chosen${elsewhere ? `, ${elsewhere} of them not on this page` : ""}`;
    form.querySelector("[data-none]").hidden = !chosen.size;
    form.querySelectorAll("button[data-from]").forEach((each) => { each.disabled = chosen.size < Number(each.dataset.from) || chosen.size > Number(each.dataset.to); });
    const all = document.querySelector("input[data-all]");
    all.checked = here > 0 && here === shown.length;
    all.indeterminate = here > 0 && here < shown.length;
    // what was chosen on other pages goes along with the form
    form.querySelectorAll("input[type=hidden]").forEach((each) => each.remove());
    const own = new Set(shown.map((each) => each.value));
    chosen.forEach((ref) => { if (!own.has(ref)) form.append(Object.assign(document.createElement("input"), { type: "hidden", name: "ref", value: ref })); });
  };
  const note = (box) => { if (box.checked) chosen.add(box.value); else chosen.delete(box.value); };
  const restore = () => { boxes().forEach((each) => { each.checked = chosen.has(each.value); }); count(); };
  const dialog = () => document.getElementById("tagging");

  document.addEventListener("change", (event) => { if (event.target.matches?.("input[type=checkbox][name=ref]")) { note(event.target); queueMicrotask(count); } });

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
      restore();
      // whoever went on to the next page is at its beginning, not at a link that is gone
      if (document.activeElement === document.body) document.querySelector("#list .scroll")?.focus({ preventScroll: true });
    }
  });
  document.addEventListener("htmx:historyRestore", restore);
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-none]")) { chosen.clear(); restore(); document.querySelector("input[data-all]").focus(); }
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
  boxes().forEach(note);
  count();
})();
