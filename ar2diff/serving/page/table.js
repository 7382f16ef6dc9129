// The tokens of a recording as a table, for those who do not see colours and small numbers.

import { element } from "./elements.js";
import { MODES } from "./stage.js";

const MOST = 1000; // rows
const STATES = { decided: "decided", drafted: "draft, accepted", open: "blank", given: "given" };

/** A table of tokens. */
export function tableOf({ mode, tokens }) {
  const heads = ["Token", "State", "Forward", "Probability"];
  const head = element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)));
  const rows = tokens.slice(0, MOST).map(({ text, state, step, p }) => {
    const told = state === "open" || state === "given" ? ["", ""] : [step, `${(p * 100).toFixed(1)} %`];
    const cells = [state === "open" ? "" : visible(text), STATES[state], ...told];
    return element("tr", {}, ...cells.map((cell) => element("td", {}, String(cell))));
  });
  const more = tokens.length > MOST ? `, the first ${MOST}` : "";
  return element(
    "table",
    {},
    element("caption", {}, `${MODES[mode] ?? mode}${more}`),
    element("thead", {}, head),
    element("tbody", {}, ...rows),
  );
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll(" ", "␣");
