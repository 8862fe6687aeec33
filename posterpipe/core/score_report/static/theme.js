// Runs before the page is painted: scripts are at work, and the theme that was chosen last.
"use strict";
document.documentElement.classList.add("js");
try {
  const chosen = localStorage.getItem("posterpipe-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is refused in private windows and for some files opened from disk.
}
