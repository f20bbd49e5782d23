"""The clipped policy loss of per-token log-probabilities, and the metrics that come with it."""
