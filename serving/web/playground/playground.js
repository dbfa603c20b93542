"use strict";
// Plain script, no build: sends a file to /tokenize and /v1/picture, draws one layer of colour for each codebook.

const by = (id) => document.getElementById(id);
let file = null;
let clip = null;
let recorder = null;

function say(text, bad = false) {
  by("status").textContent = text;
  by("status").classList.toggle("bad", bad);
}

async function problemOf(answer) {
  try {
    const problem = await answer.json();
    return `${problem.title}: ${problem.detail}`;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

function query(extra = {}) {
  const found = new URLSearchParams(extra);
  if (by("model").value) found.set("model", by("model").value);
  const text = found.toString();
  return text ? "?" + text : "";
}

function tokensQuery() {
  return query({ layout: by("layout").value, offset: by("offset").value || "0", text: "true" });
}

async function tokenize(chosen) {
  file = chosen;
  by("result").hidden = true;
  say(`Tokenizing ${chosen.name} …`);
  try {
    const [codes, picture] = await Promise.all([
      fetch("tokenize" + tokensQuery(), { method: "POST", body: chosen }),
      fetch("v1/picture" + query(), { method: "POST", body: chosen }),
    ]);
    if (!codes.ok) throw new Error(await problemOf(codes));
    clip = (await codes.json()).clips[0];
    clip.shown = Number(picture.headers.get("X-Bridle-Steps") || 0);
    await showPicture(picture);
  } catch (error) {
    say(error.message, true);
    return;
  }
  show(chosen.name);
}

async function showPicture(answer) {
  const image = by("picture");
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.removeAttribute("src");
  if (!answer.ok) return;
  image.src = URL.createObjectURL(await answer.blob());
  await image.decode();
}

function shape(one = clip) {
  // Columns are the first axis where it is time; other axes are stacked as rows. A still is rows by columns.
  const sizes = Object.values(one.grid);
  const timed = "time" in one.grid;
  const steps = timed ? sizes[0] : 1;
  const rest = timed ? sizes.slice(1) : sizes;
  return { timed, steps, rest, perStep: rest.reduce((a, b) => a * b, 1) };
}

function show(name) {
  const { timed } = shape();
  const facts = {
    file: name, model: clip.model, modality: clip.modality,
    grid: Object.entries(clip.grid).map(([axis, size]) => `${axis} ${size}`).join(" × "),
    codebooks: `${clip.codebooks} of ${clip.codebook_size} codes`,
  };
  if (clip.duration_s !== null) facts.duration = `${clip.duration_s.toFixed(2)} s`;
  by("facts").replaceChildren(...Object.entries(facts).map(([term, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: term }),
      Object.assign(document.createElement("dd"), { textContent: value }));
    return row;
  }));
  by("picture").alt = { audio: "Spectrogram, low frequencies at the bottom", image: "The picture as the model sees it",
    video: "Frames of the film, from left to right" }[clip.modality] || "The content as the model sees it";
  by("view").classList.toggle("still", !timed);
  by("caption").textContent = timed
    ? "Above: the content. Below: one layer for each codebook, coarse to fine; each colour is a code."
    : "First: the content. Then one layer for each codebook, coarse to fine; each colour is a code.";
  const { steps, perStep } = shape();
  by("picture").style.width = timed && clip.shown ? `${(100 * Math.min(clip.shown / steps, 1)).toFixed(3)}%` : "";
  if (timed && clip.shown < steps) by("caption").textContent += " The content is shown for the beginning only.";
  drawLayers();
  by("scrub").max = String((timed ? steps : perStep) - 1);
  by("scrub").value = "0";
  by("result").hidden = false;
  ready();
  scrub();
  say(`Done: ${clip.codes[0].length} positions in ${clip.codebooks} codebooks.`);
}

// As bridle/evaluation/palette.py has it: dark to light, blue to orange, which all kinds of colour vision tell apart.
const [DARK, RANGE, ORANGE, BLUE] = [24, 212, 70, 110];

function colour(code) {
  const light = DARK + RANGE * ((code * 0.618034) % 1), warm = 2 * ((code * 0.7548777) % 1) - 1;
  const parts = [light + ORANGE * warm, light, light - BLUE * warm];
  return `rgb(${parts.map((part) => Math.floor(Math.min(Math.max(part, 0), 255) + 0.5)).join(" ")})`;
}

