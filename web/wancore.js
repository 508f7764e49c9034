// What ComfyUI's front end asks no server for: the colours of the pack's sockets, the size beside the name of a model
// that is not on this disk, and the order of the pack's templates. Where a front end lacks what a part needs, the part
// is left out.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const COLOURS = {
  WANCORE_MODEL: "#9575CD",
  WANCORE_TEXT_ENCODER: "#FFD54F",
  WANCORE_IMAGE_ENCODER: "#80DEEA",
  WANCORE_VAE: "#E57373",
  WANCORE_CONDITIONING: "#FF8A65",
  WANCORE_REFERENCES: "#4FC3F7",
  WANCORE_CAMERA_PATH: "#AED581",
  WANCORE_CACHE: "#F06292",
  WANCORE_WINDOWS: "#4DB6AC",
  WANCORE_PROMPTS: "#FFB74D",
  WANCORE_GUIDANCE: "#DCE775",
  WANCORE_SCHEDULE: "#90A4AE",
  WANCORE_RUN: "#A1887F",
  WANCORE_MEMORY: "#7986CB",
  WANCORE_TRAINING_DATA: "#81C784",
}

function colourSockets() {
  // The classic canvas, its links, and the new node design.
  for (const palette of [app.canvas?.default_connection_color_byType, window.LGraphCanvas?.link_type_colors]) {
    if (palette) Object.assign(palette, COLOURS)
  }
  for (const [type, colour] of Object.entries(COLOURS)) {
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour)
  }
  app.canvas?.setDirty?.(true, true)
}

function labelModels(node) {
  const { required = {}, optional = {} } = node.constructor.nodeData?.input ?? {}
  const declared = { ...required, ...optional }
  for (const widget of node.widgets ?? []) {
    const labels = declared[widget.name]?.[1]?.wancore_labels
    if (labels && widget.options) widget.options.getOptionLabel = (value) => labels[value] ?? String(value ?? "")
  }
}

function orderTemplates() {
  const list = new URL("docs/templates.json", import.meta.url)
  const pack = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2))
  const ask = api.getWorkflowTemplates?.bind(api)
  if (!ask) return
  api.getWorkflowTemplates = async () => {
    const templates = await ask()
    try {
      const order = await (await fetch(list)).json()
      const place = (name) => (order.indexOf(name) + order.length + 1) % (order.length + 1)
      templates[pack]?.sort((a, b) => place(a) - place(b))
    } catch (error) {
      console.debug("wancore: templates stay in the server's order", error)
    }
    return templates
  }
}

orderTemplates()

app.registerExtension({
  name: "wancore",
  setup() {
    // A palette takes away the colours of types that it does not know, the first one too, which comes after this.
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(colourSockets, 300))
  },
  afterConfigureGraph: colourSockets,
  nodeCreated: labelModels,
})
