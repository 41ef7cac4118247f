// The playground: a chat, and a photo over which masks appear while the model writes them.
//
// What a model says is untrusted: it reaches the page as text nodes and pixels, never as markup, and every list it can
// lengthen has an end. Nothing is kept after the tab is closed; the API key lies in sessionStorage and nowhere else.

const KEY = "vllm-relay.api-key";
const BACKGROUND = "others";
const MOST_ENTRIES = 100; // masks shown; a descriptor may name thousands
const LARGEST_SIDE = 960; // pixels the photo is shown with
const LARGEST_FILE = 64 * 1024 * 1024; // bytes the server reads
const LARGEST_SAVED_SIDE = 8192; // pixels of the picture that can be downloaded
const ROWS_AT_ONCE = 256; // of a mask that is larger than the canvas
const METRICS_PATIENCE = 10_000; // milliseconds

// Okabe and Ito's colours, which people with any kind of colour vision tell apart, without black.
export const PALETTE = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];

const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const { className, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------- talking to the server

/** What went wrong, in words for a person; `mayRetry` where the same request may work later. */
class Problem extends Error {
  constructor(message, { mayRetry = false } = {}) {
    super(message);
    this.mayRetry = mayRetry;
  }
}

/** Where the key is kept: in the tab, or in this page where the browser lets no site keep anything. */
const keys = {
  value: null,
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? this.value;
    } catch {
      return this.value;
    }
  },
  set(value) {
    this.value = value;
    try {
      if (value === null) sessionStorage.removeItem(KEY);
      else sessionStorage.setItem(KEY, value);
    } catch {
      // it is in `value`
    }
  },
};

let asking = null; // the one open question for a key

async function call(path, options = {}) {
  for (;;) {
    const key = keys.get();
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...options.headers, ...authorization(key) } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached. Is it still running?", { mayRetry: true });
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await problemOf(response);
    if (keys.get() !== key) continue; // another request has brought a key since
    asking ??= askForKey(key !== null).finally(() => (asking = null));
    if (!(await asking)) throw new Problem("This server answers only with an API key.", { mayRetry: true });
  }
}

function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function problemOf(response) {
  const body = await response.text().catch(() => "");
  const said = messageIn(body);
  switch (response.status) {
    case 404:
      return new Problem(said || "The server does not know this model or address.");
    case 413:
      return new Problem(`That is too large for the server. ${said}`.trim());
    case 429:
    case 503: {
      const seconds = Number(response.headers.get("Retry-After"));
      const when = seconds > 0 ? ` Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.` : "";
      return new Problem(`The server is busy.${when}`, { mayRetry: true });
    }
  }
  if (/context length|maximum context|max_model_len/i.test(said)) {
    return new Problem(`That is longer than this model can read: shorten it, or start a new conversation. ${said}`);
  }
  if (response.status >= 500) {
    return new Problem(`The server had a problem (${response.status}). ${said}`.trim(), { mayRetry: true });
  }
  return new Problem(said || `The server refused this (${response.status}).`);
}

/** The message in an error body, whichever of the server's shapes it has. */
function messageIn(body) {
  let value;
  try {
    value = JSON.parse(body);
  } catch {
    return "";
  }
  const error = value?.error ?? value?.detail ?? value?.message;
  const message = typeof error === "string" ? error : error?.message;
  return typeof message === "string" ? message.slice(0, 1000) : "";
}

/** The values of a stream of server-sent events, up to its `[DONE]`. Pieces may end inside a character. */
export async function* serverEvents(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      text += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (!data.length) continue;
        if (data[0] === "[DONE]") return;
        const event = JSON.parse(data.join("\n"));
        if (event.error) throw new Problem(messageIn(JSON.stringify(event)) || "The server gave up on the answer.", { mayRetry: true });
        yield event;
      }
      if (done) throw new Problem("The connection broke off before the answer was finished.", { mayRetry: true });
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The connection broke off before the answer was finished.", { mayRetry: true });
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---------------------------------------------------------------- the API key

function askForKey(wasRefused) {
  const dialog = $("key");
  $("key-text").textContent = wasRefused ? "The server did not accept the key." : "This server answers only with a key.";
  return openKeyDialog(dialog);
}

function openKeyDialog(dialog) {
  $("key-value").value = "";
  $("key-error").hidden = true;
  $("key-forget").hidden = keys.get() === null;
  if (!dialog.open) {
    dialog.returnValue = "";
    dialog.showModal();
  }
  $("key-value").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "used"), { once: true });
  });
}

function useKey() {
  const key = $("key-value").value.trim();
  const isPrintable = /^[\x21-\x7e]+$/.test(key);
  $("key-error").hidden = isPrintable;
  if (!isPrintable) {
    $("key-error").textContent = key ? "A key has only plain letters, digits and signs." : "Type or paste the key first.";
    $("key-value").focus();
    return;
  }
  keys.set(key);
  $("key").close("used");
}

// ---------------------------------------------------------------- which model this is

const server = { model: null, grid: null };

async function connect() {
  if (document.activeElement === $("reconnect")) $("message").focus();
  $("reconnect").hidden = true;
  $("server").textContent = "Asking the server what it serves…";
  try {
    const facts = await (await call("playground/server.json")).json();
    server.grid = facts.segmentation;
    showWhatItCan();
    const models = (await (await call("v1/models")).json()).data.map((model) => String(model.id));
    showModels(models);
  } catch (error) {
    server.model = null;
    $("server").textContent = error.message;
    $("reconnect").hidden = false;
  }
}

