"""One process of several: signals, heartbeat, agreement between ranks."""
