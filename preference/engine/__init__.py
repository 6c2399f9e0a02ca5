"""Token ids -> log-probabilities of pairs: packing, attention, forward."""
