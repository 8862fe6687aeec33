// What scripts add to the report: the theme switch, and in the gallery sorting, filtering, titles,
// links to a seed, and the viewer that flips between two images. Without them every page is
// complete: seeds are switched by CSS, and images are links.
"use strict";

const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function themeSwitch() {
  const button = one(".theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  const tell = () => { button.textContent = now() === "dark" ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    const next = now() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try { localStorage.setItem("posterpipe-theme", next); } catch { /* not kept then */ }
    tell();
  });
  dark.addEventListener("change", tell);
  tell();
}

// Images that are still to come would be missing on paper.
addEventListener("beforeprint", () => {
  for (const image of all("img[loading=lazy]")) image.loading = "eager";
});

// --- gallery -------------------------------------------------------------------------------------

const VARIANT = (figure) => figure.dataset.variant;

function seedOf(prompt) {
  return one(".seeds input:checked", prompt)?.value ?? one(".shots", prompt)?.dataset.seed;
}

function panelOf(prompt) {
  return one(`.shots[data-seed="${CSS.escape(seedOf(prompt) ?? "")}"]`, prompt);
}

function chooseSeed(prompt, seed) {
  const input = one(`.seeds input[value="${CSS.escape(seed)}"]`, prompt);
  if (input) input.checked = true;
  return Boolean(input);
}

function setAddress(address) {
  // Not pushed: going back should leave the gallery, not undo a switch.
  history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
}

/** What the part after # says: a prompt, perhaps a seed, perhaps two variants to flip between. */
function readAddress() {
  const parts = decodeURIComponent(location.hash.slice(1)).split("/");
  const prompt = all(".prompt").find((section) => section.dataset.prompt === parts[0]);
  return { prompt, seed: parts[1], flip: parts[2]?.split("~") };
}

function addressOf(prompt, extra = "") {
  return `${encodeURIComponent(prompt.dataset.prompt)}/${seedOf(prompt)}${extra}`;
}

/** Prompts out of sight have no size yet; where one is, is known only when those near it have. */
function goTo(prompt, tries = 8) {
  const before = prompt.getBoundingClientRect().top;
  prompt.scrollIntoView({ behavior: "instant" });
  const after = prompt.getBoundingClientRect().top;
  if (tries > 0 && (Math.abs(after - before) > 1 || tries > 5)) {
    requestAnimationFrame(() => goTo(prompt, tries - 1));
  }
}

function gallery() {
  const list = one(".gallery");
  const prompts = all(".prompt", list);
  const told = one(".told-count");

  const sorted = {
    name: (a, b) => a.dataset.index - b.dataset.index,
    loss: (a, b) => amount(a, "effect", Infinity) - amount(b, "effect", Infinity),
    gain: (a, b) => amount(b, "effect", -Infinity) - amount(a, "effect", -Infinity),
    low: (a, b) => amount(a, "mean", Infinity) - amount(b, "mean", Infinity),
  };
  function amount(prompt, name, otherwise) {
    return prompt.dataset[name] === "" ? otherwise : Number(prompt.dataset[name]);
  }
  one("#sort").addEventListener("change", (event) => {
    list.append(...prompts.sort(sorted[event.target.value]));
    told.textContent = `Sorted by ${event.target.selectedOptions[0].textContent.toLowerCase()}.`;
  });

  one("#find").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const prompt of prompts) {
      const text = prompt.dataset.words;
      prompt.hidden = !words.every((word) => text.includes(word));
      shown += prompt.hidden ? 0 : 1;
    }
    told.textContent = `${shown} of ${prompts.length} prompts shown.`;
  });

  one("#place").addEventListener("change", (event) => {
    for (const prompt of prompts) {
      const inputs = all(".seeds input", prompt);
      const input = inputs[Math.min(event.target.value, inputs.length - 1)];
      if (input) input.checked = true;
    }
  });

  one("#titled")?.addEventListener("change", (event) => {
    for (const image of all("img[data-titled]", list)) {
      image.dataset.plain ??= image.getAttribute("src");
      image.src = event.target.checked ? image.dataset.titled : image.dataset.plain;
    }
  });

  list.addEventListener("change", (event) => {
    if (event.target.matches(".seeds input")) setAddress(addressOf(event.target.closest(".prompt")));
  });

  const viewer = makeViewer(prompts);
  list.addEventListener("click", (event) => {
    const frame = event.target.closest("a.frame");
    const other = event.ctrlKey || event.metaKey || event.shiftKey || event.altKey;
    if (!frame || event.button || other) return;
    event.preventDefault();
    viewer.open(frame.closest(".prompt"), VARIANT(frame.closest("figure")));
  });

  function follow() {
    const { prompt, seed, flip } = readAddress();
    if (!prompt) return;
    prompt.hidden = false;
    if (seed) chooseSeed(prompt, seed);
    goTo(prompt);
    if (flip) viewer.open(prompt, flip[1] || flip[0], flip[0]);
  }
  addEventListener("hashchange", follow);
  // A moment later, since the browser goes to the place itself first.
  requestAnimationFrame(follow);
}

