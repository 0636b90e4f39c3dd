// The page. Everything it draws comes from POST /generate; nothing else leaves the browser.

const DEBOUNCE = 40;  // ms without a pen's move until the sketch is sent
const LONGEST = 160;  // ms after which it is sent although the pen still moves
const GALLERY = 24;
const COLORS = ["#111111", "#e03131", "#2f9e44", "#1971c2", "#f2c500", "#9c36b5", "#ffffff"];
const WIDTHS = [["Fine", 0.02], ["Pen", 0.06], ["Brush", 0.16]];  // shares of the paper's width

const $ = (id) => document.getElementById(id);
const session = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());
const options = await (await fetch("options")).json();
let mode = "text", upload = null;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const say = (sentence) => { $("message").textContent = sentence; };

// ---- asking ------------------------------------------------------------------------------------

function size() {
  const [height, width] = options.sizes[$("size").selectedIndex];
  return { height, width };
}

function body() {
  const request = {
    prompt: $("prompt").value,
    steps: Number($("settings").elements.steps.value),
    seed: $("seed").valueAsNumber || 0,
    guidance_scale: $("guidance").valueAsNumber,
    schedule: $("schedule").value,
    ...size(),
  };
  const strength = $(`${mode}-strength`)?.valueAsNumber;
  if (mode === "image") {
    if (!upload) throw new Error("Choose an image to start from.");
    Object.assign(request, { image: upload, strength });
  }
  if (mode === "sketch") {
    const lines = sketch.file();
    Object.assign(request, options.takes_control
      ? { control: lines, control_scale: strength } : { image: lines, strength });
  }
  return request;
}

let asked = 0, flight = null, again = false;

// The newest request wins. The one before it is given up here, and in the server's queue too, as
// its connection closes.
async function draw() {
  const number = ++asked, mine = new AbortController(), begin = performance.now();
  flight?.abort();
  flight = mine;
  again = false;
  $("frame").classList.add("busy");
  try {
    const request = body(), stroke = mode === "sketch" ? sketch.strokes() : 0;
    const response = await fetch("generate", {
      method: "POST", signal: mine.signal, body: JSON.stringify(request),
      headers: { "Content-Type": "application/json", "X-Session": session },
    });
    if (!response.ok) {
      const reply = await response.json().catch(() => null);  // a proxy's own page is no JSON
      throw new Error(reply?.error || `The server answers ${response.status}`);
    }
    const url = URL.createObjectURL(await response.blob());
    const image = element("img", { src: url });
    await image.decode();
    if (number !== asked) return URL.revokeObjectURL(url);
    say("");
    const times = stages(response.headers.get("Server-Timing"));
    show(keep({ url, request, stroke, small: image.naturalWidth < 256, times, begin }));
  } catch (error) {
    if (number !== asked) return;
    again = false;
    const lost = error instanceof TypeError;
    say(lost ? "The server does not answer. Is it still running?" : error.message);
  }
  if (number !== asked) return;
  flight = null;
  $("frame").classList.remove("busy");
  if (again) draw();
}

// An image may take longer than the pen's next move. Giving it up for each move would show nothing
// before the stroke ends.
function drawOnTheWay() {
  if (flight) again = true; else draw();
}

