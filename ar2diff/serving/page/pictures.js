// Pictures of a conversation: those that go with the next message, and how they are shown. They are
// drawn on canvases, since the page loads nothing but its own files.

import { $, element, say } from "./elements.js";

const WIDEST = 2048; // pixels of a side; a larger picture is made smaller
const HEAVIEST = 2e6; // bytes of a file that is sent as it is
const SENT = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const DATA = /^data:image\/[\w.+-]+;base64,([A-Za-z0-9+/]*={0,2})$/;

/** Whether a text is a picture that can be shown. */
export const isPicture = (url) => DATA.test(url);

/** The pictures of the next message. */
export class Pictures {
  constructor() {
    this.held = []; // { url, name }
    $("attach").addEventListener("click", () => $("picture").click());
    $("picture").addEventListener("change", async () => {
      await this.add($("picture").files);
      $("picture").value = "";
    });
    document.addEventListener("paste", (event) => {
      if (this.takes(event.clipboardData.files)) event.preventDefault();
    });
  }

  /** Take files if they are pictures and this is the place for them; returns whether it is so. */
  takes(files) {
    const some = [...files].filter(({ type }) => type.startsWith("image/"));
    if (!some.length || $("pictures-field").hidden) return false;
    this.add(some);
    return true;
  }

  /** Take files, and say which of them are no pictures. */
  async add(files) {
    say($("picture-problem"), "");
    for (const file of files) {
      try {
        this.held.push({ url: await urlOf(file), name: file.name || "pasted picture" });
      } catch {
        say($("picture-problem"), `${file.name} is no picture that this browser can read.`);
      }
    }
    this.show();
  }

  /** Forget them. */
  clear() {
    this.held = [];
    say($("picture-problem"), "");
    this.show();
  }

  /** Show them beside the message. */
  show() {
    const items = this.held.map((picture) => {
      const remove = element("button", { type: "button", ariaLabel: `Remove ${picture.name}` }, "×");
      remove.addEventListener("click", () => {
        this.held = this.held.filter((other) => other !== picture);
        this.show();
        $("attach").focus();
      });
      return element("li", {}, drawn(picture.url, picture.name), remove);
    });
    $("pictures").replaceChildren(...items);
    $("pictures").hidden = !items.length;
  }

  /** The content of a message: a text, with the pictures before it if there are any. */
  content(text) {
    if (!this.held.length) return text;
    const parts = this.held.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    return [...parts, { type: "text", text }];
  }
}

/** What shows the content of a message. */
export function shown(content) {
  if (typeof content === "string") return [content];
  let count = 0;
  return content.map((part) =>
    part.type === "text" ? part.text : drawn(part.image_url.url, `Picture ${++count} of the message`),
  );
}

/** A canvas with a picture. */
function drawn(url, name) {
  const canvas = element("canvas", { className: "picture", role: "img", ariaLabel: name, width: 1, height: 1 });
  paint(canvas, url).catch(() => canvas.setAttribute("aria-label", `${name}, which cannot be shown`));
  return canvas;
}

async function paint(canvas, url) {
  const bytes = Uint8Array.from(atob(DATA.exec(url)[1]), (character) => character.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes]));
  draw(canvas, bitmap, Math.min(1, 640 / Math.max(bitmap.width, bitmap.height)));
}

function draw(canvas, bitmap, scale) {
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

/** A file as a data URI, made smaller if it is large. */
async function urlOf(file) {
  const bitmap = await createImageBitmap(file);
  const scale = WIDEST / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && file.size <= HEAVIEST && SENT.includes(file.type)) return read(file);
  const canvas = new OffscreenCanvas(1, 1);
  draw(canvas, bitmap, Math.min(1, scale));
  return read(await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 }));
}

function read(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
