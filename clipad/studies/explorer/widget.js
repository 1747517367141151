// The image widget of notebook 06: drawing, controls, files. widget.py puts numbers.js before it, so that both are one
// module without dependencies.

// --- drawing ------------------------------------------------------------------------------------------------------

function coloured(values, side, low, high, colours, alpha) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const pixels = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    const c = 3 * Math.min(255, Math.max(0, Math.round((255 * (values[i] - low)) / (high - low))));
    pixels.data.set([colours[c], colours[c + 1], colours[c + 2], alpha], 4 * i);
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

// Marching squares: lines where an S x S array crosses a level, pixel centres at +0.5.
function contour(context, values, size, level) {
  context.beginPath();
  const at = (i, j) => values[i * size + j] - level;
  const cut = (a, b) => a / (a - b);
  for (let i = 0; i + 1 < size; i++)
    for (let j = 0; j + 1 < size; j++) {
      const a = at(i, j), b = at(i, j + 1), c = at(i + 1, j + 1), d = at(i + 1, j);
      const kind = (a > 0) + 2 * (b > 0) + 4 * (c > 0) + 8 * (d > 0);
      if (kind === 0 || kind === 15) continue;
      const points = [];
      if (a > 0 !== b > 0) points.push([j + cut(a, b), i]);
      if (b > 0 !== c > 0) points.push([j + 1, i + cut(b, c)]);
      if (c > 0 !== d > 0) points.push([j + 1 - cut(c, d), i + 1]);
      if (d > 0 !== a > 0) points.push([j, i + 1 - cut(d, a)]);
      for (let k = 0; k + 1 < points.length; k += 2) {
        context.moveTo(points[k][0] + 0.5, points[k][1] + 0.5);
        context.lineTo(points[k + 1][0] + 0.5, points[k + 1][1] + 0.5);
      }
    }
}

function stroke(context, colours) {
  for (const [colour, width] of colours) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
  }
}

// A canvas as wide as its place, sharp on any screen; the context counts in `units` a side.
function prepare(canvas, aspect, units) {
  const width = Math.max(60, canvas.parentElement.clientWidth), ratio = window.devicePixelRatio || 1;
  const wide = Math.round(width * ratio), high = Math.round(width * ratio * aspect);
  if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
  const context = canvas.getContext("2d");
  context.setTransform(wide / units, 0, 0, high / units, 0, 0);
  return { context, pixel: (ratio * units) / wide };
}

function markPatch(context, patch, pixel, colour, width) {
  context.beginPath();
  context.rect(patch[1], patch[0], 1, 1);
  stroke(context, [["black", (width + 2) * pixel], [colour, width * pixel]]);
}

const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;

function bars(answer, token, z, tokens, setup) {
  const rows = answer.rows.map((name, k) => [name, z[2 * (k * tokens + token)], z[2 * (k * tokens + token) + 1]]);
  rows.push(["whole image", ...answer.whole]);
  const numbers = rows.flatMap((row) => row.slice(1));
  const low = Math.min(0, ...numbers), high = Math.max(0, ...numbers);
  const bar = (value, colour) => {
    const left = (100 * (Math.min(0, value) - low)) / (high - low), width = (100 * Math.abs(value)) / (high - low);
    return `<i style="margin-left:${left.toFixed(1)}%;width:${width.toFixed(1)}%;background:${colour}"></i>`;
  };
  const lines = rows.map(([name, normal, anomalous]) => `<tr><th scope="row">${name}</th><td>${normal.toFixed(3)}</td>
    <td>${anomalous.toFixed(3)}</td><td class="bars">${bar(normal, setup.normal)}${bar(anomalous, setup.anomalous)}</td></tr>`);
  return `<table><caption>Cosines of the patch</caption><thead><tr><td></td><th scope="col">normal</th>
    <th scope="col">anomalous</th><td></td></tr></thead><tbody>${lines.join("")}</tbody></table>`;
}

