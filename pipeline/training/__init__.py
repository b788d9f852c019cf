"""Fine-tuning: windows and packing, the objective, the Trainer, resuming, and loss curves."""