function showWhatItCan() {
  const segments = server.grid !== null;
  document.body.classList.toggle("text-only", !segments);
  $("picture").hidden = !segments;
  $("no-picture").hidden = segments;
  showPhotoChoice();
}

function showModels(models) {
  const { grid } = server;
  const select = $("models");
  if (!models.includes(server.model)) server.model = models[0] ?? null;
  select.replaceChildren(...models.map((id) => make("option", { value: id, textContent: id, selected: id === server.model })));
  select.hidden = models.length < 2;
  const does = grid ? `chats, and finds things in photos on a grid of ${grid.rows} by ${grid.columns}` : "chats, with text only";
  $("server").replaceChildren(make("bdi", { textContent: server.model ?? "No model" }), ` ${does}`);
}

// ---------------------------------------------------------------- the photo

const photo = { file: null, name: "", width: 0, height: 0, url: null };
let photosTaken = 0; // the newest one counts, whichever is decoded first

async function takePhoto(file) {
  if (!file) return;
  if (!server.grid) {
    showError("no-picture-error", new Problem("This photo was sent nowhere: the model served here cannot see it."));
    return;
  }
  clearError("picture-error");
  if (file.size > LARGEST_FILE) {
    showError("picture-error", new Problem("That file is larger than 64 MiB, more than the server reads."));
    return;
  }
  photosTaken += 1;
  const number = photosTaken;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright, as the server will see it
  } catch {
    if (number === photosTaken) showError("picture-error", new Problem("That file cannot be shown as a picture here. JPEG, PNG and WebP can."));
    return;
  }
  if (number !== photosTaken) {
    bitmap.close();
    return;
  }
  stopFinding();
  const scale = Math.min(3, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  for (const canvas of [$("photo"), $("overlay")]) {
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  }
  const context = $("photo").getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, $("photo").width, $("photo").height);
  Object.assign(photo, { file, name: file.name || "photo.png", width: bitmap.width, height: bitmap.height, url: null });
  bitmap.close();
  $("photo").setAttribute("aria-label", `The photo ${photo.name}, ${photo.width} by ${photo.height} pixels`);
  const hadFocus = document.activeElement === $("choose");
  $("choose").hidden = true;
  $("stage").hidden = $("another").hidden = false;
  resetMasks();
  showPhotoChoice();
  say("progress", `${photo.name}, ${photo.width} by ${photo.height} pixels. Say what to find in it.`);
  if (hadFocus || document.activeElement === document.body) $("expressions").focus();
}

function showPhotoChoice() {
  $("show-photo").hidden = !(server.grid && photo.file);
}

/** Raises a Problem where the file has changed or gone since it was chosen: a request with it would only fail. */
async function checkPhoto() {
  try {
    await photo.file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Problem("The photo cannot be read any more. Choose it again.");
  }
}

function photoAsUrl() {
  photo.url ??= new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem("The photo cannot be read any more. Choose it again."));
    reader.readAsDataURL(photo.file);
  });
  return photo.url;
}

const imageIn = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? transfer?.files?.[0];

// ---------------------------------------------------------------- masks

/*
 * An entry is one label that was asked for, or found. Until its result is here it is painted from the rows of its grid
 * (`cells`); then from its mask (`inside` of the rectangle left, top, width, height, in pixels of the canvas).
 */
let entries = [];
let active = null;
let coco = null;
let drawing = 0; // which search or answer the masks are of; whoever draws for another one is too late
let unshown = 0; // masks beyond MOST_ENTRIES

function addEntry(query, label) {
  const number = entries.length + 1;
  const entry = {
    query, label, number, colour: PALETTE[(number - 1) % PALETTE.length], pattern: Math.floor((number - 1) / PALETTE.length),
    cells: null, rows: 0, mask: null, png: null, isShown: true, facts: "waiting", element: null,
  };
  entries.push(entry);
  entry.element = entryElement(entry);
  $("results").append(entry.element.item);
  return entry;
}

function entryElement(entry) {
  const box = make("input", { type: "checkbox", checked: true, id: `mask-${entry.number}` });
  const swatch = make("span", { className: "swatch", textContent: entry.number });
  swatch.style.background = entry.colour;
  swatch.style.color = inkOn(entry.colour);
  const name = make("bdi", { textContent: entry.label ?? "everything" });
  const facts = make("span", { className: "facts", id: `facts-${entry.number}`, textContent: entry.facts });
  const bar = make("i");
  const meter = make("span", { className: "meter" }, bar);
  meter.setAttribute("aria-hidden", "true");
  const save = make("button", { type: "button", textContent: "PNG", hidden: true });
  save.setAttribute("aria-label", `Download the mask of ${entry.label ?? "everything"} as PNG`);
  box.setAttribute("aria-describedby", facts.id);
  const label = make("label", { htmlFor: box.id }, box, make("span", { className: "name" }, swatch, name));
  const item = make("li", { className: "result" }, label, save, facts, meter);
  box.addEventListener("change", () => {
    entry.isShown = box.checked;
    paint();
  });
  item.addEventListener("pointerenter", () => activate(entry));
  item.addEventListener("pointerleave", () => activate(null));
  item.addEventListener("focusin", () => activate(entry));
  item.addEventListener("focusout", () => activate(null));
  save.addEventListener("click", () => saveAs(entry.png, `${stem(photo.name)}-${stem(entry.label ?? "mask")}.png`));
  return { item, facts, bar, meter, save, box };
}

