"""From images to log-odds, and from log-odds to metrics, intervals and heat maps."""
