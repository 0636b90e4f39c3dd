// The page's own part. Everything it draws comes from POST /generate; nothing else leaves the browser.
window.sprint = (() => {
  const offer = window.SPRINT_OFFER;
  const DEBOUNCE = 40;  // ms without a pen's move until the drawing is sent
  const LONGEST = 160;  // ms after which it is sent although the pen still moves
  const GALLERY = 24;
  const session = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());
  const wanted = { prompt: "", steps: 2, seed: 0, height: offer.height, width: offer.width };
  const strengths = { picture: offer.strength, sketch: offer.control ? 1 : offer.strength };
  const parts = {};  // elements, by what they are
  let mode = "text", asked = 0, strokes = 0, flight = null, again = false, upload = null, canvas = null;

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value); else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };

  // ---- asking ----------------------------------------------------------------------------------------------------

  function body() {
    const request = { ...wanted };
    if (mode === "picture") {
      if (!upload) throw new Error("Choose a picture to start from.");
      Object.assign(request, { image: upload, strength: strengths.picture });
    }
    if (mode === "sketch" && offer.control) Object.assign(request, { control: canvas.picture(), control_scale: strengths.sketch });
    if (mode === "sketch" && !offer.control) Object.assign(request, { image: canvas.picture(), strength: strengths.sketch });
    return request;
  }

  // The newest request wins: the one before it is given up, here and, as its connection closes, in the server's line.
  async function draw() {
    const number = ++asked, mine = new AbortController();
    flight?.abort();
    flight = mine;
    again = false;
    const begin = performance.now();
    busy(true);
    try {
      const request = body(), stroke = mode === "sketch" ? strokes : 0;
      const response = await fetch("generate", {
        method: "POST", signal: mine.signal, body: JSON.stringify(request),
        headers: { "Content-Type": "application/json", "X-Session": session },
      });
      if (!response.ok) {
        const told = await response.json().catch(() => null);  // a proxy's own page is no JSON
        throw new Error(told?.error || `The server answers ${response.status} ${response.statusText}`);
      }
      const url = URL.createObjectURL(await response.blob());
      const image = new Image();
      image.src = url;
      await image.decode();
      if (number !== asked) return URL.revokeObjectURL(url);
      say("");
      const timing = response.headers.get("Server-Timing");
      show(keep({ url, request, stroke, small: image.naturalWidth < 256, stages: stages(timing), begin }));
    } catch (error) {
      if (number !== asked) return;
      again = false;
      say(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    }
    if (number !== asked) return;
    flight = null;
    busy(false);
    if (again) draw();
  }

  // What is drawn on the way may take longer than the pen's next move: giving it up each time would show nothing before the end.
  const drawOnTheWay = () => { if (flight) again = true; else draw(); };

  const stages = (header) => [...(header || "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]);

  // ---- showing ---------------------------------------------------------------------------------------------------

  const pictures = [];  // newest first

  // Of the pictures made during one stroke the gallery has the last.
  function keep(picture) {
    const same = picture.stroke && pictures[0]?.stroke === picture.stroke;
    const gone = same ? pictures.splice(0, 1, picture) : (pictures.unshift(picture), pictures.splice(GALLERY));
    for (const old of gone) URL.revokeObjectURL(old.url);
    return picture;
  }

  function show(picture) {
    const image = element("img", { src: picture.url, alt: picture.request.prompt, class: picture.small ? "sprint-small" : "" });
    parts.frame.style.setProperty("--ratio", `${picture.request.width} / ${picture.request.height}`);
    parts.frame.replaceChildren(image);
    picture.total ??= performance.now() - picture.begin;
    const times = [...picture.stages, ["in all", picture.total]];
    parts.about.replaceChildren(
      ...times.map(([name, ms]) => element("span", {}, `${name} ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`)),
      element("a", { href: picture.url, download: fileName(picture.request), id: "sprint-download" }, "Download"),
    );
    parts.gallery.replaceChildren(...pictures.map((one) => element(
      "button", { title: `${one.request.prompt} (seed ${one.request.seed}, ${one.request.steps} steps)`, onclick: () => show(one),
        class: one === picture ? "shown" : "" },
      element("img", { src: one.url, alt: one.request.prompt, class: one.small ? "sprint-small" : "" }))));
    parts.frame.dataset.shown = Number(parts.frame.dataset.shown || 0) + 1;  // what tests and benchmarks wait for
  }

  const fileName = ({ prompt, seed, steps }) =>
    `${prompt.toLowerCase().replace(/[^a-z0-9]+/g, "_").slice(0, 60) || "picture"}_seed${seed}_steps${steps}.png`;
  const busy = (is) => parts.frame?.classList.toggle("busy", is);
  const say = (sentence) => { parts.message.textContent = sentence; };

  function view(root) {
    parts.frame = element("div", { class: "sprint-frame", id: "sprint-frame" }, "Your picture appears here");
    parts.message = element("div", { id: "sprint-message", role: "alert" });
    parts.about = element("div", { id: "sprint-about" });
    parts.gallery = element("div", { id: "sprint-gallery" });
    parts.frame.style.setProperty("--ratio", `${offer.width} / ${offer.height}`);
    root.replaceChildren(parts.frame, parts.message, parts.about, parts.gallery);
    watch();
  }

  // The model is compiled before it is called ready; until then a bar says how far that is.
  async function watch() {
    let next = 400;
    try {
      const health = await (await fetch("health")).json();
      const line = document.getElementById("sprint-ready");
      if (health.ready) {
        line.textContent = "Ready";
        next = 5000;
      } else line.replaceChildren(
        element("progress", { max: Math.max(health.programs, 1), value: health.compiled }),
        `The model is being compiled: ${health.compiled} of ${health.programs} programs`);
    } catch {
      next = 2000;
      const line = document.getElementById("sprint-ready");
      if (line) line.textContent = "The server does not answer";
    }
    setTimeout(watch, next);
  }

  // ---- a picture to start from -----------------------------------------------------------------------------------

  function dropZone(root) {
    const input = element("input", { type: "file", accept: offer.formats.join(","), id: "sprint-file", onchange: () => input.files.length && take(input.files[0]) });
    const hint = element("div", {}, "Drop a picture here, or click to choose one (PNG, JPEG, WebP)");
    const zone = element("label", { class: "sprint-drop" }, hint, input);
    const over = (is) => (event) => { event.preventDefault(); zone.classList.toggle("over", is); };
    zone.addEventListener("dragover", over(true));
    zone.addEventListener("dragleave", over(false));
    zone.addEventListener("drop", (event) => { over(false)(event); take(event.dataTransfer.files[0]); });
    root.replaceChildren(zone);

    // What the file really is, the server finds out.
    function take(file) {
      if (!file) return say("That is no file: drop a PNG, JPEG or WebP picture.");
      if (file.size > offer.mostBytes) return say(`The picture has ${file.size} bytes: use at most ${offer.mostBytes}.`);
      const reader = new FileReader();
      reader.onload = () => {
        upload = reader.result;
        zone.replaceChildren(element("img", { src: upload, alt: file.name, onerror: (event) => event.target.replaceWith(file.name) }), input);
        draw();
      };
      reader.onerror = () => say(`${file.name} cannot be read: choose a PNG, JPEG or WebP picture.`);
      reader.readAsDataURL(file);
    }
  }

  // ---- a drawing to start from -----------------------------------------------------------------------------------

  const COLOURS = ["#111111", "#e03131", "#2f9e44", "#1971c2", "#f2c500", "#9c36b5", "#ffffff"];

  function sketch(root) {
    const ground = offer.control ? "#000000" : "#ffffff";
    const sides = (height, width) => {
      const scale = Math.min(Math.max(256, height, width), 1024) / Math.max(height, width);
      return { width: Math.round(width * scale), height: Math.round(height * scale) };
    };
    const paper = element("canvas", { id: "sprint-canvas", ...sides(wanted.height, wanted.width) });
    const pen = paper.getContext("2d", { willReadFrequently: true });
    const past = [];
    let colour = offer.control ? "#ffffff" : COLOURS[0], width = 0.06, point = null, pointer = null, timer = null, since = 0;
    const fill = (value) => { pen.fillStyle = value; pen.fillRect(0, 0, paper.width, paper.height); };
    const remember = () => {
      strokes++;
      past.push(pen.getImageData(0, 0, paper.width, paper.height));
      past.splice(0, past.length - 20);
    };
    fill(ground);

    const send = () => { clearTimeout(timer); since = 0; draw(); };
    const sendOnTheWay = () => { since = 0; drawOnTheWay(); };
    function changed() {
      const now = performance.now();
      since ||= now;
      clearTimeout(timer);
      timer = setTimeout(sendOnTheWay, Math.max(0, Math.min(DEBOUNCE, LONGEST - (now - since))));
    }
    // The paper has the shape of the picture, or the server would cut off what is outside; the drawing goes to its middle.
    function reshape(height, width) {
      const to = sides(height, width);
      if (to.width === paper.width && to.height === paper.height) return;
      const drawings = [...past, pen.getImageData(0, 0, paper.width, paper.height)];
      Object.assign(paper, to);
      const moved = drawings.map((drawing) => {
        const before = element("canvas", { width: drawing.width, height: drawing.height });
        before.getContext("2d").putImageData(drawing, 0, 0);
        const scale = Math.min(paper.width / before.width, paper.height / before.height);
        const [w, h] = [before.width * scale, before.height * scale];
        fill(ground);
        pen.drawImage(before, (paper.width - w) / 2, (paper.height - h) / 2, w, h);
        return pen.getImageData(0, 0, paper.width, paper.height);
      });
      past.splice(0, past.length, ...moved.slice(0, -1));  // the last is what the paper shows now
    }

    const place = (event) => {
      const box = paper.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width * paper.width, (event.clientY - box.top) / box.height * paper.height];
    };
    function line(to) {
      Object.assign(pen, { strokeStyle: colour, lineWidth: width * paper.width, lineCap: "round", lineJoin: "round" });
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
      paper.setPointerCapture(event.pointerId);
      remember();
      point = place(event);
      line(point);
    });
    paper.addEventListener("pointermove", (event) => {
      if (point && event.pointerId === pointer) for (const one of event.getCoalescedEvents?.() || [event]) line(place(one));
    });
    for (const end of ["pointerup", "pointercancel"]) {
      paper.addEventListener(end, (event) => { if (point && event.pointerId === pointer) { point = null; send(); } });
    }

    const choose = (group, chosen) => group.forEach((one) => one.classList.toggle("chosen", one === chosen));
    const colours = (offer.control ? ["#ffffff", "#000000"] : COLOURS).map((value) => element("button", {
      class: "sprint-colour", style: `background: ${value}`, title: value === ground ? "rubber" : value,
      onclick: (event) => { colour = value; choose(colours, event.target); } }));
    const widths = [["Fine", 0.02], ["Pen", 0.06], ["Brush", 0.16]].map(([name, value]) => element("button", {
      class: "sprint-tool", onclick: (event) => { width = value; choose(widths, event.target); } }, name));
    choose(colours, colours[0]);
    choose(widths, widths[1]);
    const tool = (name, onclick) => element("button", { class: "sprint-tool", id: `sprint-${name.toLowerCase()}`, onclick }, name);
    const tools = [
      tool("Fill", () => { remember(); fill(colour); send(); }),
      tool("Undo", () => { if (past.length) { strokes++; pen.putImageData(past.pop(), 0, 0); send(); } }),
      tool("Clear", () => { past.length = 0; fill(ground); }),
    ];
    root.replaceChildren(element("div", { class: "sprint-tools" }, ...colours, ...widths, ...tools), paper);
    canvas = { picture: () => paper.toDataURL("image/png"), changed, reshape, drawn: () => past.length > 0 };
  }

  // ---- controls --------------------------------------------------------------------------------------------------

  function settings(prompt, picture, drawing, steps, guidance, seed, size, schedule) {
    const [height, width] = size.split(" × ").map(Number);
    const before = JSON.stringify([wanted, strengths]);
    Object.assign(wanted, { prompt, steps, guidance_scale: guidance, seed: seed ?? 0, height, width, schedule });
    canvas?.reshape(height, width);
    Object.assign(strengths, { picture, sketch: drawing });
    if (mode === "sketch" && canvas?.drawn() && before !== JSON.stringify([wanted, strengths])) canvas.changed();
  }

  function examples(root) {
    for (const button of root.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const box = document.querySelector("#sprint-prompt textarea");
        box.value = wanted.prompt = button.textContent;
        box.dispatchEvent(new Event("input", { bubbles: true }));
        draw();
      });
    }
  }

  const newSeed = () => {
    wanted.seed = Math.floor(Math.random() * 2 ** 31);
    draw();
    return wanted.seed;
  };

  return { settings, draw, view, dropZone, sketch, examples, newSeed, mode: (name) => { mode = name; } };
})();
