// Loaded before anything is drawn, so that no page flashes in the wrong colours.
"use strict";
(() => {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
