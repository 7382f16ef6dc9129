// Fields of the form: what they hold, and what is wrong with them.

import { $, element } from "./elements.js";

/** A field that is wrong, by the name that the server has for it. */
export class Wrong extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

/** The settings of a request in a mode. A field that is empty leaves the choice to the server. */
export function settingsOf(mode) {
  const settings = { mode };
  const names = ["max_tokens", "temperature", "seed"];
  if (mode === "diffusion") names.push("threshold");
  for (const name of names) {
    const value = numberIn(name);
    if (value !== null) settings[name] = value;
  }
  return settings;
}

function numberIn(name) {
  const field = $(name);
  if (field.validity.badInput) throw new Wrong(name, "This is not a number.");
  return field.value.trim() === "" ? null : Number(field.value);
}

/** Show what is wrong beside its field, or below the form if no visible field has the name. */
export function showProblem(message, param) {
  const name = String(param ?? "").split(/[.[]/)[0];
  const named = [...document.querySelectorAll("#form [data-param]")];
  const shown = (node) => !node.closest("[hidden]");
  const field = name && named.find((node) => node.dataset.param.split(" ").includes(name) && shown(node));
  if (!field) {
    $("form-problem").textContent = message;
    $("form-problem").hidden = false;
    return;
  }
  const id = `${field.id}-problem`;
  const told = element("p", { className: "problem", id, role: "alert" }, message);
  field.after(told);
  field.setAttribute("aria-invalid", "true");
  field.dataset.described ??= field.getAttribute("aria-describedby") ?? "";
  field.setAttribute("aria-describedby", `${id} ${field.dataset.described}`.trim());
  field.closest("details")?.setAttribute("open", "");
  field.focus();
}

/** Forget what was wrong. */
export function clearProblems() {
  $("form-problem").hidden = true;
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.setAttribute("aria-describedby", field.dataset.described);
    if (!field.dataset.described) field.removeAttribute("aria-describedby");
    $(`${field.id}-problem`)?.remove();
  }
}
