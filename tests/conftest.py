"""Tests import the pack through its alias (`from wancore.wan_core...`): one identity of every class."""

from pack import load_pack

load_pack()