function tell(entry, facts) {
  entry.facts = facts;
  entry.element.facts.textContent = facts;
  if (entry === active) showCaption();
}

/** Begin anew; what comes back is the number of the new drawing. */
function resetMasks() {
  entries = [];
  active = null;
  coco = null;
  unshown = 0;
  drawing += 1;
  say("progress", "");
  $("results").replaceChildren();
  $("downloads").hidden = true;
  showCaption();
  paint();
  return drawing;
}

/** What has no mask yet will get none. */
function endOpen(factsFor) {
  for (const entry of entries) {
    if (entry.isDone) continue;
    entry.isDone = true;
    entry.element.meter.hidden = true;
    tell(entry, factsFor(entry));
  }
  $("downloads").hidden = !entries.some((entry) => entry.mask);
  $("save-coco").hidden = coco === null;
  paint();
}

function activate(entry) {
  if (active === entry) return;
  active?.element.item.classList.remove("active");
  active = entry;
  active?.element.item.classList.add("active");
  showCaption();
  paint();
}

function showCaption() {
  const caption = $("caption");
  caption.hidden = !active;
  if (active) caption.replaceChildren(`${active.number} `, make("bdi", { textContent: active.label ?? "everything" }), ` — ${active.facts}`);
}

/** A row of a grid, painted before its mask is there. */
function addRow(query, event) {
  const { rows, columns } = server.grid;
  let column = 0;
  for (const { label, count } of event.runs) {
    if (label !== BACKGROUND && event.row < rows) {
      const entry = entryOf(query, label);
      if (entry) {
        entry.cells ??= new Uint8Array(rows * columns);
        entry.cells.fill(1, event.row * columns + column, event.row * columns + Math.min(columns, column + count));
      }
    }
    column = Math.min(columns, column + count);
  }
  for (const entry of entries) {
    if (entry.query !== query.index || entry.mask || entry.isDone) continue;
    entry.rows = event.row + 1;
    entry.element.bar.style.width = `${(100 * entry.rows) / rows}%`;
    tell(entry, `row ${entry.rows} of ${rows}`);
  }
  paint();
}

/** The entry of a label: the one expression of its query, or a new one where the model names what it finds. */
function entryOf(query, label) {
  const known = entries.find((entry) => entry.query === query.index && (query.isOne || entry.label === label));
  return known ?? (entries.length < MOST_ENTRIES ? addEntry(query.index, label) : null);
}

async function addResult(query, result, isCurrent) {
  const label = result.label ?? result.expression ?? null;
  if (result.label === null && !query.isOne) {
    const entry = addEntry(query.index, null);
    Object.assign(entry, { isDone: true });
    entry.element.meter.hidden = true;
    tell(entry, factsOf(result));
    return;
  }
  const entry = entryOf(query, label);
  if (!entry) {
    unshown += 1;
    return;
  }
  const png = result.mask?.png ? bytesOf(result.mask.png) : null;
  const mask = png && !result.empty ? await maskOf(png) : null;
  if (!isCurrent()) return;
  Object.assign(entry, { png, mask, cells: null, isDone: true, isFound: png !== null && !result.empty });
  tell(entry, factsOf(result));
  entry.element.meter.hidden = true;
  entry.element.save.hidden = !png || result.empty;
  paint();
}

const STATUS = {
  complete: "complete",
  repaired: "repaired",
  truncated: "truncated: the answer was cut short",
  malformed: "malformed: the answer could not be read",
  none: "none: the answer holds no mask",
};

const REFINED = {
  failed: "refining failed, so this is the coarse mask",
  kept: "the refined outline did not fit, so this is the coarse mask",
  skipped: "",
};

function factsOf(result) {
  if (result.status === "error") return `error: ${result.error?.message ?? "it could not be asked"}`;
  const parts = [STATUS[result.status] ?? String(result.status)];
  if (result.repairs?.length) parts.push(result.repairs.slice(0, 8).join(", ").replaceAll("_", " "));
  if (result.forced) parts.push("asked to go on");
  if (result.refiner) parts.push(REFINED[result.refiner] ?? `outline refined by ${result.refiner}`);
  if (result.empty) {
    parts.push("nothing found");
    if (result.status === "none" && result.answer) parts.push(`it said: ${result.answer.slice(0, 300)}`);
  } else {
    const share = (100 * result.area) / (photo.width * photo.height);
    parts.push(`${share < 0.1 ? "under 0.1" : share.toFixed(1)} % of the photo, ${result.area.toLocaleString("en")} pixels`);
  }
  parts.push(...(result.warnings ?? []).slice(0, 3).map((warning) => String(warning).slice(0, 300)));
  return parts.filter(Boolean).join(" · ");
}

function bytesOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}