// --- viewer --------------------------------------------------------------------------------------

function makeViewer(prompts) {
  const dialog = one("dialog.viewer");
  const [first, second] = all("select", dialog);
  const images = all(".stage img", dialog);
  const title = one("header p", dialog);
  const told = one(".told", dialog);
  const seedButton = one("[data-do=seed]", dialog);
  let prompt, showing, opener;

  const visible = () => all(".prompt").filter((section) => !section.hidden);
  const figures = () => all("figure.shot", panelOf(prompt));
  const figureOf = (variant) => figures().find((figure) => VARIANT(figure) === variant);

  function fill() {
    const named = figures().map((figure) => [VARIANT(figure), one(".who", figure).textContent]);
    for (const select of [first, second]) {
      const chosen = select.value;
      select.replaceChildren(...named.map(([value, text]) => new Option(text, value)));
      if (named.some(([value]) => value === chosen)) select.value = chosen;
    }
    title.textContent = one("h2", prompt).textContent.trim();
    seedButton.hidden = all(".seeds input", prompt).length < 2;
  }

  function draw() {
    [first, second].forEach((select, index) => {
      const figure = figureOf(select.value);
      const source = figure && one(".frame img", figure);
      const image = images[index];
      if (source) {
        const titled = source.getAttribute("src") === source.dataset.titled;
        image.src = titled ? source.dataset.titledFull : one(".frame", figure).getAttribute("href");
        image.alt = source.alt;
      } else {
        image.removeAttribute("src");
        image.alt = figure ? one(".none", figure)?.textContent.trim() ?? "" : "";
      }
      image.hidden = index !== showing;
    });
    const figure = figureOf([first, second][showing].value);
    const name = figure ? one(".who", figure).textContent : "";
    const numbers = figure ? one(".numbers", figure).textContent.replace(/\s+/g, " ").trim() : "";
    told.textContent = `${showing ? "B" : "A"}: ${name} · seed ${seedOf(prompt)} · ${numbers}`;
    setAddress(addressOf(prompt, `/${first.value}~${second.value}`));
  }

  function flip() {
    showing = 1 - showing;
    draw();
  }

  function nextSeed(step) {
    const seeds = all(".seeds input", prompt);
    if (seeds.length < 2) return;
    const at = seeds.findIndex((input) => input.checked);
    seeds[(at + step + seeds.length) % seeds.length].checked = true;
    fill();
    draw();
  }

  function nextPrompt(step) {
    const shown = visible();
    prompt = shown[(shown.indexOf(prompt) + step + shown.length) % shown.length];
    fill();
    draw();
  }

  const commands = {
    flip,
    seed: () => nextSeed(1),
    before: () => nextPrompt(-1),
    next: () => nextPrompt(1),
    close: () => dialog.close(),
  };
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
    const button = event.target.closest("[data-do]");
    if (button) commands[button.dataset.do]();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    const does = {
      f: flip, " ": event.target.matches("button:not(.stage, .flip)") ? null : flip,
      s: () => nextSeed(1), arrowright: () => nextPrompt(1), arrowleft: () => nextPrompt(-1),
      arrowdown: () => nextSeed(1), arrowup: () => nextSeed(-1),
    }[key];
    if (!does) return;
    event.preventDefault();
    does();
  });
  for (const select of [first, second]) {
    select.addEventListener("change", () => {
      showing = select === second ? 1 : 0;
      draw();
    });
  }
  dialog.addEventListener("close", () => {
    setAddress(addressOf(prompt));
    goTo(prompt);
    opener?.focus({ preventScroll: true });
  });

  return {
    open(section, variant, against) {
      prompt = section;
      opener = document.activeElement;
      const variants = all("figure.shot", panelOf(prompt)).map(VARIANT);
      fill();
      const base = variants.includes("sd") ? "sd" : variants[0];
      const tuned = variants.includes("dreambooth") ? "dreambooth" : variants.at(-1);
      second.value = variants.includes(variant) ? variant : tuned;
      first.value = variants.includes(against) ? against : second.value === base ? tuned : base;
      showing = 1;
      draw();
      if (!dialog.open) dialog.showModal();
      one(".flip", dialog).focus();
    },
  };
}

themeSwitch();
if (one(".gallery")) gallery();
