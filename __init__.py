"""WanCore: the Wan 2.1 video family as ComfyUI nodes."""
