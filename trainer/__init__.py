"""Training of Wan 2.1 models: LoRA, full weights and the speed-control adapter, by `python -m trainer.train`."""
