"""Workflows for the editor and for `headless`, and what writes them."""

from pack import register

register()