function histogram(found, threshold, setup) {
  const low = Math.min(found.maxima[0], found.maximum, threshold);
  const high = Math.max(found.maxima[found.maxima.length - 1], found.maximum, threshold);
  const place = (value) => 4 + (192 * (value - low)) / Math.max(high - low, 1e-9);
  const counts = new Array(24).fill(0);
  const dots = Array.from(found.maxima, (value) => {
    const bin = Math.min(23, Math.floor((place(value) - 4) / 8));
    return `<rect x="${4 + 8 * bin}" y="${44 - 5 * ++counts[bin]}" width="7" height="4" fill="${setup.normal}"/>`;
  });
  const line = (value, colour, dash) =>
    `<line x1="${place(value)}" x2="${place(value)}" y1="0" y2="46" stroke="${colour}" stroke-width="2" ${dash}/>`;
  return `<svg viewBox="0 0 200 48" role="img" aria-label="Histogram of the flawless images' maxima, with the threshold at
    ${threshold.toFixed(3)} and this image's maximum at ${found.maximum.toFixed(3)}">${dots.join("")}
    <line x1="0" x2="200" y1="45" y2="45" stroke="currentColor"/>${line(threshold, "#00a5b5", 'stroke-dasharray="4 2"')}
    ${line(found.maximum, setup.anomalous, "")}</svg>`;
}

// --- files --------------------------------------------------------------------------------------------------------

