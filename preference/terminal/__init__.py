"""What a person sees of a run: one terminal for the whole program, in colours or in plain lines, English or Chinese."""
