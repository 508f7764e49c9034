"""Commands that write what the pack ships and nobody edits: workflows, the editor's pages and translations, tables of
docs. Run them from the pack's folder, as `python -m tools.<name>`.
"""

from pack import register

register()
