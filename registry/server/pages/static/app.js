// What all pages do: choose the theme, copy, open dialogs, select rows. Pages work without it.
"use strict";
(() => {
  const root = document.documentElement;
  const said = (text) => { const place = document.getElementById("said"); if (place) place.textContent = text; };

  const themes = ["", "light", "dark"];
  const showTheme = () => {
    const name = { "": "System", light: "Light", dark: "Dark" }[root.dataset.theme ?? ""];
    document.querySelectorAll("[data-theme-name]").forEach((each) => { each.textContent = name; });
  };
  const nextTheme = () => {
    const theme = themes[(themes.indexOf(root.dataset.theme ?? "") + 1) % themes.length];
    if (theme) { root.dataset.theme = theme; localStorage.setItem("theme", theme); }
    else { delete root.dataset.theme; localStorage.removeItem("theme"); }
    showTheme();
    document.dispatchEvent(new CustomEvent("theme"));
  };

  const copy = async (button) => {
    const text = button.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // without TLS there is no clipboard: select the text instead
      const code = button.parentElement.querySelector("code");
      if (code) getSelection().selectAllChildren(code);
      said("Selected; press Ctrl-C to copy");
      return;
    }
    const label = button.textContent;
    button.textContent = "Copied";
    said("Copied");
    setTimeout(() => { button.textContent = label; }, 1500);
  };

  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-theme-switch],[data-copy],[data-opens],[data-closes]");
    if (!target) return;
    if ("themeSwitch" in target.dataset) nextTheme();
    else if ("copy" in target.dataset) copy(target);
    else if ("opens" in target.dataset) document.getElementById(target.dataset.opens)?.showModal();
    else target.closest("dialog")?.close();
  });

  // Of a column of boxes, the one in the head ticks all.
  document.addEventListener("change", (event) => {
    const box = event.target;
    if (!box.matches?.("input[data-all]")) return;
    box.closest("table").querySelectorAll("tbody input[type=checkbox]").forEach((each) => {
      if (each.checked !== box.checked) { each.checked = box.checked; each.dispatchEvent(new Event("change", { bubbles: true })); }
    });
  });

  // What went wrong before is over once something new is asked for.
  document.addEventListener("htmx:beforeRequest", () => { const place = document.getElementById("problem"); if (place) place.textContent = ""; });

  // Of several steps back and forth only the last is shown, whichever is answered first. What has an error is loaded as a page of its own.
  let step;
  document.addEventListener("htmx:historyCacheMiss", (event) => { step?.abort(); step = event.detail.xhr; });
  document.addEventListener("htmx:historyCacheMissLoadError", () => location.reload());

  const menu = document.getElementById("menu");
  const wide = matchMedia("(min-width: 60rem)");
  const fit = () => { if (menu) menu.open = wide.matches; };
  wide.addEventListener("change", fit);
  fit();
  showTheme();
})();
