"""Config-driven fine-tuning: what stands in front of a trainer: configuration, data, schedule, loop and journal."""