/** [height, width] of the canvas: which of its pixels a mask covers, be it by one of many pixels of its own. */
function coveredBy(bitmap, width, height) {
  const covered = new Uint8Array(width * height);
  const rows = Math.min(ROWS_AT_ONCE, bitmap.height);
  const band = new OffscreenCanvas(bitmap.width, rows).getContext("2d", { willReadFrequently: true });
  for (let from = 0; from < bitmap.height; from += rows) {
    band.clearRect(0, 0, bitmap.width, rows);
    band.drawImage(bitmap, 0, -from);
    const until = Math.min(rows, bitmap.height - from);
    const { data } = band.getImageData(0, 0, bitmap.width, until);
    for (let y = 0, i = 0; y < until; y += 1) {
      const [top, bottom] = spanOf(from + y, bitmap.height, height);
      for (let x = 0; x < bitmap.width; x += 1, i += 4) {
        if (data[i] < 128) continue;
        const [left, right] = spanOf(x, bitmap.width, width);
        for (let row = top; row < bottom; row += 1) covered.fill(1, row * width + left, row * width + right);
      }
    }
  }
  return covered;
}

/** Where pixel ``i`` of ``count`` lies among ``size``: at least one of them. */
function spanOf(i, count, size) {
  const first = Math.floor((i * size) / count);
  return [first, Math.max(first + 1, Math.floor(((i + 1) * size) / count))];
}

/** A mask at the size of the canvas, cropped to what is inside; null where nothing is. */
async function maskOf(png) {
  const { width, height } = $("overlay");
  const bitmap = await createImageBitmap(png);
  const covered = coveredBy(bitmap, width, height);
  bitmap.close();
  let left = width, right = -1, top = height, bottom = -1;
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      if (!covered[i]) continue;
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      bottom = y;
    }
  }
  if (right < 0) return null;
  const mask = { left, top, width: right - left + 1, height: bottom - top + 1, area: 0, image: null, badge: null };
  mask.inside = new Uint8Array(mask.width * mask.height);
  for (let y = 0, i = 0; y < mask.height; y += 1) {
    for (let x = 0; x < mask.width; x += 1, i += 1) {
      mask.inside[i] = covered[(y + top) * width + x + left];
      mask.area += mask.inside[i];
    }
  }
  mask.badge = badgeOf(mask);
  return mask;
}

/** The pixel of a mask nearest to its centre of mass, which itself may lie outside. */
function badgeOf({ inside, width, left, top, area }) {
  let sumX = 0, sumY = 0;
  for (let i = 0; i < inside.length; i += 1) {
    if (!inside[i]) continue;
    sumX += i % width;
    sumY += Math.floor(i / width);
  }
  let best = 0, least = Infinity;
  for (let i = 0; i < inside.length; i += 1) {
    if (!inside[i]) continue;
    const distance = (i % width - sumX / area) ** 2 + (Math.floor(i / width) - sumY / area) ** 2;
    if (distance >= least) continue;
    best = i;
    least = distance;
  }
  return { x: left + (best % width), y: top + Math.floor(best / width) };
}

/** The mask in its colour: a veil, a firm edge, and stripes once the colours begin again. */
function imageOf(entry) {
  const { mask } = entry;
  if (mask.image) return mask.image;
  const { inside, width, height } = mask;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const [red, green, blue] = rgbOf(entry.colour);
  const inColour = (alpha) => new Uint32Array(new Uint8Array([red, green, blue, alpha]).buffer)[0];
  const [veil, stripe, firm] = [inColour(120), inColour(200), inColour(255)];
  const edge = Math.max(2, Math.round($("overlay").width / 400));
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      if (!inside[i]) continue;
      const isDeep =
        x >= edge && y >= edge && x < width - edge && y < height - edge &&
        inside[i - edge] && inside[i + edge] && inside[i - edge * width] && inside[i + edge * width];
      const isStripe = entry.pattern > 0 && (x + (entry.pattern % 2 ? y : height - y)) % 14 < 5;
      pixels[i] = !isDeep ? firm : isStripe ? stripe : veil;
    }
  }
  context.putImageData(image, 0, 0);
  mask.image = canvas;
  return canvas;
}

const rgbOf = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

function inkOn(colour) {
  const [red, green, blue] = rgbOf(colour).map((value) => (value / 255) ** 2.2);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "#000000" : "#ffffff";
}

let paintIsDue = false;

function paint() {
  if (paintIsDue) return;
  paintIsDue = true;
  requestAnimationFrame(() => {
    paintIsDue = false;
    paintOver($("overlay").getContext("2d"), true);
  });
}

function paintOver(context, clear) {
  const { width, height } = context.canvas;
  if (clear) context.clearRect(0, 0, width, height);
  const ordered = entries.filter((entry) => entry.isShown && entry !== active);
  if (active?.isShown) ordered.push(active);
  for (const entry of ordered) {
    context.globalAlpha = active && entry !== active ? 0.3 : 1;
    if (entry.mask) context.drawImage(imageOf(entry), entry.mask.left, entry.mask.top);
    else if (entry.cells) paintCells(context, entry, width, height);
  }
  for (const entry of ordered) {
    context.globalAlpha = active && entry !== active ? 0.3 : 1;
    if (entry.mask) paintBadge(context, entry, entry.mask.badge);
  }
  context.globalAlpha = 1;
}

