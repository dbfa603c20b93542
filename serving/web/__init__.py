"""The HTTP side: routes, limits, keys, answers; what the engine raises becomes problems here."""