function npy(values, size) { // NumPy's format, version 1.0
  let header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${size}, ${size}), }`;
  header = header.padEnd(117) + "\n"; // 10 bytes before it, 128 in all
  const head = new Uint8Array([0x93, 78, 85, 77, 80, 89, 1, 0, header.length & 255, header.length >> 8]);
  return new Blob([head, header, values]);
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- the widget ---------------------------------------------------------------------------------------------------

export default {
  render({ model, el }) {
    const setup = { ...model.get("setup") };
    const colours = bytes(setup.colours), { size, grid } = setup, tokens = grid * grid + 1;
    const view = () => model.get("view");
    let pending = null, hovered = null, pictures = [], kept = new Map();

    const change = (changes) => {
      model.set("view", { ...view(), ...changes });
      draw();
      clearTimeout(pending);
      pending = setTimeout(() => model.save_changes(), 120); // the kernel hears the last state
    };
    const changeSide = (number, changes) =>
      change({ sides: view().sides.map((side, i) => (i === number ? { ...side, ...changes } : side)) });

    el.innerHTML = page(setup);
    const root = el.querySelector(".clipad-explorer");
    const $ = (name) => root.querySelector(`[data-is="${name}"]`);
    const sides = [0, 1].map((number) => side(number));

    function load() {
      pictures = model.get("pictures").map((picture) => {
        const image = new Image();
        image.onload = draw;
        image.src = URL.createObjectURL(new Blob([bytes(picture.png)], { type: "image/png" }));
        const packed = picture.mask && bytes(picture.mask);
        const mask = packed && Float32Array.from({ length: size * size }, (_, i) => (packed[i >> 3] >> (7 - (i & 7))) & 1);
        return { ...picture, image, mask, attention: float16(picture.attention) };
      });
      draw();
    }

    function result(number) { // kept as long as what it depends on
      const own = view().sides[number], answer = model.get("answers")[own.shows];
      const key = JSON.stringify([own.stages, own.surgery, own.smoothing]);
      const old = kept.get(number);
      if (old && old.answer === answer && old.key === key) return old;
      kept.set(number, { answer, key, ...computeMap(setup, answer, own) });
      return kept.get(number);
    }

    function draw() {
      const { patch, block, falseAlarms, opacity, contour, truth } = view();
      for (const [name, value] of Object.entries({ opacity, falseAlarms })) $(name).value = value;
      for (const [name, value] of Object.entries({ contour, truth })) $(name).checked = value;
      $("block").value = block;
      $("opacityNow").textContent = percent(opacity, 0);
      $("falseAlarmsNow").textContent = `${falseAlarms} % of flawless images`;
      if (pictures.length) for (const one of sides) one.draw(patch);
    }

    function pick(patch) {
      change({ patch: patch.map((place) => Math.min(grid - 1, Math.max(0, place))) });
      const said = sides.map((one) => one.say()).join(" ");
      $("status").textContent = said;
    }

    function side(number) {
      const part = root.querySelectorAll(".clipad-side")[number];
      const $ = (name) => part.querySelector(`[data-is="${name}"]`);
      const canvas = $("picture");

      const place = (event) => {
        const box = event.currentTarget.getBoundingClientRect();
        return [event.clientY - box.top, event.clientX - box.left].map((x, i) =>
          Math.min(grid - 1, Math.max(0, Math.floor((grid * x) / (i ? box.width : box.height)))));
      };
      for (const one of [canvas, $("qk"), $("vv")]) {
        one.onclick = (event) => pick(place(event));
        one.onpointermove = (event) => hover(place(event));
        one.onpointerleave = () => hover(null);
      }
      canvas.onkeydown = (event) => {
        const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (!step) return;
        event.preventDefault();
        event.stopPropagation();
        pick(view().patch.map((x, i) => x + step[i]));
      };
      $("shows").onchange = (event) => changeSide(number, { shows: Number(event.target.value) });
      $("surgery").onchange = (event) => changeSide(number, { surgery: event.target.checked });
      $("smoothing").oninput = (event) => changeSide(number, { smoothing: Number(event.target.value) });
      part.querySelectorAll("[data-stage]").forEach((box) => {
        box.onchange = () => {
          const chosen = [...part.querySelectorAll("[data-stage]")].filter((b) => b.checked).map((b) => Number(b.dataset.stage));
          if (chosen.length) changeSide(number, { stages: chosen });
          else draw(); // the last one stays
        };
      });
      part.querySelectorAll("[data-save]").forEach((button) => (button.onclick = () => exportAs(button.dataset.save)));

      const now = () => {
        const own = view().sides[number], found = result(number);
        return { own, found, answer: found.answer, picture: pictures[own.shows],
          threshold: quantile(found.maxima, 1 - view().falseAlarms / 100) };
      };
      const value = ({ found }, patch) => { // the map at the middle of a patch
        const middle = patch.map((x) => Math.min(size - 1, Math.floor(((x + 0.5) * size) / grid)));
        return found.map[middle[0] * size + middle[1]];
      };

      function drawPicture(state, patch, target = canvas, marked = true) {
        const { picture, found, threshold } = state, { opacity, contour: lines, truth } = view();
        const { context, pixel } = prepare(target, picture.height / picture.width, size);
        context.imageSmoothingEnabled = true;
        if (picture.image.complete && picture.image.naturalWidth) context.drawImage(picture.image, 0, 0, size, size);
        context.globalAlpha = opacity;
        if (opacity > 0) context.drawImage(coloured(found.map, size, found.low, found.high, colours, 255), 0, 0, size, size);
        context.globalAlpha = 1;
        if (truth && picture.mask) {
          contour(context, picture.mask, size, 0.5);
          stroke(context, [["black", 3 * pixel], ["white", 1.4 * pixel]]);
        }
        if (lines) {
          contour(context, found.map, size, threshold);
          stroke(context, [["black", 3 * pixel], ["#00e5f5", 1.6 * pixel]]);
        }
        if (!marked) return;
        context.scale(size / grid, size / grid);
        if (hovered) markPatch(context, hovered, (pixel * grid) / size, "white", 1);
        markPatch(context, patch, (pixel * grid) / size, "#37ff37", 2);
      }

      function drawAttention({ picture }, patch) {
        const token = patch[0] * grid + patch[1], stage = setup.stages.indexOf(view().block);
        const rows = [0, 1].map((kind) => {
          const start = ((kind * setup.stages.length + stage) * grid * grid + token) * tokens;
          return picture.attention.subarray(start, start + tokens);
        });
        let top = 0;
        for (const row of rows) row.forEach((w, i) => { if (i > 0 && i !== token + 1) top = Math.max(top, w); });
        rows.forEach((row, kind) => {
          const { context, pixel } = prepare($(["qk", "vv"][kind]), picture.height / picture.width, grid);
          context.imageSmoothingEnabled = false;
          const shares = row.subarray(1).map((w) => Math.sqrt(w));
          context.drawImage(coloured(shares, grid, 0, Math.sqrt(top), colours, 255), 0, 0, grid, grid);
          if (hovered) markPatch(context, hovered, pixel, "white", 1);
          markPatch(context, patch, pixel, "#37ff37", 2);
          $(["qkNow", "vvNow"][kind]).textContent =
            `to itself ${percent(row[token + 1])}, to the class token ${percent(row[0])}`;
        });
      }

      function drawAll(patch) {
        const state = now(), { own, answer, found, picture, threshold } = state;
        const staged = answer.detector === "sdp", surgical = staged || answer.detector === "clip_surgery";
        const names = pictures.map((p, i) => `${"AB"[i]}: ${p.name}${p.what ? ` (${p.what})` : ""}`);
        if ($("shows").dataset.names !== names.join("\n")) {
          $("shows").replaceChildren(...names.map((name, i) => new Option(name, i)));
          $("shows").dataset.names = names.join("\n");
        }
        $("shows").value = own.shows;
        $("title").textContent = answer.title;
        part.querySelectorAll("[data-stage]").forEach((box) => {
          box.checked = own.stages.includes(Number(box.dataset.stage));
          box.disabled = !staged;
        });
        Object.assign($("surgery"), { checked: own.surgery, disabled: !surgical });
        Object.assign($("smoothing"), { value: own.smoothing, disabled: answer.detector === "winclip" });
        $("smoothingNow").textContent = `${own.smoothing} px`;
        drawPicture(state, patch);
        drawAttention(state, patch);
        $("cosines").innerHTML = bars(answer, patch[0] * grid + patch[1] + 1, found.cosines, tokens, setup);
        $("histogram").innerHTML = histogram(found, threshold, setup);
        const flagged = found.maximum > threshold;
        part.dataset.flagged = flagged;
        $("verdict").textContent = `${flagged ? "above" : "below"} the threshold · class probability ${percent(answer.probability)}`;
        $("low").textContent = found.low.toFixed(2);
        $("middle").textContent = ((found.low + found.high) / 2).toFixed(2);
        $("high").textContent = found.high.toFixed(2);
        const above = found.maxima.filter((x) => x > threshold).length;
        $("scale").textContent = `Threshold ${threshold.toFixed(3)} (dashed): ${above} of ${answer.count} flawless images have a `
          + `maximum above it. This image: ${found.maximum.toFixed(3)} (solid).`;
        canvas.setAttribute("aria-label", `Image ${"AB"[number]}: ${picture.name}, ${answer.title}. Arrow keys move the patch.`);
        showValue(state, hovered || patch);
      }

      function showValue(state, patch) {
        $("value").textContent = `patch (${patch[0] + 1}, ${patch[1] + 1}): map ${value(state, patch).toFixed(3)}`;
      }

      function exportAs(kind) {
        const state = now(), { found, picture, threshold, answer } = state;
        const stem = `${picture.name.replace(/\.\w+$/, "").replace(/[^\w.-]+/g, "_")}-${answer.detector}`;
        if (kind === "map") return save(npy(found.map, size), `${stem}.npy`);
        if (kind === "csv") {
          const lines = ["row,column,map," + answer.rows.flatMap((r) => [`${r} normal`, `${r} anomalous`]).join(",")];
          for (let n = 0; n < grid * grid; n++) {
            const own = answer.rows.flatMap((_, k) => [0, 1].map((c) => found.cosines[2 * (k * tokens + n + 1) + c].toFixed(6)));
            const patch = [Math.floor(n / grid), n % grid];
            lines.push([patch[0] + 1, patch[1] + 1, value(state, patch).toFixed(6), ...own].join(","));
          }
          return save(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }), `${stem}.csv`);
        }
        const out = document.createElement("canvas"); // a PNG of the view, or of the mask, black and white
        if (kind === "png") {
          Object.assign(out, { width: canvas.width, height: canvas.height });
          out.getContext("2d").drawImage(canvas, 0, 0);
        } else {
          const gray = new Uint8Array(768).map((_, i) => (i > 2 ? 255 : 0));
          out.width = out.height = size;
          out.getContext("2d").drawImage(coloured(found.map.map((x) => (x > threshold ? 255 : 0)), size, 0, 255, gray, 255), 0, 0);
        }
        out.toBlob((blob) => save(blob, `${stem}${kind === "mask" ? "-mask" : ""}.png`));
      }

      const say = () => {
        const state = now(), { patch } = view(), row = state.answer.rows.length - 1;
        const at = 2 * (row * tokens + patch[0] * grid + patch[1] + 1);
        return `${"AB"[number]}: row ${patch[0] + 1}, column ${patch[1] + 1}, map ${value(state, patch).toFixed(2)}, `
          + `cosine normal ${state.found.cosines[at].toFixed(2)}, anomalous ${state.found.cosines[at + 1].toFixed(2)}.`;
      };
      return { draw: drawAll, say, hover: (patch) => {
        const state = now();
        drawPicture(state, view().patch);
        drawAttention(state, view().patch);
        showValue(state, patch || view().patch);
      } };
    }

    function hover(patch) {
      if (JSON.stringify(patch) === JSON.stringify(hovered)) return;
      hovered = patch;
      for (const one of sides) one.hover(patch);
    }

    $("opacity").oninput = (event) => change({ opacity: Number(event.target.value) });
    $("falseAlarms").oninput = (event) => change({ falseAlarms: Number(event.target.value) });
    $("contour").onchange = (event) => change({ contour: event.target.checked });
    $("truth").onchange = (event) => change({ truth: event.target.checked });
    $("block").onchange = (event) => change({ block: Number(event.target.value) });
    const heard = [["change:pictures", load], ["change:answers", draw], ["change:view", draw]];
    for (const [name, call] of heard) model.on(name, call);
    const watch = new ResizeObserver(draw);
    watch.observe(root);
    load();
    return () => {
      watch.disconnect();
      for (const [name, call] of heard) model.off(name, call);
    };
  },
};

const row = (...parts) => parts.join("\n");
const box = (is, text, more = "") => `<label><input type="checkbox" data-is="${is}" ${more}> ${text}</label>`;
const range = (is, text, max, step) =>
  `<label>${text} <input type="range" min="0" max="${max}" step="${step}" data-is="${is}"> <output data-is="${is}Now"></output></label>`;
const small = (is, text) => `<figure><div class="clipad-box"><canvas data-is="${is}"></canvas></div>
  <figcaption>${text} attention: <span data-is="${is}Now"></span></figcaption></figure>`;
const FILES = { png: "picture", map: "map (.npy)", mask: "mask", csv: "patches (.csv)" };

function page({ stages }) {
  const part = (name) => row(
    `<section class="clipad-side" aria-label="${name}"><div class="clipad-main">`,
    `<div class="clipad-head"><b>${name}</b> <select data-is="shows" aria-label="Image of ${name}"></select></div>`,
    `<div data-is="title"></div><div class="clipad-verdict" data-is="verdict"></div>`,
    `<div class="clipad-box"><canvas data-is="picture" tabindex="0" role="application"></canvas></div>`,
    `<div class="clipad-scale" aria-hidden="true">${["low", "middle", "high"].map((n) => `<span data-is="${n}"></span>`).join("")}</div>`,
    `<div data-is="value"></div>`,
    `<fieldset><legend>Map of ${name}</legend><span>stages after block`,
    ...stages.map((b) => box("stage", b, `data-stage="${b}"`)),
    `</span> ${box("surgery", "feature surgery")} ${range("smoothing", "smoothing", 10, 0.1)}</fieldset></div>`,
    `<div class="clipad-detail"><div class="clipad-patch">${small("qk", "q-k")}${small("vv", "v-v")}</div>`,
    `<div data-is="cosines"></div><div data-is="histogram" class="clipad-histogram"></div><div data-is="scale"></div>`,
    `<div class="clipad-save">Save ${name}:`,
    ...Object.entries(FILES).map(([kind, text]) => `<button type="button" data-save="${kind}">${text}</button>`),
    `</div></div></section>`);
  return row(
    `<div class="clipad-explorer" role="group" aria-label="Explorer: click a patch, or move it by the arrow keys">`,
    `<div class="clipad-common">${range("opacity", "map over image", 1, 0.05)}${range("falseAlarms", "false alarms", 50, 1)}`,
    `${box("contour", "threshold line")}${box("truth", "true defect")}<label>attention of block <select data-is="block">`,
    ...stages.map((b) => `<option>${b}</option>`),
    `</select></label></div><div class="clipad-sides">${part("A")}${part("B")}</div>`,
    `<div class="clipad-unseen" role="status" aria-live="polite" data-is="status"></div></div>`);
}

// Without a kernel: the state as it stands in the page, its binary parts compressed, and a model that keeps it.
async function unpacked(value) {
  if (!value || typeof value !== "object") return value;
  if (value.deflated) {
    const packed = Uint8Array.from(atob(value.deflated), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new DataView(await new Response(stream).arrayBuffer());
  }
  if (Array.isArray(value)) return Promise.all(value.map(unpacked));
  const entries = Object.entries(value).map(async ([key, entry]) => [key, await unpacked(entry)]);
  return Object.fromEntries(await Promise.all(entries));
}

async function standAlone(widget, name, packed) {
  const state = await unpacked(packed);
  const model = { get: (key) => state[key], set: (key, value) => { state[key] = value; }, on() {}, off() {}, save_changes() {} };
  for (const el of document.querySelectorAll(`[id="${name}"]:not([data-live])`)) {
    el.dataset.live = "";
    widget.render({ model, el });
  }
}
