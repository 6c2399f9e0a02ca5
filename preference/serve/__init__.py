"""Taking a result elsewhere: chat, merging, GGUF, Ollama."""
