"""How known data sets are laid out, and what of it becomes samples."""
