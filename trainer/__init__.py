"""Training of Wan models: LoRA, full weights and the speed-control adapter, by `python -m trainer.train`."""
