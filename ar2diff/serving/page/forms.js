// The form that an answer is held to: JSON of a schema, one of several texts, a regular expression.

import { $ } from "./elements.js";
import { Wrong } from "./settings.js";

const SCHEMA = {
  type: "object",
  properties: { name: { enum: ["Mia", "Ben"] }, happy: { type: "boolean" } },
  required: ["name", "happy"],
};
const KINDS = {
  json_schema: {
    label: "JSON schema",
    hint: "The answer is JSON of this schema, to the last bracket.",
    example: JSON.stringify(SCHEMA, null, 2),
  },
  choice: {
    label: "Texts, one in each line",
    hint: "The answer is one of these. A text that goes on usually begins with a space.",
    example: " She was happy.\n She was sad.",
  },
  regex: {
    label: "Regular expression",
    hint: "The whole answer matches it. A text that goes on usually begins with a space.",
    example: " She had [0-9]+ (shells|apples)\\.",
  },
};

/** Have the field follow the kind of form; a kind begins with an example. */
export function watchForms() {
  const rules = {};
  let kind = "";
  $("form-kind").addEventListener("change", () => {
    rules[kind] = $("form-rule").value;
    kind = $("form-kind").value;
    $("form-rule-field").hidden = !kind;
    if (!kind) return;
    const { label, hint, example } = KINDS[kind];
    $("form-rule-label").textContent = label;
    $("form-hint").textContent = hint;
    $("form-rule").value = rules[kind] ?? example;
  });
}

/** The settings that ask for the form, in a conversation or in a text; throws `Wrong`. */
export function formOf(chat) {
  const [kind, rule] = [$("form-kind").value, $("form-rule").value];
  if (!kind) return {};
  if (kind === "regex") return { regex: rule };
  if (kind === "choice") return { choice: rule.split("\n").filter(Boolean) };
  const schema = parsed(rule);
  if (!chat) return { json_schema: schema };
  return { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } };
}

function parsed(rule) {
  try {
    return JSON.parse(rule);
  } catch (error) {
    throw new Wrong("json_schema", `This is not JSON: ${error.message}.`);
  }
}
