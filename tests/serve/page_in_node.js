// Runs the page's script against a server, with just enough of a document around it, and prints what a person would see.
//
//   node page_in_node.js http://127.0.0.1:8000

"use strict";

async function main(url) {
  const page = await (await fetch(url)).text();
  const elements = new Map();
  for (const [, id] of page.matchAll(/ id="([^"]+)"/g)) elements.set(id, element());
  const at = (id) => elements.get(id);

  globalThis.document = { getElementById: at, createElement: element, documentElement: {} };
  globalThis.Option = class { constructor(text, value) { Object.assign(this, { text, value }); } };
  globalThis.getComputedStyle = () => ({ getPropertyValue: () => "blue" });
  globalThis.sessionStorage = { getItem: () => null, setItem() {} };
  globalThis.matchMedia = () => ({ addEventListener() {} });
  const fetched = globalThis.fetch;
  globalThis.fetch = (path, options) => fetched(url + path, options);
  (0, eval)(page.match(/<script>([\s\S]*?)<\/script>/)[1]);

  const seen = {};
  await until(() => at("model").textContent.includes("slots"));
  seen.model = at("model").textContent;
  at("text").value = "The quick brown fox jumps over the lazy dog. ".repeat(20);
  at("read").click();
  await until(() => at("map").drawn > 0);
  seen.reading = at("reading").textContent;
  seen.contexts = at("context").children.map((option) => option.text);
  seen.map = at("map").label;
  for (const question of ["Who?", "And then?"]) {
    at("question").value = question;
    at("ask").click();
    await until(() => at("ask").disabled === false);
  }
  seen.talk = at("answers").children.map((line) => [line.className, line.textContent]);
  for (const id of ["seen", "cached", "slots", "speed", "memory"]) seen[id] = at(id).textContent;
  seen.share = at("share").value;
  at("question").value = "And for ever?";
  at("ask").click();
  await until(() => at("answers").children.at(-1).textContent);
  at("stop").click();
  await until(() => at("ask").disabled === false);
  seen.stopped = at("state").textContent;
  at("forget").click();
  await until(() => at("context").children.length === 1);
  seen.forgotten = at("map").label;
  console.log(JSON.stringify(seen));
}

function element() {
  const handlers = {};
  return {
    value: "", textContent: "", className: "", files: [], children: [], drawn: 0, label: "",
    addEventListener: (kind, handler) => { handlers[kind] = handler; },
    click: () => handlers.click(),
    append(child) { this.children.push(child); },
    replaceChildren(...children) { this.children = children; },
    setAttribute(name, value) { this.label = value; },
    getContext() { return { fillRect: () => { this.drawn += 1; } }; },
    focus() {},
  };
}

async function until(happened) {
  for (let tries = 0; !happened(); tries += 1) {
    if (tries > 4000) throw new Error("it did not happen: " + happened);
    await new Promise((done) => setTimeout(done, 5));
  }
}

main(process.argv[2]);
