// Elements of the page. Everything that is not of this page's own making becomes a text node.

/** The element with an id. */
export const $ = (id) => document.getElementById(id);

/** A new element with properties, `data` attributes and children; a string becomes a text node. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  const { data = {}, ...others } = properties;
  Object.assign(made, others);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

/** Show a sentence in an element that is hidden while there is none. */
export function say(place, sentence) {
  place.textContent = sentence;
  place.hidden = !sentence;
}

/** A duration for people. */
export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}
