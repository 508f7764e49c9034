"""WanCore: the Wan video family as ComfyUI nodes."""

from pathlib import Path

from .pack import NAME, register

register()

WEB_DIRECTORY = "./web"
"""Help pages of the nodes, and one script: colours of sockets, labels of lists, the order of templates."""

# ComfyUI's name for this file is made from its path. As `wancore` it is the package of all that pip installs, where
# a command does not need every node.
if __name__ != NAME:
    from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from wancore.nodes.host import check_folder_name

    check_folder_name(Path(__file__).parent.name)
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
