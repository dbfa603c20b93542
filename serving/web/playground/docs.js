"use strict";
// Shows /openapi.json for people.

function make(tag, text = "", ...children) {
  const found = document.createElement(tag);
  found.textContent = text;
  found.append(...children);
  return found;
}

function kindOf(schema) {
  if (schema.enum) return schema.enum.join(" | ");
  const choices = (schema.anyOf || [schema]).filter((one) => one.type !== "null");
  return choices.map((one) => one.enum ? one.enum.join(" | ") : one.type || (one.$ref || "").split("/").pop()).join(" | ");
}

function operation(path, method, about) {
  const section = make("section", "", make("h2", `${method.toUpperCase()} ${path}`), make("p", about.description || about.summary));
  section.className = "operation";
  if (about.requestBody) section.append(make("p", `Body: ${Object.keys(about.requestBody.content).join(", ")}`));
  if (about.parameters && about.parameters.length) {
    const head = make("tr", "", make("th", "parameter"), make("th", "in"), make("th", "kind"), make("th", "meaning"));
    const rows = about.parameters.map((one) => make("tr", "", make("td", one.name), make("td", one.in),
      make("td", kindOf(one.schema)), make("td", one.description || one.schema.description || "")));
    section.append(make("table", "", head, ...rows));
  }
  const answers = Object.entries(about.responses).map(([status, one]) => make("li", `${status}: ${one.description} ` +
    `(${Object.keys(one.content || {}).join(", ")})`));
  section.append(make("details", "", make("summary", "Answers"), make("ul", "", ...answers)));
  return section;
}

async function start() {
  const place = document.getElementById("operations");
  const answer = await fetch("openapi.json");
  if (!answer.ok) { place.replaceChildren(make("p", `The document cannot be read: ${answer.status}`)); return; }
  const found = [];
  for (const [path, methods] of Object.entries((await answer.json()).paths)) {
    for (const [method, about] of Object.entries(methods)) found.push(operation(path, method, about));
  }
  place.replaceChildren(...found);
}

start();
