// What ComfyUI's front end asks no server for: the colours of the pack's sockets, the size beside the name of a model
// that is not on this disk, one bundled model in its list, the order of the pack's templates, and one place for the size
// of a video. Where a front end lacks what a part needs, the part is left out.

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

// Of the bundled models a list shows one, which fits the chosen model; the others would be refused by its graph.
function oneStandIn(node) {
  const { required = {} } = node.constructor.nodeData?.input ?? {}
  for (const widget of node.widgets ?? []) {
    const standIns = required[widget.name]?.[1]?.wancore_tiny
    const values = widget.options?.values
    if (!standIns || !Array.isArray(values)) continue
    const bundled = new Set(Object.values(standIns))
    let shown = [...bundled].find((value) => values.includes(value))
    const choose = () => {
      shown = bundled.has(widget.value) ? widget.value : (standIns[widget.value] ?? shown)
      widget.options.values = [...values.filter((value) => !bundled.has(value)), shown]
    }
    widget.wancoreChoose = choose
    const chosen = widget.callback
    widget.callback = function (...args) {
      choose()
      return chosen?.apply(this, args)
    }
    choose()
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

const SIZE = ["width", "height", "num_frames"]

// Whether the conditioning that enters a node was made for a size: by a node with pictures, which has widgets for it.
function isSized(node, seen = new Set()) {
  if (seen.has(node)) return false
  seen.add(node)
  return (node.inputs ?? []).some((input, slot) => {
    if (input.type !== "WANCORE_CONDITIONING" && input.type !== "*") return false
    const source = node.getInputNode?.(slot)
    if (!source) return false
    const works = source.mode !== 2 && source.mode !== 4
    const typed = SIZE.every((name) => source.widgets?.some((widget) => widget.name === name))
    return (works && typed && source.type !== "WanCoreSampler") || isSized(source, seen)
  })
}

// A sampler behind pictures has their size, so it shows no size of its own.
function showSize(node) {
  if (node.type !== "WanCoreSampler") return
  const hidden = isSized(node)
  for (const widget of node.widgets ?? []) {
    if (!SIZE.includes(widget.name) || Boolean(widget.hidden) === hidden) continue
    widget.hidden = hidden
    if (widget.options) widget.options.hidden = hidden
  }
  app.canvas?.setDirty?.(true, true)
}

function showSizes() {
  for (const node of app.graph?.nodes ?? []) showSize(node)
}

function chooseStandIns() {
  for (const node of app.graph?.nodes ?? []) for (const widget of node.widgets ?? []) widget.wancoreChoose?.()
}

orderTemplates()

app.registerExtension({
  name: "wancore",
  setup() {
    // A palette takes away the colours of types that it does not know, the first one too, which comes after this.
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(colourSockets, 300))
  },
  afterConfigureGraph() {
    colourSockets()
    showSizes()
    chooseStandIns()
  },
  nodeCreated(node) {
    labelModels(node)
    oneStandIn(node)
    // A link anywhere before a sampler may bring a size, or take it away; it is there after this call.
    const changed = node.onConnectionsChange
    node.onConnectionsChange = function (...args) {
      setTimeout(showSizes)
      return changed?.apply(this, args)
    }
  },
})
