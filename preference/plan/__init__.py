"""What a run would need, before it starts: memory, time, a step on paper."""
