// Draws the anywidgets of a page without a kernel: their program and their values are stored in the notebook. Other
// controls need Python and are replaced by a sentence.
const STATE = "application/vnd.jupyter.widget-state+json";
const VIEW = "application/vnd.jupyter.widget-view+json";

class Model {
  constructor({ state, buffers = [] }) {
    this.values = { ...state };
    this.listeners = [];
    for (const { path, data } of buffers) {
      const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
      const last = path[path.length - 1];
      path.slice(0, -1).reduce((at, key) => at[key], this.values)[last] = new DataView(bytes.buffer);
    }
  }
  get(name) { return this.values[name]; }
  set(name, value) {
    if (this.values[name] === value) return;
    this.values[name] = value;
    for (const event of [`change:${name}`, "change"]) {
      this.listeners.filter((l) => l.event === event).forEach((l) => l.call(this, value));
    }
  }
  on(event, call) { this.listeners.push({ event, call }); }
  off(event, call) {
    this.listeners = this.listeners.filter((l) =>
      (event && l.event !== event) || (call && l.call !== call));
  }
  save_changes() {}
  send() {}
}

const models = new Map();

async function draw(id, models_state, place) {
  const saved = models_state[id];
  if (!saved) return 0;
  if (saved.state._esm) {
    if (!models.has(id)) models.set(id, new Model(saved));
    const model = models.get(id);
    const url = URL.createObjectURL(new Blob([saved.state._esm], { type: "text/javascript" }));
    let { default: widget } = await import(url);
    if (typeof widget === "function") widget = await widget();
    const style = document.createElement("style");
    style.textContent = saved.state._css || "";
    const el = document.createElement("div");
    place.append(style, el);
    await widget.initialize?.({ model });
    await widget.render({ model, el });
    return 1;
  }
  let drawn = 0;
  for (const child of saved.state.children || []) {
    drawn += await draw(child.replace("IPY_MODEL_", ""), models_state, place);
  }
  return drawn;
}

document.addEventListener("DOMContentLoaded", async () => {
  const stored = document.querySelector(`script[type="${STATE}"]`);
  const { state } = stored ? JSON.parse(stored.textContent) : { state: {} };
  for (const view of document.querySelectorAll(`script[type="${VIEW}"]`)) {
    const place = document.createElement("div");
    place.className = "widget";
    view.after(place);
    try {
      if (await draw(JSON.parse(view.textContent).model_id, state, place)) continue;
      place.textContent = "These controls need Python: open the notebook in JupyterLab to use them.";
    } catch (error) {
      place.textContent = `This widget could not be drawn: ${error}`;
    }
  }
});
