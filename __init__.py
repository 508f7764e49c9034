"""WanCore: the Wan video family as ComfyUI nodes."""

from .pack import NAME, register

register()

WEB_DIRECTORY = "./web"
"""Help pages of the nodes; it holds no script."""

# ComfyUI's name for this file is made from its path. As `wancore` it is the package of all that pip installs, where
# a command does not need every node.
if __name__ != NAME:
    from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
