"""What ComfyUI's editor shows of the pack: texts in two languages, help pages, pictures. Written by `editor.build`."""

from pack import register

register()
