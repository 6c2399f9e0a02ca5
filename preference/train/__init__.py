"""The trainers and their helpers: checkpoints, resuming, sharding, the watchdog."""