function paintCells(context, entry, width, height) {
  const { rows, columns } = server.grid;
  const [red, green, blue] = rgbOf(entry.colour);
  context.fillStyle = `rgb(${red} ${green} ${blue} / 0.55)`;
  entry.cells.forEach((is, i) => {
    if (!is) return;
    const [x, y] = [i % columns, Math.floor(i / columns)];
    const [left, top] = [Math.round((x * width) / columns), Math.round((y * height) / rows)];
    context.fillRect(left, top, Math.round(((x + 1) * width) / columns) - left, Math.round(((y + 1) * height) / rows) - top);
  });
  if (!entry.isDone) {
    context.fillStyle = entry.colour;
    context.fillRect(0, Math.round((entry.rows * height) / rows) - 2, width, 3);
  }
}

function paintBadge(context, entry, { x, y }) {
  const shownWidth = $("overlay").clientWidth || context.canvas.width;
  const radius = (12 * context.canvas.width) / shownWidth; // 12 pixels of the screen
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = entry.colour;
  context.fill();
  context.lineWidth = Math.max(1.5, radius / 8);
  context.strokeStyle = inkOn(entry.colour);
  context.stroke();
  context.fillStyle = inkOn(entry.colour);
  context.font = `bold ${Math.round(radius * 1.15)}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(String(entry.number), x, y + radius * 0.06);
}

/** The smallest shown mask under the pointer. */
function entryAt(event) {
  const canvas = $("overlay");
  const frame = canvas.getBoundingClientRect();
  const x = Math.floor(((event.clientX - frame.left) * canvas.width) / frame.width);
  const y = Math.floor(((event.clientY - frame.top) * canvas.height) / frame.height);
  const isUnder = ({ isShown, mask }) =>
    isShown && mask && x >= mask.left && y >= mask.top && x < mask.left + mask.width && y < mask.top + mask.height &&
    mask.inside[(y - mask.top) * mask.width + x - mask.left];
  return entries.filter(isUnder).sort((a, b) => a.mask.area - b.mask.area)[0] ?? null;
}

// ---------------------------------------------------------------- asking what is where

const find = { controller: null };

/** Several expressions, each on a line of its own or after a comma; each once. */
export function expressionsIn(text) {
  return [...new Set(text.split(/[,，、\n]/).map((part) => part.trim().replace(/\s+/g, " ")).filter(Boolean))];
}

/** Leave a search that runs; what it still says is not heard. */
function stopFinding() {
  find.controller?.abort();
  find.controller = null;
  setBusy("find", false);
}

async function ask({ everything = false } = {}) {
  clearError("picture-error");
  if (!photo.file) {
    showError("picture-error", new Problem("Choose a photo first."));
    $("choose").focus();
    return;
  }
  const expressions = everything ? [] : expressionsIn($("expressions").value);
  const isEverything = everything || (expressions.length === 1 && expressions[0].toLowerCase() === "everything");
  if (!isEverything && !expressions.length) {
    showError("picture-error", new Problem("Say what to find first, or press Find everything."));
    $("expressions").focus();
    return;
  }
  stopFinding();
  const controller = (find.controller = new AbortController());
  const mine = resetMasks();
  const isCurrent = () => find.controller === controller && drawing === mine;
  if (!isEverything) expressions.slice(0, MOST_ENTRIES).forEach((expression, index) => addEntry(index, expression));
  setBusy("find", true);
  say("progress", isEverything ? "Looking for everything…" : `Looking for ${expressions.join(", ")}…`);
  try {
    await checkPhoto();
    const body = new FormData();
    body.append("image", photo.file, "image");
    if (isEverything) body.append("everything", "true");
    for (const expression of expressions) if (!isEverything) body.append("expressions", expression);
    for (const [name, value] of Object.entries({ model: server.model, stream: true, mask_format: "png", coco: true })) {
      if (value !== null) body.append(name, String(value));
    }
    const response = await call("v1/segmentations", { method: "POST", body, signal: controller.signal });
    await follow(response, (index) => ({ index, isOne: !isEverything }), isCurrent);
  } catch (error) {
    if (isCurrent()) endUnfinished(error, () => ask({ everything }));
  } finally {
    if (find.controller === controller) {
      find.controller = null;
      setBusy("find", false);
    }
  }
}

async function follow(response, queryOf, isCurrent) {
  for await (const event of serverEvents(response)) {
    if (!isCurrent()) return;
    if (event.object === "segmentation.row") addRow(queryOf(event.query_index), event);
    else if (event.object === "segmentation.results") {
      for (const result of event.results) await addResult(queryOf(result.query_index), result, isCurrent);
    } else if (event.object === "segmentation.completed") {
      coco = event.coco;
      showFound(` in ${(event.timings.total_ms / 1000).toFixed(1)} s`);
    }
  }
}

function showFound(after) {
  endOpen(() => "no mask came");
  const found = entries.filter((entry) => entry.isFound).length;
  const more = unshown ? ` ${unshown} more are not shown.` : "";
  say("progress", `${found === 0 ? "No mask" : found === 1 ? "One mask" : `${found} masks`}${after}.${more}`);
}

function endUnfinished(error, retry) {
  const isStopped = error.name === "AbortError";
  endOpen((entry) => (entry.rows ? `stopped after row ${entry.rows}` : isStopped ? "stopped" : "not answered"));
  say("progress", isStopped ? "Stopped." : "");
  if (!isStopped) showError("picture-error", error, retry);
}

/** The photo in its own size, as far as a canvas goes, under the masks as they are shown. */
async function savePicture() {
  clearError("picture-error");
  const name = `${stem(photo.name)}-masks.png`;
  const veil = new OffscreenCanvas($("overlay").width, $("overlay").height);
  paintOver(veil.getContext("2d"), false);
  try {
    const bitmap = await createImageBitmap(photo.file);
    const scale = Math.min(1, LARGEST_SAVED_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale) || 1, Math.round(bitmap.height * scale) || 1);
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    context.drawImage(veil, 0, 0, canvas.width, canvas.height);
    saveAs(await canvas.convertToBlob({ type: "image/png" }), name);
  } catch {
    showError("picture-error", new Problem("The photo cannot be read any more. Choose it again."));
  }
}

function saveCoco() {
  const named = structuredClone(coco);
  for (const image of named.images ?? []) image.file_name = photo.name;
  saveAs(new Blob([JSON.stringify(named, null, 1)], { type: "application/json" }), `${stem(photo.name)}-coco.json`);
}

function saveAs(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Of a file's name or a label: what every file system takes. */
const stem = (name) => name.replace(/\.[a-z0-9]{1,5}$/i, "").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "untitled";

// ---------------------------------------------------------------- the chat

let turns = []; // { role, text, photo: data URL or null, file: of the photo, isSent }
const chat = { controller: null };

async function sendMessage() {
  const text = $("message").value.trim();
  if (!text || chat.controller) return;
  const controller = (chat.controller = new AbortController());
  const wantsPhoto = !$("show-photo").hidden && $("with-photo").checked;
  const turn = { role: "user", text, photo: null, file: wantsPhoto ? photo.file : null, isSent: true };
  $("message").value = "";
  turns.push(turn);
  showTurn(turn, wantsPhoto ? "with the photo" : "");
  try {
    if (wantsPhoto) turn.photo = await photoAsUrl();
  } catch (error) {
    if (chat.controller !== controller) return;
    chat.controller = null;
    failTurn(turn, error);
    return;
  }
  if (chat.controller === controller) await answer(turn, controller);
}

async function answer(asked, controller) {
  const isCurrent = () => chat.controller === controller;
  const newest = newestPhoto();
  const aboutPhoto = newest && newest.file === photo.file ? masksOfChat(newest.file, isCurrent) : null;
  const turn = { role: "assistant", text: "", thoughts: "", photo: null, isSent: true, isDrawn: false };
  const shown = showTurn(turn, "");
  shown.setAttribute("aria-busy", "true");
  setBusy("chat", true);
  say("chat-status", "The model is answering.");
  try {
    const body = { model: server.model, messages: messagesOf(turns), stream: true };
    if (newest) body.segmentation = { mask_format: "png" };
    const headers = { "Content-Type": "application/json" };
    const response = await call("v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(body), signal: controller.signal,
    });
    let ending = null;
    for await (const event of serverEvents(response)) {
      const choice = event.choices?.[0];
      if (!choice) continue;
      const thoughts = choice.delta?.reasoning ?? choice.delta?.reasoning_content;
      if (choice.delta?.content || thoughts) {
        turn.text += choice.delta.content ?? "";
        turn.thoughts += thoughts ?? "";
        showText(shown, turn);
      }
      if (choice.delta?.segmentation && aboutPhoto) {
        await aboutPhoto.show(choice.delta.segmentation);
        turn.isDrawn = aboutPhoto.isDrawn;
        showText(shown, turn);
      }
      ending = choice.finish_reason ?? ending;
    }
    if (ending === "length") note(shown, "Cut here: the model's context is full.");
    if (!turn.text) note(shown, "The model said nothing.");
    aboutPhoto?.end(() => "no mask came");
    say("chat-status", "The answer is complete.");
  } catch (error) {
    if (!isCurrent()) return;
    aboutPhoto?.end((entry) => (entry.rows ? `stopped after row ${entry.rows}` : "stopped"));
    if (error.name === "AbortError") {
      note(shown, "Stopped.");
      say("chat-status", "Stopped.");
    } else if (turn.text) {
      note(shown, error.message);
      say("chat-status", error.message);
    } else {
      say("chat-status", "");
      shown.remove();
      failTurn(asked, error);
      return;
    }
  } finally {
    if (isCurrent()) {
      flushText();
      shown.removeAttribute("aria-busy");
      chat.controller = null;
      setBusy("chat", false);
    }
  }
  if (turn.text) turns.push(turn);
  else asked.isSent = false; // no two questions in a row, which some templates refuse
}

function failTurn(turn, error) {
  turn.isSent = false;
  const retry = () => {
    $("message").focus();
    box.remove();
    turn.isSent = true;
    answer(turn, (chat.controller = new AbortController()));
  };
  const isLast = () => turns.at(-1) === turn && !chat.controller;
  const box = make("div", { className: "error" }, error.message);
  box.setAttribute("role", "alert");
  if (error.mayRetry) box.append(make("br"), make("button", { type: "button", textContent: "Try again", onclick: () => isLast() && retry() }));
  turn.shown.append(box);
  scrollToEnd(true);
}

const newestPhoto = () => turns.findLast((turn) => turn.isSent && turn.photo);

/** What the model is sent: every turn that was answered, and only the newest photo. */
function messagesOf(all) {
  const sent = all.filter((turn) => turn.isSent);
  const newest = newestPhoto();
  return sent.map((turn) => ({
    role: turn.role,
    content: turn !== newest ? turn.text : [{ type: "image_url", image_url: { url: turn.photo } }, { type: "text", text: turn.text }],
  }));
}

/** Masks in an answer are painted over the photo of ``file``, while they are written and after, unless a search has
 * begun, or another photo was taken: then they stay in the answer alone. */
function masksOfChat(file, isCurrentAnswer) {
  let mine = null; // the drawing that they are
  let isLate = false;
  const isCurrent = () => isCurrentAnswer() && !isLate && photo.file === file && drawing === mine;
  const begin = () => {
    if (mine !== null) return;
    isLate = find.controller !== null || photo.file !== file;
    mine = isLate ? drawing : resetMasks();
  };
  return {
    get isDrawn() {
      return mine !== null && !isLate;
    },
    async show(segmentation) {
      begin();
      if (!isCurrent()) return;
      for (const row of segmentation.rows ?? []) addRow({ index: row.block, isOne: false }, row);
      for (const mask of segmentation.masks ?? []) await addResult({ index: mask.block, isOne: false }, mask, isCurrent);
      if (segmentation.masks && isCurrent()) showFound(" in the chat's answer");
    },
    end(factsFor) {
      if (mine !== null && isCurrent()) endOpen(factsFor);
    },
  };
}

function showTurn(turn, aside) {
  $("log").querySelector(".empty")?.remove();
  for (const button of $("log").querySelectorAll(".error button")) button.remove(); // only what was said last is asked again
  $("chat-new").hidden = false;
  const who = make("span", { className: "hidden", textContent: turn.role === "user" ? "You: " : "The model: " });
  const body = make("div", { className: "body" });
  const item = make("div", { className: `turn ${turn.role}` }, who, body);
  if (turn.role === "user") body.append(make("div", { className: "text", textContent: turn.text }));
  else body.append(make("div", { className: "text" }));
  if (aside) note(item, aside);
  turn.shown = item;
  $("log").append(item);
  scrollToEnd(true);
  return item;
}

let due = null; // the newest answer that is not yet shown

function showText(item, turn) {
  if (!due) requestAnimationFrame(flushText);
  due = { item, turn };
}

function flushText() {
  if (!due) return;
  const { item, turn } = due;
  due = null;
  const isOpen = item.querySelector("details")?.open ?? false;
  item.querySelector(".body").replaceChildren(...piecesOf(turn, isOpen));
  scrollToEnd(false);
}

/** An answer's text, with its thoughts and each descriptor folded away. */
function piecesOf(turn, isOpen) {
  const folded = (title, text) => make("details", { open: isOpen }, make("summary", { textContent: title }), make("pre", { textContent: text }));
  const pieces = turn.thoughts ? [folded("What it thought", turn.thoughts)] : [];
  for (const [index, part] of turn.text.split(/<seg>([\s\S]*?)(?:<\/seg>|$)/).entries()) {
    if (index % 2 === 0 && (part.trim() || !pieces.length)) pieces.push(make("div", { className: "text", textContent: part.trim() }));
    if (index % 2 === 1) pieces.push(folded(turn.isDrawn ? "A mask, drawn over the photo" : "A mask", part));
  }
  return pieces;
}

function note(item, text) {
  item.append(make("div", { className: "note", textContent: text }));
  scrollToEnd(false);
}

function scrollToEnd(always) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function startAnew() {
  chat.controller?.abort();
  chat.controller = null;
  due = null;
  turns = [];
  setBusy("chat", false);
  $("chat-new").hidden = true;
  $("log").replaceChildren(make("p", { className: "empty", textContent: "Say something to the model." }));
  $("message").focus();
}

// ---------------------------------------------------------------- relay's counters

/** Relay's counters in Prometheus's text, summed over engines; reasons of fallbacks apart. Null where there are none. */
export function countersIn(text) {
  const found = { fallbacks: {} };
  let isThere = false;
  for (const line of text.split("\n")) {
    const match = /^vllm_relay_(\w+)_total(\{.*\})? (\S+)$/.exec(line);
    if (!match) continue;
    isThere = true;
    const [, name, labels, value] = match;
    if (name === "fallbacks") {
      const reason = /reason="((?:[^"\\]|\\.)*)"/.exec(labels ?? "")?.[1] ?? "unknown";
      found.fallbacks[reason] = (found.fallbacks[reason] ?? 0) + Number(value);
    } else found[name] = (found[name] ?? 0) + Number(value);
  }
  return isThere ? found : null;
}

let metricsAnswered = true;

async function readCounters() {
  let response, text;
  try {
    const signal = AbortSignal.timeout(METRICS_PATIENCE);
    response = await fetch("metrics", { headers: authorization(keys.get()), cache: "no-store", signal });
    text = await response.text();
  } catch {
    hideCounters("The server does not answer.");
    metricsAnswered = false;
    return;
  }
  if (!metricsAnswered) connect();
  metricsAnswered = true;
  if (!response.ok) {
    hideCounters(`This server hides its counters: /metrics answers ${response.status}.`);
    return;
  }
  const counters = countersIn(text);
  if (counters) showCounters(counters);
  else hideCounters("This server shows counters, but none of relay's.");
}

function hideCounters(why) {
  $("counters-note").textContent = why;
  $("counters-list").replaceChildren();
}

function showCounters(counters) {
  const number = (name) => Math.round(counters[name] ?? 0).toLocaleString("en");
  const tiles = [
    ["Model steps", number("steps")],
    ["with a shared prefix", number("eligible_steps")],
    ["of them relayed", number("relay_steps")],
    ["Requests in groups, summed", number("grouped_requests")],
    ["Cached tokens not read again", number("kv_tokens_saved")],
    ["Memory reads saved", bytesInWords(counters.bytes_saved ?? 0)],
  ].map(([term, value]) => make("div", {}, make("dt", { textContent: term }), make("dd", { textContent: value })));
  const reasons = Object.entries(counters.fallbacks).filter(([, count]) => count > 0);
  if (reasons.length) {
    const told = reasons.map(([reason, count]) => `${reason.replaceAll("_", " ")} ${count.toLocaleString("en")}`).join(", ");
    tiles.push(make("div", { className: "wide" }, make("dt", { textContent: "Left to vLLM's own kernel" }), make("dd", { textContent: told })));
  }
  $("counters-note").textContent = "Since the server started.";
  $("counters-list").replaceChildren(...tiles);
}

function bytesInWords(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const power = bytes < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(bytes) / 10));
  return `${(bytes / 1024 ** power).toFixed(power && bytes / 1024 ** power < 100 ? 1 : 0)} ${units[power]}`;
}

async function watchCounters() {
  for (;;) {
    if (!document.hidden) await readCounters();
    const isBusy = find.controller || chat.controller;
    await new Promise((resolve) => setTimeout(resolve, isBusy ? 1000 : 3000));
  }
}

// ---------------------------------------------------------------- small things

function say(id, text) {
  $(id).textContent = text;
}

function showError(id, error, retry) {
  $(id).replaceChildren(error.message);
  const again = () => {
    $("expressions").focus();
    retry();
  };
  if (error.mayRetry && retry) $(id).append(make("br"), make("button", { type: "button", textContent: "Try again", onclick: again }));
  $(id).hidden = false;
}

function clearError(id) {
  $(id).hidden = true;
  $(id).replaceChildren();
}

/** The stop button stands where the asking one was, and focus follows. */
function setBusy(what, isBusy) {
  const [stop, ...starts] = what === "find" ? [$("find-stop"), $("find"), $("everything")] : [$("chat-stop"), $("send")];
  const hadFocus = (isBusy ? starts : [stop]).includes(document.activeElement);
  stop.hidden = !isBusy;
  for (const start of starts) start.hidden = isBusy;
  if (hadFocus) (isBusy ? stop : starts[0]).focus();
}

function submitOnEnter(area, form) {
  area.addEventListener("keydown", (event) => {
    const isComposing = event.isComposing || event.keyCode === 229; // the second is how Safari tells
    if (event.key !== "Enter" || event.shiftKey || isComposing) return;
    event.preventDefault();
    if (!event.repeat) form.requestSubmit();
  });
}

function onSubmit(form, act) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

function listen() {
  onSubmit($("ask"), () => ask());
  onSubmit($("say"), sendMessage);
  onSubmit($("key-form"), useKey);
  submitOnEnter($("expressions"), $("ask"));
  submitOnEnter($("message"), $("say"));

  $("everything").addEventListener("click", () => ask({ everything: true }));
  $("find-stop").addEventListener("click", () => find.controller?.abort());
  $("chat-stop").addEventListener("click", () => chat.controller?.abort());
  $("chat-new").addEventListener("click", startAnew);
  $("save-coco").addEventListener("click", saveCoco);
  $("save-picture").addEventListener("click", savePicture);
  $("reconnect").addEventListener("click", connect);
  $("models").addEventListener("change", () => {
    server.model = $("models").value;
    showModels([...$("models").options].map((option) => option.value));
  });

  for (const id of ["choose", "another"]) $(id).addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    const [file] = $("file").files;
    await takePhoto(file);
    $("file").value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    const file = imageIn(event.clipboardData);
    if (!file || event.clipboardData.types.includes("text/plain")) return;
    event.preventDefault();
    takePhoto(file);
  });
  for (const name of ["dragover", "drop", "dragleave"]) {
    document.addEventListener(name, (event) => {
      const isFile = event.dataTransfer?.types.includes("Files");
      if (isFile) event.preventDefault();
      document.body.classList.toggle("dragging", name === "dragover" && isFile);
      if (name === "drop" && isFile) takePhoto(imageIn(event.dataTransfer));
    });
  }
  $("overlay").addEventListener("pointermove", (event) => activate(entryAt(event)));
  $("overlay").addEventListener("pointerdown", (event) => activate(entryAt(event)));
  $("overlay").addEventListener("pointerleave", (event) => event.pointerType !== "touch" && activate(null));

  $("key-open").addEventListener("click", async () => {
    $("key-text").textContent = "For servers that answer only with a key.";
    if (await openKeyDialog($("key"))) connect();
  });
  $("key-cancel").addEventListener("click", () => $("key").close(""));
  $("key-forget").addEventListener("click", () => {
    keys.set(null);
    $("key").close("");
  });
}

listen();
connect();
watchCounters();
