"use strict";
// What all parts of the page share: its data, elements made from text (never from HTML), the theme.
const report = JSON.parse(document.getElementById("report").textContent);
const page = JSON.parse(document.getElementById("page").textContent);

// marks that turn the direction of writing, and those without a shape: what is read must be what is there
const TURNING = /[\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c\u00ad\u200b\u2060-\u2064\ufeff\u0000-\u0008\u000e-\u001b\u007f-\u0084\u0086-\u009f]/g;
const clean = (text) => String(text).replace(TURNING, "");
const SVG = "http://www.w3.org/2000/svg";

// An element; children that are no nodes are text.
function make(name, attributes, ...children) {
  const svg = ["svg", "g", "path", "circle", "line", "text", "title"].includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, clean(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined) continue;
    element.append(child instanceof Node ? child : document.createTextNode(clean(child)));
  }
  return element;
}

const number = (value, digits = 3) => (value === null || value === undefined ? "" : value.toFixed(digits));
const interval = (low, high) => (low === null || high === null ? "" : `[${number(low)}, ${number(high)}]`);

// What a file may keep in a browser is not always there: from the file system some browsers refuse it.
const kept = {
  get() { try { return localStorage.getItem("theme"); } catch { return null; } },
  set(value) { try { localStorage.setItem("theme", value); } catch { /* the choice lasts as long as the page */ } },
};

{
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  let now = themes.includes(kept.get()) ? kept.get() : "auto";
  const show = () => {
    document.documentElement.dataset.theme = now;
    button.textContent = `Theme: ${now}`;
    button.setAttribute("aria-label", `colours: ${now}; press to change`);
  };
  button.addEventListener("click", () => {
    now = themes[(themes.indexOf(now) + 1) % themes.length];
    kept.set(now);
    show();
  });
  button.hidden = false;
  show();
}

// a link to a fold opens it
function unfold() {
  const target = location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
  if (target instanceof HTMLDetailsElement) target.open = true;
}
window.addEventListener("hashchange", unfold);
unfold();

// paper has no folds to open, except that answers to harmful prompts stay closed unless a reader opened them
window.addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("#runs details")) { fold.dataset.was = fold.open; fold.open = true; }
});
window.addEventListener("afterprint", () => {
  for (const fold of document.querySelectorAll("#runs details")) fold.open = fold.dataset.was === "true";
});
