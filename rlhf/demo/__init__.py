"""The embedded world: a support desk whose language, data and gold preference are programs."""
