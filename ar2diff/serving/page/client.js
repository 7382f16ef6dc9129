// The server's interface: models, and answers that arrive as server-sent events.

let key = ""; // of the server, in memory alone

/** Use an API key from now on. */
export function useKey(text) {
  key = text.trim();
}

/** An answer of the server that is not what was asked for. */
export class Refused extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    Object.assign(this, { status, param });
  }
}

/** The first model that the server has. */
export async function model() {
  const answer = await ask("/v1/models", {});
  const listed = await answer.json().catch(() => ({}));
  const first = listed.data?.[0];
  if (typeof first?.id !== "string") throw new Refused("The server names no model.");
  return { id: first.id, ...first.ar2diff };
}

/** The chunks of a streamed answer. */
export async function* chunks(path, body, signal) {
  const answer = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, drafts: true }),
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message ?? "The server gave up.", chunk.error);
    yield chunk;
  }
  throw new Refused("The connection ended before the answer did.");
}

async function ask(path, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  const later = answer.status === 429 && wait ? ` Try again in ${wait} s.` : "";
  const message = `${error?.message ?? `The server answered ${answer.status}.`}${later}`;
  throw new Refused(message, { status: answer.status, param: error?.param });
}

function broken(error) {
  throw error.name === "AbortError" ? error : new Refused("The connection to the server broke.");
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(broken);
      if (done) return;
      const parts = (rest + value.replaceAll("\r", "")).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
