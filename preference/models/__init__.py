"""Which model a name means, how it is loaded, and on what hardware."""