const stages = (header) =>
  [...(header || "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]);

// ---- showing -----------------------------------------------------------------------------------

const images = [];  // newest first

// The gallery keeps the last image of each stroke.
function keep(image) {
  const same = image.stroke && images[0]?.stroke === image.stroke;
  const gone = same ? images.splice(0, 1, image) : (images.unshift(image), images.splice(GALLERY));
  for (const old of gone) URL.revokeObjectURL(old.url);
  return image;
}

function show(image) {
  const picture = ({ url, request, small }) =>
    element("img", { src: url, alt: request.prompt, className: small ? "small" : "" });
  $("frame").style.setProperty("--ratio", `${image.request.width} / ${image.request.height}`);
  $("frame").replaceChildren(picture(image));
  image.total ??= performance.now() - image.begin;
  const time = ([name, ms]) =>
    element("span", {}, `${name} ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`);
  $("about").replaceChildren(
    ...[...image.times, ["total", image.total]].map(time),
    element(
      "a", { id: "download", href: image.url, download: fileName(image.request) }, "Download"),
  );
  $("gallery").replaceChildren(...images.map((one) => element("button", {
    type: "button",
    title: `${one.request.prompt} (seed ${one.request.seed}, ${one.request.steps} steps)`,
    className: one === image ? "shown" : "",
    onclick: () => show(one),
  }, picture(one))));
  $("frame").dataset.shown = Number($("frame").dataset.shown || 0) + 1;  // tests wait for this
}

function fileName({ prompt, seed, steps }) {
  const words = prompt.toLowerCase().replace(/[^a-z0-9]+/g, "_").slice(0, 60) || "image";
  return `${words}_seed${seed}_steps${steps}.png`;
}

// The model compiles before it is ready. Until then a bar shows the progress.
async function watch() {
  let next = 400;
  try {
    const health = await (await fetch("health")).json();
    if (health.ready) {
      $("ready").textContent = "Ready";
      next = 5000;
    } else {
      $("ready").replaceChildren(
        element("progress", { max: Math.max(health.programs, 1), value: health.compiled }),
        `Compiling: ${health.compiled} of ${health.programs} programs`,
      );
    }
  } catch {
    $("ready").textContent = "The server does not answer";
    next = 2000;
  }
  setTimeout(watch, next);
}

// ---- an image to start from --------------------------------------------------------------------

function takeFile(file) {
  if (!file) return say("That is no file: drop a PNG, JPEG or WebP image.");
  if (file.size > options.most_bytes) {
    return say(`The image has ${file.size} bytes: use at most ${options.most_bytes}.`);
  }
  const reader = new FileReader(), [hint, preview] = $("drop").children;
  reader.onload = () => {
    upload = reader.result;
    hint.textContent = file.name;
    hint.hidden = true;
    preview.hidden = false;
    preview.onerror = () => { hint.hidden = false; preview.hidden = true; };
    preview.src = upload;
    draw();  // the server finds out what the file really is
  };
  reader.onerror = () => say(`${file.name} cannot be read: choose a PNG, JPEG or WebP image.`);
  reader.readAsDataURL(file);
}

function setUpDrop() {
  const zone = $("drop");
  const over = (is) => (event) => {
    event.preventDefault();
    zone.classList.toggle("over", is);
  };
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (event) => {
    over(false)(event);
    takeFile(event.dataTransfer.files[0]);
  });
  $("file").addEventListener("change", ({ target }) => {
    if (target.files.length) takeFile(target.files[0]);
  });
}

// ---- a sketch to start from --------------------------------------------------------------------

function setUpSketch() {
  const paper = $("canvas"), past = [];  // what Undo goes back to
  const background = options.takes_control ? "#000000" : "#ffffff";
  const colors = options.takes_control ? ["#ffffff", "#000000"] : COLORS;
  // The paper has the image's shape, or the server would crop what is outside.
  const sides = ({ height, width }) => {
    const scale = Math.min(Math.max(256, height, width), 1024) / Math.max(height, width);
    return { width: Math.round(width * scale), height: Math.round(height * scale) };
  };
  Object.assign(paper, sides(size()));
  const pen = paper.getContext("2d", { willReadFrequently: true });
  let color = colors[0], width = WIDTHS[1][1], strokes = 0;
  let point = null, pointer = null, timer = null, since = 0;

  const read = () => pen.getImageData(0, 0, paper.width, paper.height);
  const fill = (value) => {
    pen.fillStyle = value;
    pen.fillRect(0, 0, paper.width, paper.height);
  };
  const remember = () => {
    strokes++;
    past.push(read());
    past.splice(0, past.length - 20);
  };
  const send = () => { clearTimeout(timer); since = 0; draw(); };
  const sendOnTheWay = () => { since = 0; drawOnTheWay(); };
  function changed() {
    const now = performance.now();
    since ||= now;
    clearTimeout(timer);
    timer = setTimeout(sendOnTheWay, Math.max(0, Math.min(DEBOUNCE, LONGEST - (now - since))));
  }

  // A sketch on paper of another shape moves to the middle.
  function reshape() {
    const to = sides(size());
    if (to.width === paper.width && to.height === paper.height) return;
    const sketches = [...past, read()];
    Object.assign(paper, to);
    const moved = sketches.map((data) => {
      const before = element("canvas", { width: data.width, height: data.height });
      before.getContext("2d").putImageData(data, 0, 0);
      const scale = Math.min(paper.width / before.width, paper.height / before.height);
      const [w, h] = [before.width * scale, before.height * scale];
      fill(background);
      pen.drawImage(before, (paper.width - w) / 2, (paper.height - h) / 2, w, h);
      return read();
    });
    past.splice(0, past.length, ...moved.slice(0, -1));  // the last is on the paper now
  }

  function place(event) {
    const box = paper.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [x * paper.width, y * paper.height];
  }
  function lineTo(to) {
    const lineWidth = width * paper.width;
    Object.assign(pen, { strokeStyle: color, lineWidth, lineCap: "round", lineJoin: "round" });
    pen.beginPath();
    pen.moveTo(...point);
    pen.lineTo(...to);
    pen.stroke();
    point = to;
    changed();
  }
  // One pen at a time: the first finger, or the left button.
  paper.addEventListener("pointerdown", (event) => {
    if (point || event.button !== 0) return;
    pointer = event.pointerId;
    paper.setPointerCapture(pointer);
    remember();
    point = place(event);
    lineTo(point);
  });
  paper.addEventListener("pointermove", (event) => {
    if (!point || event.pointerId !== pointer) return;
    for (const one of event.getCoalescedEvents?.() || [event]) lineTo(place(one));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    paper.addEventListener(end, (event) => {
      if (!point || event.pointerId !== pointer) return;
      point = null;
      send();
    });
  }

  const choices = (root, values, button, choose, first) => {
    const buttons = values.map((value) => Object.assign(button(value), {
      type: "button",
      onclick: (event) => {
        choose(value);
        for (const one of buttons) one.classList.toggle("chosen", one === event.currentTarget);
      },
    }));
    buttons[first].classList.add("chosen");
    root.replaceChildren(...buttons);
  };
  choices($("colors"), colors, (value) => {
    const made = element("button", { title: value === background ? "eraser" : value });
    made.style.background = value;
    return made;
  }, (value) => { color = value; }, 0);
  choices($("widths"), WIDTHS, ([name]) => element("button", {}, name),
    ([, share]) => { width = share; }, 1);
  $("fill").onclick = () => { remember(); fill(color); send(); };
  $("undo").onclick = () => {
    if (!past.length) return;
    strokes++;
    pen.putImageData(past.pop(), 0, 0);
    send();
  };
  $("clear").onclick = () => { past.length = 0; fill(background); };

  fill(background);
  return {
    file: () => paper.toDataURL("image/png"), strokes: () => strokes, drawn: () => past.length > 0,
    changed, reshape,
  };
}

// ---- controls ----------------------------------------------------------------------------------

function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  $("tab-image").hidden = !options.takes_image;
  $("tab-sketch").hidden = !options.takes_image && !options.takes_control;
  const choose = (tab) => {
    mode = tab.getAttribute("aria-controls");
    for (const one of tabs) {
      one.setAttribute("aria-selected", one === tab);
      one.tabIndex = one === tab ? 0 : -1;
      $(one.getAttribute("aria-controls")).hidden = one !== tab;
    }
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const seen = tabs.filter((one) => !one.hidden);
      const next = seen[(seen.indexOf(tab) + step + seen.length) % seen.length];
      choose(next);
      next.focus();
    });
  }
  choose(tabs[0]);
}

