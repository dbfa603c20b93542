"use strict";
// What one can do with codes: play them, find every place of one, hear its patches, count codebooks, compare two files.

let picked = null;
let other = null;
const MOST_PIECES = 60, MOST_TOLD = 12;

function ready() {
  const player = by("player");
  if (player.src.startsWith("blob:")) URL.revokeObjectURL(player.src);
  player.hidden = clip.duration_s === null;
  player.removeAttribute("src");
  if (!player.hidden) player.src = URL.createObjectURL(file);
  picked = null;
  by("places").textContent = "Click a code, or move to a position and press Enter on a codebook, to see every place of it.";
  by("hear").hidden = true;
  by("coarse").max = String(clip.codebooks);
  by("coarse").value = String(clip.codebooks);
  by("coarse-said").textContent = "";
  document.querySelectorAll("#layers .layer").forEach((layer, book) => {
    const canvas = layer.querySelector("canvas");
    canvas.tabIndex = 0;
    canvas.addEventListener("click", (event) => pick(book, positionAt(canvas, event)));
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Enter") pick(book, Number(by("scrub").value) * (shape().timed ? shape().perStep : 1));
    });
  });
  compare();
}

function cell(canvas, position) {
  const { steps, rest, perStep } = shape();
  const columns = rest.length === 2 ? rest[1] : 1;
  const inside = position % perStep;
  let row = Math.floor(inside / columns);
  if ("frequency" in clip.grid) row = canvas.height - 1 - row;
  return [Math.floor(position / perStep) * columns + inside % columns, row];
}

function positionAt(canvas, event) {
  const { timed, rest, perStep } = shape();
  const columns = rest.length === 2 ? rest[1] : 1;
  const x = Math.min(canvas.width - 1, Math.floor(event.offsetX / canvas.clientWidth * canvas.width));
  let y = Math.min(canvas.height - 1, Math.floor(event.offsetY / canvas.clientHeight * canvas.height));
  if ("frequency" in clip.grid) y = canvas.height - 1 - y;
  return timed ? Math.floor(x / columns) * perStep + y * columns + x % columns : y * columns + x;
}

function pick(book, position) {
  const code = clip.codes[book][position];
  const places = clip.codes[book].flatMap((found, at) => found === code ? [at] : []);
  picked = { book, code, places };
  document.querySelectorAll("#layers .layer").forEach((layer, index) => {
    layer.querySelector(".found")?.remove();
    if (index !== book) return;
    const below = layer.querySelector("canvas");
    const above = Object.assign(document.createElement("canvas"), { className: "found", width: below.width, height: below.height });
    const pen = above.getContext("2d");
    pen.fillStyle = "rgb(0 0 0 / 65%)";
    pen.fillRect(0, 0, above.width, above.height);
    for (const at of places) pen.clearRect(...cell(below, at), 1, 1);
    above.style.height = `${below.clientHeight}px`;
    layer.append(above);
  });
  const when = clip.duration_s === null ? [] : times(places).map(([from]) => from.toFixed(2));
  const told = when.slice(0, MOST_TOLD).join(", ") + (when.length > MOST_TOLD ? ` and ${when.length - MOST_TOLD} more` : "");
  by("places").textContent = `Code ${code} of codebook ${book + 1}: ${places.length} of ${clip.codes[book].length} places` +
    (when.length ? `, at seconds ${told}.` : ".");
  by("hear").hidden = clip.duration_s === null;
}

function times(places) {
  const { steps, perStep } = shape();
  const each = clip.duration_s / steps;
  return [...new Set(places.map((at) => Math.floor(at / perStep)))].map((step) => [step * each, (step + 1) * each]);
}

async function hear() {
  const context = new AudioContext();
  try {
    const sound = await context.decodeAudioData(await file.arrayBuffer());
    const pieces = times(picked.places).slice(0, MOST_PIECES);
    let at = context.currentTime + 0.05;
    for (const [from, to] of pieces) {
      const source = new AudioBufferSourceNode(context, { buffer: sound });
      source.connect(context.destination);
      source.start(at, from, to - from);
      at += to - from;
    }
    say(`Playing ${pieces.length} patches of code ${picked.code}.`);
    setTimeout(() => context.close(), 1000 * (at - context.currentTime) + 500);
  } catch (error) {
    say(`The browser cannot play this sound: ${error.message}`, true);
    context.close();
  }
}

async function latents(books) {
  const answer = await fetch("dequantize?model=" + encodeURIComponent(clip.model), {
    method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ clips: books.map((count) => ({ codes: clip.codes.slice(0, count).map((row) => row.slice(0, 2000)) })) }),
  });
  if (!answer.ok) throw new Error(await problemOf(answer));
  return (await answer.json()).clips.map((one) => one.latents);
}

async function coarsen() {
  const count = Number(by("coarse").value);
  document.querySelectorAll("#layers .layer").forEach((layer, book) => {
    layer.hidden = book >= count;
    by(`book-${book}`).checked = book < count;
  });
  try {
    const [some, all] = await latents([count, clip.codebooks]);
    let apart = 0, whole = 0;
    all.forEach((row, n) => row.forEach((value, d) => { apart += (value - some[n][d]) ** 2; whole += value ** 2; }));
    by("coarse-said").textContent =
      `${count} of ${clip.codebooks} codebooks: ${(100 * Math.sqrt(apart / whole)).toFixed(1)} % away from all of them.`;
  } catch (error) {
    say(error.message, true);
  }
}

function compare() {
  document.querySelectorAll("#layers .beside").forEach((old) => old.remove());
  if (!clip || !other) { by("common").textContent = ""; return; }
  if (other.model !== clip.model) { by("common").textContent = `The other file was read by another model (${other.model}).`; return; }
  const shares = clip.codes.map((codes, book) => {
    const known = new Set(other.codes[book]);
    return codes.filter((code) => known.has(code)).length / codes.length;
  });
  by("common").textContent = `Positions whose code is also in ${other.file}: ` +
    shares.map((share, book) => `codebook ${book + 1}: ${(100 * share).toFixed(0)} %`).join(", ") +
    `. Its codes stand below those of ${file.name}.`;
  document.querySelectorAll("#layers .layer").forEach((layer, book) => {
    const beside = Object.assign(document.createElement("div"), { className: "beside" });
    beside.append(paint(other, book, `Codebook ${book + 1} of ${other.file}`),
      Object.assign(document.createElement("span"), { textContent: other.file }));
    layer.append(beside);
  });
}

async function readOther() {
  const second = by("other").files[0];
  if (!second) return;
  const answer = await fetch("tokenize" + query(), { method: "POST", body: second });
  if (!answer.ok) { say(await problemOf(answer), true); return; }
  other = { ...(await answer.json()).clips[0], file: second.name };
  compare();
}

function follow() {
  const player = by("player");
  if (clip && !player.paused && clip.duration_s) {
    const { steps } = shape();
    by("scrub").value = String(Math.min(steps - 1, Math.floor(player.currentTime / clip.duration_s * steps)));
    scrub();
  }
  requestAnimationFrame(follow);
}

by("hear").addEventListener("click", hear);
by("coarse").addEventListener("change", coarsen);
by("other").addEventListener("change", readOther);
by("scrub").addEventListener("input", () => {
  if (clip?.duration_s && by("player").paused) by("player").currentTime = clip.duration_s * Number(by("scrub").value) / shape().steps;
});
follow();