function paint(one, book, name) {
  const { timed, steps, rest, perStep } = shape(one);
  const canvas = document.createElement("canvas");
  const [rows, columns] = rest.length === 2 ? rest : [perStep, 1];
  canvas.width = timed ? steps * columns : columns;
  canvas.height = rows;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${name}: ${new Set(one.codes[book]).size} different codes`);
  const pen = canvas.getContext("2d");
  one.codes[book].forEach((code, position) => {
    const step = Math.floor(position / perStep), inside = position % perStep;
    let row = Math.floor(inside / columns);
    const column = step * columns + inside % columns;
    if ("frequency" in one.grid) row = rows - 1 - row;  // low frequencies at the bottom, as in the spectrogram
    pen.fillStyle = colour(code);
    pen.fillRect(column, row, 1, 1);
  });
  return canvas;
}

function drawLayers() {
  const layers = [], boxes = [];
  for (let book = 0; book < clip.codebooks; book++) {
    const canvas = paint(clip, book, `Codebook ${book + 1}`);
    const layer = Object.assign(document.createElement("div"), { className: "layer", id: `layer-${book}` });
    const mark = Object.assign(document.createElement("div"), { className: "mark" });
    layer.append(canvas, mark, Object.assign(document.createElement("span"), { textContent: `codebook ${book + 1}` }));
    layers.push(layer);
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true, id: `book-${book}` });
    box.addEventListener("change", () => { layer.hidden = !box.checked; });
    const label = Object.assign(document.createElement("label"), { htmlFor: box.id });
    label.append(box, ` ${book + 1}`);
    boxes.push(label);
  }
  by("layers").replaceChildren(...layers);
  by("books").replaceChildren(...boxes);
}

function scrub() {
  const { timed, steps, perStep } = shape();
  const at = Number(by("scrub").value);
  by("cursor").hidden = !timed;
  let where;
  if (timed) {
    by("cursor").style.left = `${(100 * (at + 0.5) / steps).toFixed(3)}%`;
    where = clip.duration_s === null ? `step ${at}` : `${(clip.duration_s * at / steps).toFixed(2)} s`;
  } else {
    const columns = Object.values(clip.grid)[1];
    const rows = perStep / columns;
    where = `row ${Math.floor(at / columns)}, column ${at % columns}`;
    document.querySelectorAll(".mark").forEach((mark) => {
      mark.style.left = `${100 * (at % columns) / columns}%`;
      mark.style.top = `${100 * Math.floor(at / columns) / rows}%`;
      mark.style.width = `${100 / columns}%`;
      mark.style.height = `${100 / rows}%`;
    });
  }
  by("scrub").setAttribute("aria-valuetext", where);
  const from = timed ? at * perStep : at, to = timed ? Math.min(from + perStep, from + 16) : at + 1;
  by("here").textContent = `${where}\n` + clip.codes
    .map((codes, book) => `codebook ${book + 1}: ${codes.slice(from, to).join(" ")}${timed && perStep > 16 ? " …" : ""}`)
    .join("\n");
}

async function copy(what) {
  if (!clip) return;
  let text;
  if (what === "curl") {
    const name = file.name.replaceAll("'", "'\\''");
    text = `curl --data-binary '@${name}' '${new URL("tokenize", location.href)}${tokensQuery()}'`;
  } else if (what === "codes") {
    text = JSON.stringify(clip.codes);
  } else {
    const answer = await fetch("tokenize" + tokensQuery(), { method: "POST", body: file });
    if (!answer.ok) { say(await problemOf(answer), true); return; }
    const fresh = (await answer.json()).clips[0];
    text = what === "ids" ? fresh.ids.join(" ") : fresh.text;
  }
  by("copied").value = text;
  try {
    await navigator.clipboard.writeText(text);
    say(`Copied ${what}.`);
  } catch {
    by("copied").focus();
    by("copied").select();
    say(`The browser did not allow copying; the ${what} stand selected below.`);
  }
}

async function record() {
  if (recorder) { recorder.stop(); return; }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    say(`No microphone: ${error.message}`, true);
    return;
  }
  const parts = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    stream.getTracks().forEach((track) => track.stop());
    const kind = recorder.mimeType;
    recorder = null;
    by("record").textContent = "Record sound";
    tokenize(new File(parts, kind.includes("ogg") ? "recording.ogg" : "recording.webm", { type: kind }));
  };
  recorder.start();
  by("record").textContent = "Stop recording";
  say("Recording …");
}

async function start() {
  try {
    const answer = await fetch("v1/models");
    if (!answer.ok) throw new Error(await problemOf(answer));
    for (const model of (await answer.json()).data) {
      by("model").append(new Option(`${model.id} (${model.modality})`, model.id));
    }
  } catch (error) {
    say(error.message, true);
  }
  by("file").addEventListener("change", () => { if (by("file").files[0]) tokenize(by("file").files[0]); });
  by("model").addEventListener("change", () => { if (file) tokenize(file); });
  by("record").addEventListener("click", record);
  by("scrub").addEventListener("input", scrub);
  document.querySelectorAll("[data-copy]").forEach((button) => {
    button.addEventListener("click", () => copy(button.dataset.copy));
  });
  const drop = by("drop");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) tokenize(event.dataTransfer.files[0]);
    });
  }
}

start();
