"""Tests import the pack through its alias (`from wancore.wan_core...`): one identity of every class."""

import signal

from pack import load_pack

# A shell that runs the tests in the background ignores Ctrl-C for them, and the programs they start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

load_pack()
