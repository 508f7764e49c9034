"""Tests import the pack through its alias (`from wancore.wan_core...`), so that there is one identity of every class."""

from pack import load_pack

load_pack()
