// Colours and the choice between dark and light. The choice lives as long as the page, nothing is stored.
"use strict";

const OTHERS = ["orange", "green", "purple", "vermillion", "sky", "olive"];
const KNOWN = { stock: "stock", torch: "stock", before: "stock", pyarch: "accent", after: "accent" };
const MAP_COLOURS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

/** The value of a colour of the style sheet under the theme of now. */
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

/** A colour for each series, and how often it was given before: stock and ours keep theirs, the others take turns. */
function seriesColours(names) {
  let next = 0;
  return names.map((name) => {
    if (Object.hasOwn(KNOWN, name)) return { colour: colour(KNOWN[name]), turn: 0 };
    const turn = Math.floor(next / OTHERS.length);
    return { colour: colour(OTHERS[next++ % OTHERS.length]), turn };
  });
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Start the button, and call `changed` now and whenever the colours are others. */
function startTheme(changed) {
  const button = document.querySelector("button.theme");
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Show the page in ${isDark() ? "light" : "dark"} colours`);
    changed();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}