function setUpValues() {
  $("model").textContent = options.model;
  $("prompt").value = options.examples[0] || "";
  $("examples").replaceChildren(...options.examples.map((text) => element("button", {
    type: "button", onclick: () => { $("prompt").value = text; draw(); },
  }, text)));
  $("steps").append(...options.steps.map((count) => element("label", {}, element("input", {
    type: "radio", name: "steps", value: count, checked: count === options.default_steps,
  }), String(count))));
  $("size").append(...options.sizes.map(([h, w]) => element("option", {}, `${h} × ${w}`)));
  $("schedule").append(...options.schedules.map((name) => element("option", {}, name)));
  $("schedule").value = options.schedule;
  $("guidance").max = Math.max(10, options.guidance_scale);
  $("guidance").value = options.guidance_scale;
  if (options.fixed_guidance) {
    $("guidance").disabled = true;
    $("guidance").title = "This model was trained at one guidance scale.";
  }
  $("image-strength").value = $("sketch-strength").value = options.strength;
  if (options.takes_control) {  // the lines guide the image, instead of being its start
    $("sketch-label").textContent = "Control: how closely the lines are followed";
    Object.assign($("sketch-strength"), { min: 0, max: 2, value: 1 });
  }
  const { height, width } = size();
  $("frame").style.setProperty("--ratio", `${width} / ${height}`);
}

function showNumbers() {
  for (const slider of document.querySelectorAll("input[type=range]")) {
    slider.parentElement.querySelector("output").textContent = slider.value;
  }
}

setUpValues();
setUpTabs();
setUpDrop();
const sketch = setUpSketch();
showNumbers();
for (const form of [$("ask"), $("settings")]) {
  form.addEventListener("submit", (event) => { event.preventDefault(); draw(); });
  form.addEventListener("input", () => {
    showNumbers();
    sketch.reshape();
    if (mode === "sketch" && sketch.drawn()) sketch.changed();
  });
}
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  draw();
});
$("new-seed").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 31);
  draw();
});
window.sprint = { draw };
watch();
